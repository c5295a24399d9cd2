"""The protocol of published results: three classifiers on 60,000 generated images, tested on real ones.

    python benchmarks/published_protocol.py out/mnist-eps1 --published mnist-eps1 --data PATH --output RESULT
    python benchmarks/published_protocol.py out/mnist-eps1 --published mnist-eps1 --data PATH --on_a_cpu

As DPImageBench has it (arXiv 2503.14681; its code, evaluator.py): 60,000 images with classes in equal numbers, of
which classifiers train on 55,000; Adam at 0.01 in batches of 256 for 50 epochs, the rate a fifth of it after 20 and
again after 40, weights averaged with 0.9999. What differs:

- networks are those of `transformers`, of the size of the published ones: ResNet-110 as basic blocks (18, 18, 18),
  WRN-40-4 as basic blocks (6, 6, 6) four times as wide, ResNeXt-29 as grouped blocks (3, 3, 3) of a RegNet. Images are
  enlarged four times, because the first layers of these networks make them four times smaller;
- nothing is selected: the last weights are tested, where the published protocol chooses an epoch, and tables often the
  best of three networks. Mean and spread over trainings are reported, of each network and of all three.

`--on_a_cpu` takes one block per stage, a quarter of the width, 5,000 images and 5 epochs, averages with 0.9 because
there are 90 steps, and says so in the result. It shows that all of it works, and its figures are no published ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from dp_curriculum import DPCurriculumPipeline
from dp_curriculum.config import DataConfig
from dp_curriculum.data.images import contributing, to_unit_range
from dp_curriculum.data.reading import load_images
from dp_curriculum.evaluation.classifiers import network_features, train_cnn
from dp_curriculum.evaluation.evaluation import sample_images
from dp_curriculum.evaluation.metrics import frechet_distance


# Accuracy in percent and FID, as their tables have them.
PUBLISHED = {
    "mnist-eps1": {"DP-FETA (arXiv 2504.01395)": (95.6, None), "FETA-Pro (arXiv 2601.06368)": (97.3, 8.0)},
    "mnist-eps10": {"FETA-Pro (arXiv 2601.06368)": (98.5, 2.7)},
    "fashion-mnist-eps1": {"DP-FETA (arXiv 2504.01395)": (81.7, None), "FETA-Pro (arXiv 2601.06368)": (83.4, 27.8)},
    "fashion-mnist-eps10": {"DP-FETA (arXiv 2504.01395)": (87.3, None), "FETA-Pro (arXiv 2601.06368)": (88.2, 11.3)},
}
_ENLARGED = 4


@dataclass(frozen=True)
class Protocol:
    """Numbers of a protocol; the defaults are the published ones."""

    num_images: int = 60_000
    held_back: float = 5 / 60  # of the generated images; published runs choose an epoch by them, this one nothing
    epochs: int = 50
    learning_rate: float = 0.01
    batch_size: int = 256
    average: float = 0.9999
    depth: int = 6  # blocks per stage of WRN-40-4; the others in proportion
    width: int = 16  # channels of the first stage of ResNet-110; the others in proportion


ON_A_CPU = Protocol(num_images=5_000, epochs=5, average=0.9, depth=1, width=4)


class Enlarged(nn.Module):
    """A classifier of `transformers` for small images `(B, C, H, W)` in [0, 1]; it gives logits `(B, classes)`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(F.interpolate(images * 2 - 1, scale_factor=_ENLARGED)).logits
        return logits


