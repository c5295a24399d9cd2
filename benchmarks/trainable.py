"""All weights, LoRA, attention, or biases and normalization: memory, time and quality after public training.

    python benchmarks/trainable.py --data PATH --public PATH --runs RUNS --output benchmarks/results/trainable.json
    python benchmarks/trainable.py --data PATH --public PATH --runs RUNS --ways lora-4 --seeds 0 --learning_rates 0.003
    python benchmarks/trainable.py --cost --output benchmarks/results/trainable.json
    python benchmarks/trainable.py --table --output benchmarks/results/trainable.json

A cell is a way, a learning rate and a seed: one training on one thread at epsilon 10, from the same public model
(`--pretrained_model_name_or_path`). That is trained once, in RUNS/public, on public images with their own classes
(`--dataset_name none`), unless a model lies there. A cell that was interrupted goes on from its last checkpoint, and
cells that the output file holds are left alone, so that the table can be made in parts. Ways: `all`, `attention`,
`bias_norm`, `lora-R` for LoRA of rank R. `--set name=value` changes any option, for a trial. The table shows each way
at its best learning rate, by the loss that it shows. Trials need a folder and an output of their own.

Quality is measured on the split `test`, which no training reads: accuracy of a CNN trained on generated images, and
the Fréchet distance in the features of one trained on real ones; and the denoising loss, which says most precisely
what the steps changed. Cost is that of noisy steps of one physical batch: the largest resident memory, in a process of
its own, beside what `plan` estimates, and seconds per step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from memory import measure_steps
from one_training import train

from dp_curriculum import DPCurriculumPipeline
from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.images import PrivateImages, to_unit_range
from dp_curriculum.data.reading import load_images
from dp_curriculum.diffusion.edm import edm_loss
from dp_curriculum.evaluation.classifiers import SmallCNN
from dp_curriculum.evaluation.evaluation import evaluate_images, sample_images
from dp_curriculum.training.cost_estimate import estimate_cost


PRESET = Path(__file__).parents[1] / "examples" / "configs" / "rgb32.yaml"
WAYS = ("all", "lora-4", "attention", "bias_norm")
SHAPE: dict[str, Any] = {
    "resolution": 32,
    "num_channels": 3,
    "patch_size": 2,
    "block_out_channels": "32 64",
    "layers_per_block": 1,
    "attention_resolutions": "8",
    "resnet_time_scale_shift": "scale_shift",
}
PUBLIC: dict[str, Any] = {
    "dataset_name": "none",
    "stages": "public",
    "pretrain_steps": 6500,
    "pretrain_batch_size": 64,
    "pretrain_learning_rate": 1e-3,
    "pretrain_p_mean": -0.4,
    "augmentation": "none",
    "augment_flip": "true",
    "label_dropout": 0.5,  # "no class" is where private classes begin
    "seed": 0,
}
PRIVATE: dict[str, Any] = {
    "stages": "dp_sgd",
    "num_dp_steps": 60,
    "expected_batch_size": 512,
    "noise_multiplicity": 1,
    "dp_ema_decay": 0.95,
    "dp_p_mean": -0.4,
}
COMMON: dict[str, Any] = {
    "target_epsilon": 10,
    "max_physical_batch_size": 128,
    "num_inference_steps": 8,
    "mixed_precision": "no",
    "sample_steps": 0,
}
TIMED_STEPS = 3
LOSS_IMAGES, LOSS_LEVELS = 500, (0.05, 0.2, 0.8)


def options_of(way: str) -> dict[str, Any]:
    """Options of `train` that say which weights are trained."""
    kind, _, rank = way.partition("-")
    return {"trainable": kind, "lora_rank": rank} if rank else {"trainable": kind}


def config_of(options: dict[str, Any]) -> CurriculumConfig:
    """The preset with options that are given as on a command line."""
    known = CurriculumConfig.from_yaml(PRESET)
    fields = {name: value for section in known.to_dict().values() for name, value in section.items()}
    lists = {name for name, value in fields.items() if isinstance(value, list)}
    typed = {name: str(value).split() if name in lists else value for name, value in options.items()}
    return known.replace(
        **{name: value == "true" if value in ("true", "false") else value for name, value in typed.items()}
    )


# --- quality ---------------------------------------------------------------------------------------------------------


def measured(
    folder: Path, real: PrivateImages, num_images: int, network: SmallCNN | None
) -> tuple[dict[str, float], SmallCNN | None]:
    """Figures of a model, and the network in whose features images were compared: the same for all models."""
    pipeline = DPCurriculumPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images, labels = sample_images(pipeline, num_images)
    found = evaluate_images(
        images, labels, real, reference_name="the test split", classifiers=("cnn",), reference_network=network
    )
    figures = {name: round(found.value(name), 4) for name in ("accuracy_cnn", "fd_classifier", "fd_haar")}
    figures |= {"loss": denoising_loss(pipeline, real), "epsilon": pipeline.privacy["epsilon"]}
    return figures, found.reference_network


@torch.no_grad()
def denoising_loss(pipeline: DPCurriculumPipeline, real: PrivateImages) -> float:
    """Mean loss of EDM on the first images of the test split, at three noise levels, with the same noise always."""
    images, labels = to_unit_range(real.images[:LOSS_IMAGES]) * 2 - 1, real.labels[:LOSS_IMAGES]
    generator = torch.Generator().manual_seed(0)
    losses = [
        edm_loss(
            pipeline.unet,
            images,
            torch.randn(images.shape, generator=generator),
            torch.full((len(images),), s),
            labels,
        )
        for s in LOSS_LEVELS
    ]
    return round(float(torch.stack(losses).mean()), 4)


def sweep(given: argparse.Namespace, changes: dict[str, Any]) -> None:
    results = read(given.output)
    public = given.runs / "public"
    given.runs.mkdir(parents=True, exist_ok=True)
    if not (public / "model_index.json").exists():
        train(public, None, SHAPE | COMMON | PUBLIC | {"pretrain_dataset_name": given.public} | changes)
    test = load_images(DataConfig(dataset_name=given.data, num_channels=3, resolution=32), "test")
    network = None
    for name, way, rate, seed in cells(given):
        if name in results["cells"]:
            continue
        start, folder = time.perf_counter(), given.runs / name
        options = SHAPE | COMMON | PRIVATE | options_of(way) | {"dp_learning_rate": rate, "seed": seed} | changes
        train(folder, PRESET, options | {"dataset_name": given.data, "pretrained_model_name_or_path": public})
        figures, network = measured(folder, test, given.num_images, network)
        results["cells"][name] = {"way": way, "dp_learning_rate": rate, "seed": seed, **figures}
        results["cells"][name]["seconds"] = round(time.perf_counter() - start)
        print(name, json.dumps(results["cells"][name]), flush=True)
        write(given.output, results)


def cells(given: argparse.Namespace) -> Iterator[tuple[str, str, float, int]]:
    for seed in given.seeds:
        for way in given.ways:
            for rate in given.learning_rates:
                yield f"{way}-rate{rate * 1e4:g}e-4-seed{seed}", way, rate, seed


# --- cost ------------------------------------------------------------------------------------------------------------


def cost_of(way: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Memory and time of noisy steps of one physical batch of 128 images; the process is used for nothing else."""
    options = SHAPE | COMMON | PRIVATE | {"stages": "public dp_sgd"} | options_of(way) | changes
    options |= {"pretrain_dataset_name": "org/public"}  # which `trainable` asks for; the model itself is not needed
    config = config_of(options | {"expected_batch_size": COMMON["max_physical_batch_size"]})
    torch.set_num_threads(1)
    if config.dp_sgd.trainable == "lora":
        importlib.import_module("peft")  # a library, as the others that are there already
    peak = measure_steps(config, num_steps=1)
    start = time.process_time()
    measure_steps(config, num_steps=1)
    one = time.process_time() - start
    start = time.process_time()
    measure_steps(config, num_steps=1 + TIMED_STEPS)
    seconds = (time.process_time() - start - one) / TIMED_STEPS
    estimate = estimate_cost(config, num_classes=10, dataset_size=50_000, device=torch.device("cpu"))
    return {
        "num_parameters": estimate.num_parameters,
        "num_trained": estimate.num_trained,
        "measured_bytes": peak,
        "estimated_bytes": estimate.memory_bytes,
        "seconds_per_step": round(seconds, 3),
    }


