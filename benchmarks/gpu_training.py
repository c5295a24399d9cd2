"""The training of `gpu.py`: its size from the rates that were measured, its images, and their evaluation."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_slices import NUM_CLASSES, TINY, Bench, Found, rounded, synchronize

from dp_curriculum.commands.arguments import config_parser, parse_config
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.reading import load_images
from dp_curriculum.diffusion.sheets import save_sheet
from dp_curriculum.evaluation.classifiers import SmallCNN
from dp_curriculum.evaluation.evaluation import evaluate_images, sample_images
from dp_curriculum.lessons.pretraining import pretrain
from dp_curriculum.lessons.table import find_lesson
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.training.curriculum import CurriculumResult, run_curriculum
from dp_curriculum.training.run import secret_generator


EVALUATION_SECONDS = 60
FIXED_SECONDS = 30  # of a training: reading, checks, and saving
PRETRAINING_SHARE, MARGIN = 0.15, 0.88
BATCH, MOST_STEPS, FEWEST_STEPS = 4096, 2200, 300
SHEET_COLUMNS = 10
# The paper's network under the lesson and the other settings of the preset for MNIST at epsilon 1.
NETWORKS: dict[str, dict[str, Any]] = {
    "paper": {
        "block_out_channels": [64, 64],
        "layers_per_block": 2,
        "attention_resolutions": [14],
        "norm_num_groups": 16,
        "pretrain_learning_rate": 1e-3,
    },
    "small": {},
}


def measured_rates(rates: Mapping[str, Any]) -> dict[str, tuple[float, int | None]]:
    """The best rate of each network, and at how many rows at once."""
    best: dict[str, tuple[float, int | None]] = {}
    for rate in rates.values():
        if isinstance(rate, dict):
            own = (rate["rows/s"], rate["physical"])
            best[rate["preset"]] = max(best.get(rate["preset"], own), own, key=lambda pair: pair[0])
    return best


def choose_size(rates: Mapping[str, tuple[float, int | None]], seconds: float) -> tuple[str, dict[str, Any]]:
    """
    The network and the steps that fit: the paper's network where it gets steps enough, at its batch of 4,096 images.

    Then more copies of an image, up to the paper's 32, as long as 400 steps are left; and never more than its 2,200.
    """
    name = "small"
    if "paper" in rates and rates["paper"][0] * seconds / BATCH >= FEWEST_STEPS:
        name = "paper"
    rate, physical = rates[name]
    rows = rate * seconds
    copies = max([k for k in (1, 2, 4, 8, 16, 32) if rows / (BATCH * k) >= 400], default=1)
    steps = max(20, min(MOST_STEPS, int(rows / (BATCH * copies))))
    # At 120 steps the preset's. By a random walk, noise moves each weight as far; the average is of as large a part.
    rate_of_learning = rounded(1.5e-3 * (120 / steps) ** 0.5, 2)
    return name, {
        "expected_batch_size": BATCH,
        "noise_multiplicity": copies,
        "num_dp_steps": steps,
        "max_physical_batch_size": physical,
        "dp_learning_rate": rate_of_learning,
        "dp_ema_decay": rounded(1 - 5 / steps),
    }


def base_config(bench: Bench, network: str) -> CurriculumConfig:
    """What the size does not change."""
    if bench.tiny:
        changes = {"dataset_name": "digits", "public_dataset_size": 1437, "expected_batch_size": 60}
        changes["num_inference_steps"] = 2
    else:
        changes = {"dataset_name": bench.data, "num_inference_steps": 18, "pretrain_batch_size": 256}
        changes |= NETWORKS[network]
    kept = {"seed": 0, "sample_steps": 0, "checkpointing_steps": 100, "checkpoints_total_limit": 1}
    return bench.config("small", **changes, **kept)


def _flat(config: CurriculumConfig) -> dict[str, Any]:
    return {name: value for section in config.to_dict().values() for name, value in section.items()}


def pretraining_seconds(bench: Bench, config: CurriculumConfig, network: str) -> float:
    """Of one step on images that are there, random ones."""
    unet = bench.network(network)
    side = config.data.resolution
    images = torch.rand(1000, 1, side, side, device=bench.device)
    labels = torch.arange(1000, device=bench.device) % NUM_CLASSES
    generator = torch.Generator(bench.device).manual_seed(0)

    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(1000, (count,), generator=generator, device=bench.device)
        return images[rows], labels[rows]

    steps = 3 if bench.tiny else 20
    learn = functools.partial(
        pretrain, unet, draw, config, generator=generator, num_steps=steps, disable_progress_bar=True
    )
    learn()
    synchronize(bench.device)
    start = time.perf_counter()
    learn()
    synchronize(bench.device)
    return (time.perf_counter() - start) / steps


def lesson_seconds(bench: Bench, config: CurriculumConfig) -> float:
    """Of the release of the lesson, by that of a tenth as many random images."""
    side, count = config.data.resolution, 200 if bench.tiny else 6000
    names = tuple(str(index) for index in range(NUM_CLASSES))
    pixels = torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8)
    private = PrivateImages(pixels, torch.arange(count) % NUM_CLASSES, names)
    start = time.perf_counter()
    find_lesson("moments").release(private, config, count, secret_generator(config, bench.device))
    return 10 * (time.perf_counter() - start)


def with_options(config: CurriculumConfig, options: str) -> CurriculumConfig:
    """The configuration with options of the command line on top."""
    if not options:
        return config
    given = options.split()
    _, changed = parse_config(config_parser("train", None), given)
    names = {part.removeprefix("--").split("=")[0] for part in given if part.startswith("--")}
    return config.replace(**{name: value for name, value in _flat(changed).items() if name in names})


@contextmanager
def stopped_in_good_order(seconds: float) -> Iterator[None]:
    """As by Ctrl-C once the time is over: the step under way is finished, and the model is saved."""

    def stop(signum: int, frame: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    start = time.monotonic()
    try:
        yield
    except KeyboardInterrupt as error:
        raise RuntimeError("the training was stopped ahead of its first step") from error
    finally:
        signal.signal(signal.SIGALRM, handler)
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, max(1.0, left - time.monotonic() + start), interval)
        else:
            signal.setitimer(signal.ITIMER_REAL, 0)


def train(config: CurriculumConfig, folder: Path) -> tuple[CurriculumResult, dict[str, Any]]:
    """A whole run, and what it spent and took."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.time()
    result = run_curriculum(config, output_dir=folder)
    ended = time.time()
    report = json.loads((folder / "privacy.json").read_text())
    lessons = sorted(path.stat().st_mtime for path in folder.rglob("after-*.png"))
    checkpoints = sorted(path.stat().st_mtime for path in folder.rglob("checkpoints/*/*"))
    hard = checkpoints[-1] - lessons[-1] if lessons and checkpoints else None
    steps = sum(row["num_steps"] for row in report["mechanisms"] if row["name"] == DP_SGD)
    options = config.dp_sgd
    rows = steps * options.expected_batch_size * options.noise_multiplicity
    return result, {
        "finished": result.finished,
        "epsilon": report["epsilon"],
        "delta": report["delta"],
        "statement": result.report.statement(),
        "mechanisms": report["mechanisms"],
        "s": round(ended - start, 1),
        "s of reading and lesson": round(lessons[-1] - start, 1) if lessons else None,
        "s of DP-SGD": None if hard is None else round(hard, 1),
        "rows of DP-SGD": rows,
        "rows/s of DP-SGD": None if not hard or hard <= 0 else round(rows / hard),
    }


