"""Which distance between sets of images sees what a person sees? Planted degradations, whose order is that of the eye.

    python benchmarks/distances.py --data cifar10=PATH fashion_mnist=PATH mnist=PATH --output RESULTS --sheet SHEET

Images of one split are degraded and compared with those of another split. ORDER states which of two degradations a
person would prefer; it was written down before a distance was computed. A candidate is a set of features; its score is
the number of pairs that it puts in another order, over four sets of images. `haar` is what the package has, and
`classifier` is what `fd_classifier` does; no class goes into the others. Distances of `haar` are also taken in smaller
and larger sets, and within classes, where swapped classes are seen. Cells that the output file holds are left alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from dp_curriculum.config import DataConfig
from dp_curriculum.data.images import PrivateImages, to_unit_range
from dp_curriculum.data.reading import load_images
from dp_curriculum.evaluation.classifiers import network_features, train_cnn
from dp_curriculum.evaluation.haar_features import haar_features, haar_step
from dp_curriculum.evaluation.metrics import frechet_distance


NUM_IMAGES = 1000  # of each side
# Dataset, and its classes: `None` for all of them.
SETS: dict[str, tuple[str, tuple[int, ...] | None]] = {
    "cifar10": ("cifar10", None),
    "cats and dogs": ("cifar10", (3, 5)),
    "fashion_mnist": ("fashion_mnist", None),
    "mnist": ("mnist", None),
}


# --- the degradations ----------------------------------------------------------------------------------------------


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """By a Gaussian of that many pixels."""
    reach = min(math.ceil(3 * sigma), images.shape[-1] - 1)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    across = F.conv2d(padded, kernel, groups=images.shape[1])
    return F.conv2d(across, kernel.transpose(2, 3), groups=images.shape[1])


def noisy(images: torch.Tensor, deviation: float) -> torch.Tensor:
    return (images + deviation * torch.randn(images.shape, generator=_generator(1))).clamp(0, 1)


def textures(images: torch.Tensor) -> torch.Tensor:
    """Images with the spectrum of each image, and the phases of noise: the same ones in all channels."""
    noise = torch.fft.rfft2(torch.randn(len(images), 1, *images.shape[2:], generator=_generator(2)))
    phases = noise / noise.abs()
    phases[..., 0, 0] = 1
    return torch.fft.irfft2(torch.fft.rfft2(images) * phases, s=images.shape[2:]).clamp(0, 1)


def shuffled(images: torch.Tensor, side: int) -> torch.Tensor:
    """Each image cut into patches of that many pixels per side, in an order of its own."""
    patches = F.unfold(images, side, stride=side)
    order = torch.rand(len(images), 1, patches.shape[2], generator=_generator(3)).argsort(2)
    return F.fold(patches.gather(2, order.expand_as(patches)), images.shape[2:], side, stride=side)


def shifted(images: torch.Tensor) -> torch.Tensor:
    """By up to a pixel in each direction."""
    size, padded = images.shape[-1], F.pad(images, (1, 1, 1, 1), mode="replicate")
    moves = torch.randint(0, 3, (len(images), 2), generator=_generator(4)).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, moves)])


def few_modes(images: torch.Tensor, count: int) -> torch.Tensor:
    """The first images over and over, shifted and up to 5 % lighter or darker."""
    rows = torch.randint(0, count, (len(images),), generator=_generator(5))
    gains = 0.95 + 0.1 * torch.rand(len(images), 1, 1, 1, generator=_generator(6))
    return (shifted(images[:count][rows]) * gains).clamp(0, 1)


def gaussian_draws(labels: torch.Tensor, images: torch.Tensor, image_labels: torch.Tensor) -> torch.Tensor:
    """Draws from a Gaussian with mean and covariance of the images of each class: moments without any noise."""
    drawn = images.new_empty(len(labels), *images.shape[1:])
    for label in labels.unique().tolist():
        rows, pixels = (labels == label).nonzero().flatten(), images[image_labels == label].flatten(1)
        normals = torch.randn(len(rows), len(pixels), generator=_generator(10 + label)) / math.sqrt(len(pixels) - 1)
        drawn[rows] = (pixels.mean(0) + normals @ (pixels - pixels.mean(0))).view(-1, *images.shape[1:]).clamp(0, 1)
    return drawn


def degradations(images: torch.Tensor, labels: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """The first images as they are and degraded; moments are those of all images."""
    moments = gaussian_draws(labels[:count], images, labels)
    images = images[:count]
    side = images.shape[-1]
    return {
        "real": images,
        "shifted": shifted(images),
        **{f"blur {sigma:g}": blurred(images, sigma) for sigma in (0.5, 1, 2, 4)},
        **{f"noise {deviation:g}": noisy(images, deviation) for deviation in (0.05, 0.1, 0.2, 0.4)},
        "4 patches": shuffled(images, side // 2),
        "16 patches": shuffled(images, side // 4),
        "small patches": shuffled(images, 4),
        "pixels": shuffled(images, 1),
        "textures": textures(images),
        "moments": moments,
        **{f"{count} modes": few_modes(images, count) for count in (500, 50, 5)},
    }


def _chain(*names: str) -> list[tuple[str, str]]:
    return list(zip(names, names[1:]))


# What a person prefers, and to what; chains first. Pairs on which people may differ are left out.
ORDER = (
    *_chain("real", "blur 0.5", "blur 1", "blur 2", "blur 4"),
    *_chain("real", "noise 0.05", "noise 0.1", "noise 0.2", "noise 0.4"),
    *_chain("real", "4 patches", "16 patches", "small patches", "pixels"),
    *_chain("real", "500 modes", "50 modes", "5 modes"),
    *(("shifted", worse) for worse in ("blur 1", "noise 0.1", "4 patches", "50 modes")),
    *((better, "4 patches") for better in ("blur 0.5", "blur 1", "noise 0.05", "noise 0.1")),
    *((better, "16 patches") for better in ("blur 1", "noise 0.1")),
    *((better, "small patches") for better in ("blur 2", "noise 0.2")),
    *((better, "blur 4") for better in ("noise 0.1", "noise 0.2")),
    *(("blur 0.5", "noise 0.2"), ("blur 1", "noise 0.4")),
    *((better, "textures") for better in ("real", "shifted", "blur 0.5", "blur 1", "blur 2")),
    *((better, "textures") for better in ("noise 0.05", "noise 0.1", "noise 0.2", "50 modes")),
    *((better, "moments") for better in ("real", "shifted", "blur 0.5", "blur 1")),
    *((better, "moments") for better in ("noise 0.05", "noise 0.1", "50 modes")),
    *((better, "pixels") for better in ("blur 2", "noise 0.2", "moments", "textures", "50 modes")),
)


# --- the candidates ------------------------------------------------------------------------------------------------

Features = Callable[[torch.Tensor], np.ndarray]


def pixels(images: torch.Tensor) -> np.ndarray:
    """The image in few pixels."""
    return F.adaptive_avg_pool2d(images, 8 if images.shape[1] == 1 else 6).flatten(1).double().numpy()


def haar_logarithms(images: torch.Tensor) -> np.ndarray:
    """The features of the package, with edges on a scale of logarithms above a tenth of the range."""
    found = haar_features(images)
    layout = 16 if images.shape[1] == 1 else 24
    edges = 3 * np.log(found[:, :-layout] + 1)
    return np.concatenate([edges, found[:, -layout:] / 2], axis=1)


def haar_standardised(images: torch.Tensor) -> np.ndarray:
    """The features of the package, each by its deviation in the images that are called real: see `distances`."""
    return haar_features(images)


def scattering(images: torch.Tensor) -> np.ndarray:
    """The features of the package, and how the edges of each scale and direction vary at coarser scales."""
    grey = images.mean(1, keepdim=True)
    side = 2 ** math.ceil(math.log2(images.shape[-1]))
    averages, found = F.interpolate(grey, size=(side, side), mode="bilinear", align_corners=False), []
    while averages.shape[-1] > 4:
        averages, edges = haar_step(averages)
        strength = edges[:, 0].abs()
        while strength.shape[-1] >= 4:
            strength, variation = haar_step(strength)
            found.append(F.adaptive_avg_pool2d(variation.abs().mean(2), 2).flatten(1))
    return np.concatenate([haar_features(images), 10 * torch.cat(found, 1).double().numpy()], axis=1)


def random_network(seed: int) -> Features:
    """Three layers of 3×3 weights that are drawn once, rectified, in a grid of 2×2."""
    source, weights, inputs = np.random.RandomState(seed), [], 3
    for outputs in (16, 32, 32):
        drawn = source.standard_normal((outputs, inputs, 3, 3)) * math.sqrt(2 / (9 * inputs))
        weights.append(torch.from_numpy(drawn).float())
        inputs = outputs

    def features(images: torch.Tensor) -> np.ndarray:
        found = []
        for layer in images.expand(-1, 3, -1, -1).split(250):
            layer = layer - 0.5
            for depth, weight in enumerate(weights):
                layer = F.relu(F.conv2d(F.pad(layer, (1, 1, 1, 1), mode="reflect"), weight))
                layer = layer if depth == len(weights) - 1 else F.avg_pool2d(layer, 2)
            found.append(F.adaptive_avg_pool2d(layer, 2).flatten(1))
        return torch.cat(found).double().numpy()

    return features


CANDIDATES: dict[str, Features] = {
    "haar": haar_features,
    "haar, logarithms": haar_logarithms,
    "haar, standardised": haar_standardised,
    "haar, second order": scattering,
    "pixels": pixels,
    **{f"random network, seed {seed}": random_network(seed) for seed in (0, 1, 2)},
}


def distances(features: Features, real: torch.Tensor, sets: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Distance of each set to the real images."""
    wanted = features(real)
    scale = np.ones(wanted.shape[1])
    if features is haar_standardised:  # what hardly varies is no reason for a large distance
        scale = 1 / (wanted.std(0) + 0.1 * wanted.std(0).mean())
    return {name: frechet_distance(features(images) * scale, wanted * scale) for name, images in sets.items()}


