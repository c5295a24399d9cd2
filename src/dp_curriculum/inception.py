"""Features of Inception v3, for the FID, KID and Inception Score that papers report. An optional extra."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import torch


WEIGHTS_SHA256 = "6726825d"  # first digits, as in the name of the file


def inception_features(images: torch.Tensor, weights: str | Path) -> tuple[np.ndarray, np.ndarray]:
    r"""
    Activations and class probabilities of the Inception v3 network that FID is defined with.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): In `[0, 1]`; grey images are repeated for three channels.
        weights (`str` or `Path`): The file `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's releases.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Of shapes `(N, 2048)` and `(N, 1008)`.

    Raises:
        ValueError: If the package or the file is missing; the message says how to get it.
    """
    if not Path(weights).is_file():
        raise ValueError(
            f"Expected --inception_weights={weights} to be a file: download weights-inception-2015-12-05-6726825d.pth "
            "from the releases of github.com/toshas/torch-fidelity."
        )
    # The extractor reads the file with pickle, which can run code: only the published file is let through.
    if not hashlib.sha256(Path(weights).read_bytes()).hexdigest().startswith(WEIGHTS_SHA256):
        raise ValueError(f"Expected --inception_weights={weights} to be the published file: its sha256 is another.")
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(
            "Expected torch-fidelity to be installed for --inception_weights: pip install --no-deps torch-fidelity."
        )
    from torch_fidelity import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    ).eval()
    features, logits = [], []
    with torch.no_grad():
        for part in images.split(64):
            pixels = (part * 255).round().clamp(0, 255).to(torch.uint8)
            activations, classes = network(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels)
            features.append(activations)
            logits.append(classes)
    return torch.cat(features).double().numpy(), torch.cat(logits).softmax(1).double().numpy()