def networks(protocol: Protocol, num_channels: int, num_classes: int) -> dict[str, Callable[[], nn.Module]]:
    """The three classifiers, each as a function that makes one with new weights."""
    depth, width = protocol.depth, protocol.width

    def basic(depth: int, width: int) -> nn.Module:
        config = ResNetConfig(
            num_channels=num_channels,
            embedding_size=width,
            hidden_sizes=[width, 2 * width, 4 * width],
            depths=[depth] * 3,
            layer_type="basic",
            num_labels=num_classes,  # type: ignore[call-arg]
        )
        return Enlarged(ResNetForImageClassification(config))

    def grouped() -> nn.Module:
        config = RegNetConfig(
            num_channels=num_channels,
            embedding_size=2 * width,
            hidden_sizes=[4 * width, 8 * width, 16 * width],
            depths=[max(1, depth // 2)] * 3,
            groups_width=max(1, width // 4),
            layer_type="x",
            num_labels=num_classes,  # type: ignore[call-arg]
        )
        return Enlarged(RegNetForImageClassification(config))

    return {
        "ResNet-110": lambda: basic(3 * depth, width),
        "WRN-40-4": lambda: basic(depth, 4 * width),
        "ResNeXt-29": grouped,
    }


def accuracy(
    make: Callable[[], nn.Module], train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], protocol: Protocol
) -> float:
    """Share of real images that a network puts right which has seen generated ones alone."""
    images, labels = train
    model = make().to(images.device)
    averaged = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=protocol.learning_rate)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, round(protocol.epochs * 0.4)), gamma=0.2)
    for _ in range(protocol.epochs):
        for rows in torch.randperm(len(images)).to(images.device).split(protocol.batch_size):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            _average(averaged, model, protocol.average)
        schedule.step()
    with torch.no_grad():
        right = [(averaged(part).argmax(1) == truth).sum() for part, truth in zip(*(half.split(500) for half in test))]
    return float(torch.stack(right).sum()) / len(test[1])


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    # Statistics of batch normalization are averages already.
    for mean, value in zip(averaged.parameters(), model.parameters()):
        mean.lerp_(value, 1 - decay)
    for mean, value in zip(averaged.buffers(), model.buffers()):
        mean.copy_(value)


def _mean(values: list[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return {"mean": round(100 * statistics.mean(values), 2), "spread": round(100 * spread, 2)}


def measure(run: str, data: DataConfig, protocol: Protocol, num_seeds: int, device: str) -> dict[str, Any]:
    """Accuracy of each network over `num_seeds` trainings, in percent, and the distance in features of a CNN."""
    pipeline = DPCurriculumPipeline.from_pretrained(run).to(device)
    data = replace(data, resolution=pipeline.image_size[0], num_channels=pipeline.num_channels)
    real = load_images(data, "test")
    kept = contributing(real.labels, real.num_classes)
    test = to_unit_range(real.images[kept]).to(device), real.labels[kept].to(device)
    start = time.monotonic()
    images, labels = (half.to(device) for half in sample_images(pipeline, protocol.num_images))
    seconds = {"sampling": round(time.monotonic() - start)}
    judge = train_cnn(*test, num_classes=real.num_classes, num_steps=1000)
    distance = frechet_distance(network_features(judge, images), network_features(judge, test[0]))
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    rows = shuffled[: round(len(images) * (1 - protocol.held_back))].to(device)
    found: dict[str, list[float]] = {}
    for name, make in networks(protocol, pipeline.num_channels, real.num_classes).items():
        start = time.monotonic()
        for seed in range(num_seeds):
            with torch.random.fork_rng(devices=[] if device == "cpu" else None):
                torch.random.default_generator.manual_seed(seed)
                found.setdefault(name, []).append(accuracy(make, (images[rows], labels[rows]), test, protocol))
            print(f"{name}, seed {seed}: {100 * found[name][-1]:.2f} %", flush=True)
        seconds[name] = round(time.monotonic() - start)
    return {
        "accuracy_percent": {name: _mean(values) for name, values in found.items()}
        | {"all three": _mean([value for values in found.values() for value in values])},
        "fd_classifier": round(distance, 2),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="Output folder of a training, or Hub id of a model.")
    parser.add_argument("--data", required=True, help="Name or folder of the dataset that it was trained on.")
    parser.add_argument("--published", choices=PUBLISHED, help="Published figures to print beside.")
    parser.add_argument("--num_seeds", type=int, default=3, help="Trainings of each network.")
    parser.add_argument("--num_images", type=int, help="Generated images.")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--on_a_cpu", action="store_true", help="Small networks, few images and few epochs.")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    protocol = ON_A_CPU if given.on_a_cpu else Protocol()
    chosen = {name: getattr(given, name) for name in ("num_images", "epochs") if getattr(given, name) is not None}
    protocol = replace(protocol, **chosen)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "protocol": vars(protocol) | {"is_published": protocol == Protocol(), "num_seeds": given.num_seeds},
        **measure(given.run, DataConfig(dataset_name=given.data), protocol, given.num_seeds, device),
        "published": PUBLISHED.get(given.published, {}),
    }
    print(json.dumps(result, indent=2))
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