def misplaced(found: Mapping[str, float]) -> list[list[str]]:
    """Pairs whose better one is as far away as the worse one, or farther."""
    return [[better, worse] for better, worse in ORDER if found[better] >= found[worse]]


# --- the experiment ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images and labels of two splits, the second of which is called real."""

    images: torch.Tensor
    labels: torch.Tensor
    real: torch.Tensor
    real_labels: torch.Tensor

    def first(self, count: int) -> Images:
        return Images(self.images[:count], self.labels[:count], self.real[:count], self.real_labels[:count])


@functools.cache
def load_split(path: str, split: str) -> PrivateImages:
    channels, side = (1, 28) if "mnist" in Path(path).name else (3, 32)
    return load_images(DataConfig(dataset_name=path, resolution=side, num_channels=channels), split)


def load_set(path: str, classes: tuple[int, ...] | None) -> Images:
    """Both splits of a dataset, with classes renumbered if some are chosen."""
    parts = []
    for split in ("train", "test"):
        images, labels = load_split(path, split).images, load_split(path, split).labels
        if classes is not None:
            rows = torch.isin(labels, torch.tensor(classes))
            images, labels = images[rows], torch.searchsorted(torch.tensor(classes), labels[rows])
        parts += [to_unit_range(images[:10_000]), labels[:10_000]]
    return Images(*parts)