def costs(given: argparse.Namespace) -> None:
    results = read(given.output)
    for way in given.ways:
        if way in results["costs"]:
            continue
        command = [sys.executable, __file__, "--cost_of", way, *(["--set", *given.set] if given.set else [])]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results["costs"][way] = json.loads(printed.splitlines()[-1])
        print(way, json.dumps(results["costs"][way]), flush=True)
        write(given.output, results)


# --- results ---------------------------------------------------------------------------------------------------------


def read(output: Path | None) -> dict[str, Any]:
    if output is None or not output.exists():
        return {"cells": {}, "costs": {}}
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def write(output: Path | None, results: dict[str, Any]) -> None:
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> Iterator[str]:
    """Each way at its best learning rate by the mean loss, as Markdown."""
    heads = ("way", "weights trained", "GB at the peak", "s per step", "rate", "seeds", "loss", "CNN, %", "FD", "Haar")
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for way in dict.fromkeys(row["way"] for row in results["cells"].values()):
        rows = [row for row in results["cells"].values() if row["way"] == way]
        by_rate = {
            rate: [row for row in rows if row["dp_learning_rate"] == rate]
            for rate in {r["dp_learning_rate"] for r in rows}
        }
        rate, best = min(by_rate.items(), key=lambda item: statistics.mean(row["loss"] for row in item[1]))
        cost = results["costs"].get(way)
        told = ("", "", "") if cost is None else (
            f"{cost['num_trained']:,} of {cost['num_parameters']:,}", f"{cost['measured_bytes'] / 1e9:.2f}",
            f"{cost['seconds_per_step']:.2f}",
        )  # fmt: skip
        loss = f"{statistics.mean(row['loss'] for row in best):.4f}"
        quality = (loss, mean(best, "accuracy_cnn", 100), mean(best, "fd_classifier", 1), mean(best, "fd_haar", 1))
        yield f"| {way} | {' | '.join(told)} | {rate:g} | {len(best)} | {' | '.join(quality)} |"


def mean(rows: list[dict[str, Any]], name: str, scale: float) -> str:
    values = [scale * row[name] for row in rows]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10: a folder or a Hub id.")
    parser.add_argument("--public", help="Public images of 32x32 pixels: a folder or a Hub id.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of the trainings and their logs.")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--num_images", type=int, default=1000, help="Generated images for the measurement.")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="Other options, for a trial.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cost", action="store_true", help="Measure memory and time instead.")
    parser.add_argument("--cost_of", help="One way, in this process.")
    parser.add_argument("--table", action="store_true", help="Print the table of the output file.")
    given = parser.parse_args()
    if not (given.cost or given.cost_of or given.table or (given.data and given.public)):
        parser.error("--data and --public are needed for trainings")
    changes = dict(pair.split("=", 1) for pair in given.set)
    if given.cost_of:
        print(json.dumps(cost_of(given.cost_of, changes)))
    elif given.cost:
        costs(given)
    elif not given.table:
        sweep(given, changes)
    if given.table:
        print("\n".join(table(read(given.output))))


if __name__ == "__main__":
    main()
