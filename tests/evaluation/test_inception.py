"""Inception's features: what is missing is named in one line, only the published file is read, grey and RGB go in."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import torch

from dp_curriculum.evaluation import inception
from dp_curriculum.evaluation.inception import check_inception, inception_features


IMAGES = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def publish(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the file at `path` the one that is expected."""
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())


def one_line(weights: Path) -> str:
    with pytest.raises(ValueError, match="^Expected ") as caught:
        inception_features(IMAGES, weights)
    message = str(caught.value)
    assert "--inception_weights" in message and "\n" not in message
    with pytest.raises(ValueError) as early:
        check_inception(weights)
    assert str(early.value) == message
    return message


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    message = one_line(tmp_path / "weights.pth")
    assert str(tmp_path / "weights.pth") in message and "torch-fidelity" in message
    assert "to be a file" in one_line(tmp_path)


class Trap:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_a_file_that_is_not_the_published_one_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, mark = tmp_path / "weights-inception-2015-12-05-6726825d.pth", tmp_path / "mark"
    weights.write_bytes(pickle.dumps(Trap(mark)))
    assert "sha256" in one_line(weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", digest[:8] + "0" * 56)  # as the first digits in the name go
    assert "sha256" in one_line(weights)
    assert not mark.exists()


def test_a_missing_package_is_named_with_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"anything")
    publish(weights, monkeypatch)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "pip install --no-deps torch-fidelity" in one_line(weights)


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is an optional extra"
)


@pytest.fixture
def random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights as they were drawn, in the file format of the published ones."""
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    untrained = type("Untrained", (inception._network_class(),), {"load_state_dict": lambda self, state: None})
    torch.save(untrained("untrained", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    publish(path, monkeypatch)
    return path


@needs_package
def test_features_and_probabilities_of_grey_and_colour_images(random_weights: Path) -> None:
    features, probabilities = inception_features(IMAGES, random_weights)
    assert features.shape == (3, 2048) and probabilities.shape == (3, 1008)
    assert probabilities.sum(1) == pytest.approx(1) and (probabilities >= 0).all()
    in_colour, _ = inception_features(IMAGES.repeat(1, 3, 1, 1), random_weights)
    assert in_colour == pytest.approx(features)
    in_red, _ = inception_features(IMAGES * torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1), random_weights)
    assert in_red.shape == features.shape and in_red != pytest.approx(features, rel=0.01)
    assert not [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]


@needs_package
def test_features_of_an_image_do_not_hang_on_the_batch(random_weights: Path) -> None:
    together, _ = inception_features(IMAGES, random_weights)
    alone, _ = inception_features(IMAGES[1:2], random_weights)
    assert together[1] == pytest.approx(alone[0], rel=1e-3, abs=1e-3 * alone.max())