def of_classifier(given: Images) -> Features:
    network = train_cnn(given.real, given.real_labels, num_classes=int(given.real_labels.max()) + 1, num_steps=1000)
    return lambda images: network_features(network, images)


def by_size(given: Images) -> dict[str, dict[str, float]]:
    """Distances of sets of other sizes, as large on both sides."""
    sizes = [size for size in (100, 250, 500, 1000, 2000, 5000, 10_000) if size <= len(given.real)]
    found = {}
    for part in map(given.first, sizes):
        sets = {"real": part.images, "blur 1": blurred(part.images, 1), "textures": textures(part.images)}
        found[str(len(part.real))] = _rounded(distances(haar_features, part.real, sets))
    return found


def within_classes(given: Images, *, swap: bool) -> float:
    """Mean over the classes of the distance of their images; with `swap`, to those of the next class."""
    count = int(given.labels.max()) + 1
    features, wanted = haar_features(given.images), haar_features(given.real)
    labels, real_labels = ((given.labels + swap) % count).numpy(), given.real_labels.numpy()
    pairs = [(features[labels == label], wanted[real_labels == label]) for label in range(count)]
    return float(np.mean([frechet_distance(*pair) for pair in pairs]))


def _rounded(found: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def compared(given: Images, candidates: Mapping[str, Features]) -> dict[str, Any]:
    part = given.first(NUM_IMAGES)
    sets, found = degradations(given.images, given.labels, NUM_IMAGES), {}
    for name, features in candidates.items():
        values = distances(features, part.real, sets)
        found[name] = {"misplaced": misplaced(values), "distances": _rounded(values)}
        print(name, len(found[name]["misplaced"]), "of", len(ORDER), found[name]["misplaced"], flush=True)
    return found


def seconds_of(images: torch.Tensor) -> float:
    """Time for the features of 10,000 images."""
    start = time.process_time()
    haar_features(images)
    return round((time.process_time() - start) * 10_000 / len(images), 2)


def draw_sheet(sets: Sequence[Images], path: Path, columns: int = 4) -> None:
    """One row per degradation, some images of each set; names on the left."""
    margin, height = 100, 34
    rows = [degradations(part.images, part.labels, 500) for part in sets]
    names = list(rows[0])
    sheet = Image.new("RGB", (margin + height * columns * len(sets), height * len(names)), "white")
    for row, name in enumerate(names):
        ImageDraw.Draw(sheet).text((4, height * row + 10), name, fill="black")
        for column, image in enumerate(image for found in rows for image in found[name][:columns]):
            shown = (image.expand(3, -1, -1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            sheet.paste(Image.fromarray(shown), (margin + height * column, height * row + 1))
    sheet.quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=PATH")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument(
        "--classifier_on",
        nargs="*",
        default=list(SETS),
        help="Sets to try `classifier` on; it takes most of the time.",
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"order": list(map(list, ORDER)), "num_images": NUM_IMAGES, "sets": {}}
    if given.output is not None and given.output.exists():
        results = json.loads(given.output.read_text())
    paths = dict(pair.split("=", 1) for pair in given.data)
    sets = {name: load_set(paths[place], classes) for name, (place, classes) in SETS.items() if place in paths}
    if given.sheet is not None:
        draw_sheet([sets[name] for name in ("cifar10", "fashion_mnist", "mnist") if name in sets], given.sheet)
    for name, part in sets.items():
        print(name, flush=True)
        found = results["sets"].setdefault(name, {"candidates": {}})
        left = {key: value for key, value in CANDIDATES.items() if key not in found["candidates"]}
        if name in given.classifier_on and "classifier" not in found["candidates"]:
            left["classifier"] = of_classifier(part.first(NUM_IMAGES))
        if left:
            found["candidates"] |= compared(part, left)
        found.setdefault("by_size", by_size(part))
        found.setdefault("within_classes", {str(swap): within_classes(part, swap=swap) for swap in (False, True)})
        found.setdefault("seconds_of_10000_images", seconds_of(part.real))
        if given.output is not None:
            given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