def _changes(config: CurriculumConfig) -> dict[str, Any]:
    """What a configuration has that the defaults have not."""
    defaults = _flat(CurriculumConfig())
    return {name: value for name, value in _flat(config).items() if value != defaults[name] and name != "dataset_name"}


def reading(bench: Bench) -> Found:
    """Seconds for the test images, of which the workers start meanwhile."""
    config = base_config(bench, "small").data
    for name in ("first", "again"):
        start = time.perf_counter()
        images = load_images(config, "test")
        yield f"test images, {name}", {"images": len(images), "s": rounded(time.perf_counter() - start, 3)}


def rehearsal(bench: Bench) -> Found:
    """Everything of a training and an evaluation in a few steps, on the test images: does it run here at all?"""
    config = base_config(bench, "paper").replace(
        dataset_split="test",
        public_dataset_size=360 if bench.tiny else 10_000,
        pretrain_steps=5,
        num_dp_steps=3,
        expected_batch_size=60 if bench.tiny else 1000,
        num_inference_steps=2,
        max_physical_batch_size=64 if bench.tiny else 1024,
    )
    result, facts = train(config, bench.runs / "rehearsal")
    yield "training", facts
    start = time.perf_counter()
    yield "evaluation", {**_evaluated(bench, result.pipeline, 200, 1), "s": round(time.perf_counter() - start, 1)}


