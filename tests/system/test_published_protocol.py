"""The published protocol learns from images, and from nothing else."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from scripts import load_script
from torch import Tensor

from dp_curriculum.config import DataConfig
from dp_curriculum.data.images import to_unit_range
from dp_curriculum.data.reading import load_images


@pytest.fixture(scope="module")
def protocol() -> ModuleType:
    return load_script("benchmarks/published_protocol.py")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images = load_images(DataConfig(resolution=8, num_channels=1))
    return to_unit_range(images.images), images.labels


@pytest.mark.parametrize("name", ["ResNet-110", "WRN-40-4", "ResNeXt-29"])
def test_each_network_learns_from_images_of_the_right_class(
    protocol: ModuleType, digits: tuple[Tensor, Tensor], name: str
) -> None:
    images, labels = digits
    small = replace(protocol.ON_A_CPU, batch_size=64)
    train, test = (images[:1000], labels[:1000]), (images[1000:], labels[1000:])
    shuffled = (images[:1000], labels[:1000].roll(1))
    torch.manual_seed(0)
    make = protocol.networks(small, 1, 10)[name]
    assert protocol.accuracy(make, train, test, small) > 0.8
    assert protocol.accuracy(make, shuffled, test, small) < 0.3


def test_the_defaults_are_the_published_protocol(protocol: ModuleType) -> None:
    defaults = protocol.Protocol()
    assert (defaults.num_images, defaults.epochs, defaults.batch_size) == (60_000, 50, 256)
    assert (defaults.learning_rate, defaults.average) == (0.01, 0.9999)
    sizes = {
        name: sum(p.numel() for p in make().parameters()) for name, make in protocol.networks(defaults, 1, 10).items()
    }
    assert sizes["ResNet-110"] == pytest.approx(1.7e6, rel=0.1)
    assert sizes["WRN-40-4"] == pytest.approx(8.9e6, rel=0.1)
