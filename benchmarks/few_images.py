"""How few images give something useful? The lesson alone with the whole budget, by images, classes and epsilon.

    python benchmarks/few_images.py --data cifar10=PATH fashion_mnist=PATH --output RESULTS
    python benchmarks/few_images.py --data cifar10=PATH --sizes 200 --classes 2 --output RESULTS
    python benchmarks/few_images.py --data cifar10=PATH --public PATH --sizes 2000 --output RESULTS
    python benchmarks/few_images.py --table --output benchmarks/results/few_images.json

A cell is a dataset, a number of images, a number of classes and an epsilon: the first images of the first classes of
the split `train`, equally many of each; one training of the preset for photos with the whole budget; and 2,000 drawn
images. With `--public` they are public photos that are moved to the released moments. The figures are those of three
classifiers trained on the drawn images, and tested on the same classes of the split `test`. Beside them, under epsilon
"none", are classifiers that were trained on the private images themselves: what no epsilon can reach. Cells that the
output file holds are left alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.images import PrivateImages, to_unit_range
from dp_curriculum.data.reading import load_images
from dp_curriculum.evaluation.classifiers import SmallCNN
from dp_curriculum.evaluation.evaluation import evaluate_images, sample_images
from dp_curriculum.training.curriculum import run_curriculum


PRESET = Path(__file__).parents[1] / "examples" / "configs" / "cifar10-eps10-cpu.yaml"
SHAPES = {"cifar10": (3, 32), "fashion_mnist": (1, 28), "mnist": (1, 28)}  # channels and pixels
SIZES, CLASSES, EPSILONS = (2000, 10_000), (2, 5, 10), ("3", "10", "none")
NUM_GENERATED, TRAININGS = 2000, 3


def first_images(path: str, name: str, split: str, num_classes: int, count: int | None) -> PrivateImages:
    """The first images of the first classes, equally many of each."""
    channels, resolution = SHAPES[name]
    images = load_images(DataConfig(dataset_name=path, num_channels=channels, resolution=resolution), split)
    kept = []
    for label in range(num_classes):
        of_class = (images.labels == label).nonzero()[:, 0]
        kept.append(of_class if count is None else of_class[: count // num_classes])
    rows = torch.cat(kept).sort().values
    return PrivateImages(images.images[rows], images.labels[rows], images.class_names[:num_classes])


def as_dataset(images: PrivateImages) -> Dataset:
    mode = "L" if images.images.shape[1] == 1 else "RGB"
    pictures = [Image.fromarray(picture.permute(1, 2, 0).squeeze(-1).numpy(), mode=mode) for picture in images.images]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(images.class_names))})
    return Dataset.from_dict({"image": pictures, "label": images.labels.tolist()}, features=features)


def drawn(path: str, private: PrivateImages, epsilon: str, public: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the lesson, and their classes."""
    channels, resolution = private.images.shape[1:3]
    config = CurriculumConfig.from_yaml(PRESET).replace(
        dataset_name=path,
        num_channels=channels,
        resolution=resolution,
        num_classes=private.num_classes,
        target_epsilon=float(epsilon),
        public_dataset_size=len(private),
        sample_steps=0,
        seed=0,
    )
    if public is not None:
        config = config.replace(stages=["moments", "public"], pretrain_dataset_name=public, pretrain_steps=0)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = run_curriculum(config, as_dataset(private), output_dir=Path(folder) / "run").pipeline
        pipeline.set_progress_bar_config(disable=True)
        return sample_images(pipeline, NUM_GENERATED, seed=1_000_000)


def measured(
    images: torch.Tensor, labels: torch.Tensor, real: PrivateImages, networks: dict[int, SmallCNN | None]
) -> dict[str, Any]:
    """Figures; the network of the distance is trained once for each number of classes."""
    found = evaluate_images(
        images,
        labels,
        real,
        reference_name="test",
        classifiers=("cnn", "logistic"),
        num_seeds=TRAININGS,
        reference_network=networks.get(real.num_classes),
    )
    networks[real.num_classes] = found.reference_network
    values = {metric.name: [round(metric.value, 4), metric.spread] for metric in found.metrics}
    return {name: values[name] for name in ("accuracy_cnn", "accuracy_logistic", "fd_classifier", "fd_haar")}


def run_cell(
    given: argparse.Namespace, name: str, path: str, cell: dict[str, Any], networks: dict[int, SmallCNN | None]
) -> dict[str, Any]:
    start = time.perf_counter()
    private = first_images(path, name, "train", cell["classes"], cell["images"])
    real = first_images(path, name, "test", cell["classes"], None)
    if cell["epsilon"] == "none":
        images, labels = to_unit_range(private.images), private.labels
    else:
        images, labels = drawn(path, private, cell["epsilon"], given.public)
    return {**cell, **measured(images, labels, real, networks), "seconds": round(time.perf_counter() - start)}


def cells(given: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    for size in given.sizes:
        for classes in given.classes:
            for epsilon in given.epsilons:
                if epsilon == "none" and given.public is not None:
                    continue
                yield {
                    "dataset": name,
                    "images": size,
                    "classes": classes,
                    "epsilon": epsilon,
                    "public": given.public is not None,
                }


def key(cell: dict[str, Any]) -> str:
    public = "-public" if cell["public"] else ""
    return f"{cell['dataset']}-{cell['images']}x{cell['classes']}-eps{cell['epsilon']}{public}"


def table(results: dict[str, Any]) -> Iterator[str]:
    """Accuracy of the CNN as Markdown: a row per dataset, size, classes and kind, a column per epsilon."""
    epsilons = sorted(
        {row["epsilon"] for row in results.values()}, key=lambda e: (e == "none", float(e) if e != "none" else 0)
    )
    yield f"| dataset | images | classes | {' | '.join(epsilons)} |"
    yield "|---" * (3 + len(epsilons)) + "|"
    rows = {(r["dataset"], r["images"], r["classes"], r["public"]) for r in results.values()}
    for dataset, images, classes, public in sorted(rows):
        found = []
        for epsilon in epsilons:
            name = key(
                {"dataset": dataset, "images": images, "classes": classes, "epsilon": epsilon, "public": public}
            )
            value, spread = results[name]["accuracy_cnn"] if name in results else (None, None)
            found.append("" if value is None else f"{100 * value:.1f} ± {100 * (spread or 0):.1f} %")
        yield f"| {dataset}{', public photos' if public else ''} | {images:,} | {classes} | {' | '.join(found)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH", help=f"Of {', '.join(SHAPES)}.")
    parser.add_argument("--public", help="Public photos: a folder or a Hub id.")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--classes", nargs="+", type=int, default=list(CLASSES))
    parser.add_argument("--epsilons", nargs="+", default=list(EPSILONS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", action="store_true", help="Print the table of the output file.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if given.output is not None and given.output.exists():
        results = json.loads(given.output.read_text())
    if given.public is not None and any(not pair.startswith("cifar10=") for pair in given.data):
        parser.error("--public goes with photos: cifar10")
    for name, path in (pair.split("=", 1) for pair in given.data):
        networks: dict[int, SmallCNN | None] = {}
        for cell in cells(given, name):
            if key(cell) in results:
                continue
            results[key(cell)] = run_cell(given, name, path, cell, networks)
            print(key(cell), json.dumps(results[key(cell)]), flush=True)
            if given.output is not None:
                given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if given.table:
        print("\n".join(table(results)))


if __name__ == "__main__":
    main()