def training(bench: Bench) -> Found:
    """A training at epsilon 1 in the size that fits."""
    rates = measured_rates(bench.found("rates"))
    if not rates:
        raise RuntimeError("no rate was measured: make the slice `rates` first")
    kept = EVALUATION_SECONDS if "evaluation" in bench.options["slices"] and not bench.tiny else 0
    fixed = 0 if bench.tiny else FIXED_SECONDS
    lesson = lesson_seconds(bench, base_config(bench, "small"))
    whole = max(bench.left() - kept - fixed - lesson, 1.0)
    network, size = choose_size(rates, whole * (1 - PRETRAINING_SHARE) * MARGIN)
    config = base_config(bench, network)
    step = pretraining_seconds(bench, config, network)
    size["pretrain_steps"] = max(10, min(3000, int(whole * PRETRAINING_SHARE * MARGIN / step)))
    if bench.tiny:
        size |= {"num_dp_steps": 2, "pretrain_steps": 5, "expected_batch_size": 60}
    config = with_options(config.replace(**size), bench.options.get("train_options", ""))
    facts = {"network": network, "rows/s": rates[network][0], "s for it": round(whole)}
    facts |= {"s of the lesson": rounded(lesson), "s of a lesson's step": rounded(step)}
    yield "chosen", {**facts, "options": _changes(config)}
    with stopped_in_good_order(bench.left() - kept - fixed / 3):
        _, found = train(config, bench.runs / "training")
    yield "training", found


def _evaluated(bench: Bench, pipeline: DPCurriculumPipeline, num_images: int, num_seeds: int) -> dict[str, Any]:
    """The package's evaluation by test images, and a sheet of the first images of each class."""
    pipeline = pipeline.to(bench.device)
    pipeline.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    images, labels = sample_images(pipeline, num_images)
    seconds = time.perf_counter() - start
    shown = torch.cat([images[labels == label][:SHEET_COLUMNS] for label in range(NUM_CLASSES)])
    save_sheet(shown, bench.folder / "gpu_samples.png", columns=SHEET_COLUMNS)
    reference = load_images(base_config(bench, "small").data, "test")
    evaluation = evaluate_images(
        images,
        labels,
        reference,
        reference_name="test images",
        classifiers=("logistic",) if bench.tiny else ("cnn",),
        num_seeds=num_seeds,
        reference_network=SmallCNN(1, TINY["resolution"], NUM_CLASSES).eval() if bench.tiny else None,
        device=bench.device,
    )
    metrics = {m.name: {"value": rounded(m.value), "spread": m.spread} for m in evaluation.metrics}
    steps = (pipeline.config.sampling or {}).get("num_inference_steps")
    return {"images": num_images, "s of sampling": round(seconds, 1), "num_inference_steps": steps, "metrics": metrics}


def evaluation(bench: Bench) -> Found:
    """Accuracy of a CNN that was trained on generated images, and distances from real ones."""
    folder = bench.runs / "training"
    if not (folder / "model_index.json").exists():
        raise RuntimeError("there is no training to evaluate")
    count = 200 if bench.tiny else bench.options["num_images"]
    yield "evaluation", _evaluated(bench, DPCurriculumPipeline.from_pretrained(folder), count, 1 if bench.tiny else 3)


TRAINING_SLICES: dict[str, Callable[[Bench], Found]] = {
    "reading": reading,
    "rehearsal": rehearsal,
    "training": training,
    "evaluation": evaluation,
}
