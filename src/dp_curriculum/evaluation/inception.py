"""Features of Inception v3, for the FID, KID and Inception Score that papers report. An optional extra."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def check_inception(weights: str | Path) -> None:
    """
    Checks that [`inception_features`] can run, at no cost.

    Raises:
        ValueError: If the package or the file is missing, or the file is another one; the message says what to do.
    """
    if not Path(weights).is_file():
        raise ValueError(
            f"Expected --inception_weights={weights} to be a file: download weights-inception-2015-12-05-6726825d.pth "
            "from the releases of github.com/toshas/torch-fidelity."
        )
    # The extractor reads the file with pickle, which can run code: only the published file is let through.
    if hashlib.sha256(Path(weights).read_bytes()).hexdigest() != WEIGHTS_SHA256:
        raise ValueError(f"Expected --inception_weights={weights} to be the published file: its sha256 differs.")
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(
            "Expected torch-fidelity to be installed for --inception_weights: pip install --no-deps torch-fidelity."
        )


def _network_class() -> Any:
    """
    torch-fidelity's Inception v3.

    Importing the package imports torchvision, which has no build for torch without CUDA. The file that defines the
    network does not need it, so that file is imported under a package of which nothing else was run.
    """
    name = "torch_fidelity"
    loaded = {key: module for key, module in sys.modules.items() if key.split(".")[0] == name}
    if not loaded:
        spec = importlib.util.find_spec(name)
        assert spec is not None, "check_inception was passed"
        sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{name}.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    finally:
        if not loaded:  # whoever imports the package later gets all of it
            for key in [key for key in sys.modules if key.split(".")[0] == name]:
                del sys.modules[key]


def inception_features(images: torch.Tensor, weights: str | Path) -> tuple[np.ndarray, np.ndarray]:
    r"""
    Activations and class probabilities of the Inception v3 network that FID is defined with.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): In `[0, 1]`; grey images are repeated for three channels.
        weights (`str` or `Path`): The file `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's releases.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Of shapes `(N, 2048)` and `(N, 1008)`.

    Raises:
        ValueError: See [`check_inception`].
    """
    check_inception(weights)
    outputs = ["2048", "logits_unbiased"]
    network = _network_class()("inception-v3-compat", outputs, feature_extractor_weights_path=str(weights)).eval()
    network = network.to(images.device)
    features, logits = [], []
    with torch.no_grad():
        for part in images.split(64):
            pixels = (part * 255).round().clamp(0, 255).to(torch.uint8)
            activations, classes = network(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels)
            features.append(activations)
            logits.append(classes)
    return torch.cat(features).double().cpu().numpy(), torch.cat(logits).softmax(1).double().cpu().numpy()
