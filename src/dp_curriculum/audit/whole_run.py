"""Whole runs on a dataset and on one with fewer images or persons: all that is no noise must be the same."""

from __future__ import annotations

import io
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from safetensors import safe_open

from dp_curriculum.audit.findings import Finding
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.runtime.checkpointing import MANIFEST, read_manifest
from dp_curriculum.runtime.hashing import hash_file, hash_folder
from dp_curriculum.training.curriculum import run_curriculum


_NUM_IMAGES = 12
# A line of the ledger has a random id, and the hash of the line before.
_RANDOM = ("run_id", "session", "previous", "sha256")


def audit_whole_run(config: CurriculumConfig) -> Finding:
    """
    Runs the curriculum on a few images of two classes, on one fewer, and without the only one of the second class.

    Args:
        config ([`CurriculumConfig`]): With a tiny model. Its mechanism is kept, but for fewer steps and images; the
            number of images is declared public. Where persons are the unit, each has two images here.
    """
    small = _small(config)
    labels = [0] * (_NUM_IMAGES - 1) + [1]
    with tempfile.TemporaryDirectory() as folder:
        kept = {
            name: _traces(small, rows, Path(folder) / name.replace(" ", "-"))
            for name, rows in {
                "all images": labels,
                "one image fewer": labels[1:],
                "a class without images": labels[:-1],
            }.items()
        }
    first = kept["all images"]
    different = sorted(
        f"{what} with {name}"
        for name, traces in kept.items()
        for what in first.keys() | traces.keys()
        if first.get(what) != traces.get(what)
    )
    return Finding(
        "A run on a neighbour leaves equal file names, report, card, events, shapes and log lines",
        holds=not different,
        measured=f"{len(different)} differences" + (f", e.g. {different[0]}" if different else ""),
        allowed="none",
        power=f"{len(first)} files and logs of {len(kept)} runs; catches any difference that is no noise",
    )


def _small(config: CurriculumConfig) -> CurriculumConfig:
    return config.replace(
        **dict.fromkeys(("dataset_config_name", "train_data_dir", "image_column", "label_column")),
        dataset_name="digits",
        person_column="person" if config.data.unit == "person" else None,
        person_from=None,
        num_channels=config.data.channels,
        num_classes=None,
        public_dataset_size=_NUM_IMAGES,
        expected_batch_size=min(4, config.dp_sgd.expected_batch_size),
        num_dp_steps=2,
        pretrain_steps=1,
        pretrain_batch_size=2,
        num_inference_steps=2,
        noise_multiplicity=min(2, config.dp_sgd.noise_multiplicity),
        sample_steps=0,
        checkpointing_steps=1,
        report_to="none",
        push_to_hub=False,
        hub_model_id=None,
        seed=0,
    )


def _dataset(config: CurriculumConfig, labels: list[int]) -> datasets.Dataset:
    """A dataset of one image of each of these classes; of persons, with two each."""
    persons = [f"person {number}" for number in range(len(labels))]
    if config.data.unit == "person":
        labels = [label for label in labels for _ in range(2)]
        persons = [person for person in persons for _ in range(2)]
    side, channels = config.data.resolution, config.data.channels
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), side, side, channels), dtype=np.uint8)
    pictures = [Image.fromarray(image if channels == 3 else image[..., 0]) for image in pixels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    dataset = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    return dataset.add_column("person", persons) if config.data.unit == "person" else dataset


def _traces(config: CurriculumConfig, labels: list[int], folder: Path) -> dict[str, Any]:
    """Outputs of a run that hold no noise, by name."""
    console = io.StringIO()
    with _log_lines() as lines, redirect_stderr(console), redirect_stdout(console):
        run_curriculum(config, _dataset(config, labels), output_dir=folder)
    traces: dict[str, Any] = {
        "log lines": [line.replace(str(folder), "") for line in lines],
        # Of a progress bar, the number that it counts up to; the rest is time.
        "progress bars": sorted(set(re.findall(r"/(\d+) \[", console.getvalue()))),
    }
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    noise = _hashes_of_noise(paths)
    for path in paths:
        traces[str(path.relative_to(folder))] = _form(path, noise)
    return traces


def _hashes_of_noise(paths: Sequence[Path]) -> dict[str, str]:
    """Hashes of noised tensors are noise, too, and those of what holds such a hash; any other must be the same."""
    hashes = {hash_file(path): path.name for path in paths if path.suffix == ".safetensors"}
    for path in paths:
        if path.name == MANIFEST:
            hashes[read_manifest(path.parent)["sha256"]] = path.name
        elif path.name == "privacy.json":
            hashes[hash_file(path)] = path.name
        elif path.parent.name == "unet" and path.suffix == ".safetensors":
            hashes[hash_folder(path.parent)] = path.parent.name
    return hashes


def _form(path: Path, noise: Mapping[str, str]) -> Any:
    """A file without the noise in it: shapes of tensors and pictures, and the text of others without `noise`."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as tensors:
            names = sorted(tensors.keys())
            return [(name, tensors.get_slice(name).get_shape()) for name in names], tensors.metadata()
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return picture.mode, picture.size, sorted(picture.info)
    text = path.read_text(encoding="utf-8")
    for digest, name in noise.items():
        text = text.replace(digest, f"sha256 of {name}")
    if path.suffix == ".jsonl":
        return [_without(json.loads(line)) for line in text.splitlines()]
    if path.name == "manifest.json" or path.name.endswith(".head"):
        return _skeleton(json.loads(text))  # hashes of noised tensors and of the ledger
    return text


def _without(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in _RANDOM}


def _skeleton(value: Any) -> Any:
    """Names and types, and numbers other than hashes."""
    if isinstance(value, Mapping):
        return {name: _skeleton(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_skeleton(entry) for entry in value]
    return type(value).__name__ if isinstance(value, str) else value


@contextmanager
def _log_lines() -> Iterator[list[str]]:
    """Everything that is logged meanwhile, at any level."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith("dp_curriculum"):
                lines.append(f"{record.levelname} {record.getMessage()}")

    handler, logger = Keep(), logging.getLogger("dp_curriculum")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
