"""Does the curriculum pay? Images of the curriculum beside those of plain DP-SGD, at equal epsilon and equal compute.

    python benchmarks/curriculum_vs_plain.py --data mnist=PATH fashion-mnist=PATH --runs RUNS --jobs 2
    python benchmarks/curriculum_vs_plain.py --data mnist=PATH --runs RUNS --epsilons 1 --methods curriculum --seeds 0
    python benchmarks/curriculum_vs_plain.py --size small --data mnist=PATH fashion-mnist=PATH --runs RUNS --jobs 2
    python benchmarks/curriculum_vs_plain.py --size small --table

A cell is a dataset, an epsilon, a method and a seed: one training and one evaluation by the commands that users have,
in processes of one thread. In the size of the presets it takes half an hour of a core that computes bfloat16, and
more than an hour of another; with `--size small`, a narrower network that sees a quarter of the images, ten minutes of
any, evaluation included. Cells that the output file holds are left alone, and a training that was interrupted goes on
from its last checkpoint, so the table can be made in parts.

Methods, all with the preset of their dataset and epsilon, and with the same seed for initial weights and samples;
those with lessons give them the same share of the budget and the same number of network inputs. Lessons that are
taught get half of the inputs, and the options that were best for them:

- curriculum: the preset as it is, with the moments in closed form;
- pretrained: the same moments as a lesson that is taught, with half of the network inputs;
- means, mode, frequency: other lessons in place of the preset's; means are those of DP-FETA;
- means-frequency, as in FETA-Pro, and moments-frequency: one lesson after the other;
- mix: moments and frequency at once; means-mix: means and frequency; all-mix: means, moments and frequency;
- any of these with "-alone": without DP-SGD, so that only the lessons' share is spent (a training with DP-SGD also
  shows what its lessons left, as its stages);
- plain: DP-SGD alone, with as many more noisy steps as pretraining has network inputs;
- non-private: as plain, without noise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons.planned import mechanisms_of, plan_lessons
from dp_curriculum.privacy.accounting import calibrate_noise_multiplier


ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
# Lessons of each method in place of the preset's.
LESSONS = {
    "pretrained": ["moments"],
    "means": ["mean"],
    "mode": ["mode"],
    "frequency": ["frequency"],
    "means-frequency": ["mean", "frequency"],
    "moments-frequency": ["moments", "frequency"],
    "mix": ["moments", "frequency"],
    "means-mix": ["mean", "frequency"],
    "all-mix": ["mean", "moments", "frequency"],
}
WITH_LESSONS = ("curriculum", *LESSONS)
METHODS = (*WITH_LESSONS, *(f"{method}-alone" for method in WITH_LESSONS), "plain", "non-private")
METRICS = ("accuracy_cnn", "accuracy_logistic", "fd_classifier", "precision", "recall")
# What lessons that are taught change of a preset in closed form.
TAUGHT = {
    "shortcut": "pretrain",
    "pretrain_learning_rate": 3e-3,
    "pretrain_p_mean": -0.4,
    "dp_learning_rate": 3e-3,
    "dp_p_mean": -0.4,
    "label_dropout": 0.1,
    "guidance_scale": 1.5,
}
# What each size changes of the presets, and how its images are evaluated.
SIZES: dict[str, dict[str, Any]] = {
    "preset": {},
    "small": {
        "lesson_budget_share": 0.05,
        "block_out_channels": [8, 16, 32],
        "expected_batch_size": 1024,
        "num_dp_steps": 80,
        "noise_multiplicity": 1,
        "num_inference_steps": 6,
        "s_churn": 0,
    },
}
EVALUATIONS = {
    "preset": ["--num_images", "5000", "--classifiers", "cnn", "logistic", "--num_seeds", "3"],
    "small": ["--num_images", "2000", "--classifiers", "cnn", "logistic", "--num_seeds", "1"],
}


class Cell(NamedTuple):
    """One training."""

    dataset: str
    epsilon: str
    method: str
    seed: int
    size: str = "preset"

    @property
    def name(self) -> str:
        return f"{self.dataset}-eps{self.epsilon}-{self.method}-seed{self.seed}"

    @property
    def preset(self) -> Path:
        """The preset of this epsilon; where there is none, that of epsilon 1 is changed."""
        folder = ROOT / "examples" / "configs"
        own = folder / f"{self.dataset}-eps{self.epsilon}-cpu.yaml"
        return own if own.exists() else folder / f"{self.dataset}-eps1-cpu.yaml"


def training_options(cell: Cell) -> list[str]:
    """What a size and a method change of their preset, as options of `dp-curriculum train`."""
    preset = CurriculumConfig.from_yaml(cell.preset)
    # One Gaussian per class is what every method takes.
    changes = {"seed": cell.seed, "sample_steps": 0, "moment_components": 1, **SIZES[cell.size]}
    if float(cell.epsilon) != preset.privacy.target_epsilon:
        changes["target_epsilon"] = float(cell.epsilon)
    noise = {"lesson_noise_multiplier": None} if "lesson_budget_share" in changes else {}  # of the preset
    config = preset.replace(**changes, **noise)
    method = cell.method.removesuffix("-alone")
    if method in LESSONS:
        changes |= _other_lessons(config, LESSONS[method], together=method.endswith("mix"))
    elif method in ("plain", "non-private"):
        changes |= {**TAUGHT, "stages": ["dp_sgd"], "num_dp_steps": _steps_of_equal_compute(config)}
    if cell.method.endswith("-alone"):
        changes["stages"] = LESSONS.get(method, config.curriculum.lessons)
        if config.privacy.lesson_noise_multiplier is None:  # what lessons spend where noisy steps follow
            changes["lesson_budget_share"] = config.lesson_share
    if cell.method == "non-private":
        changes["non_private"] = True
    return [part for name, value in changes.items() for part in _as_flag(name, value)]


def _as_flag(name: str, value: Any) -> list[str]:
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def _other_lessons(config: CurriculumConfig, lessons: list[str], *, together: bool) -> dict[str, Any]:
    """Lessons in place of the preset's, at the same cost in privacy and in network inputs: half of them are taught."""
    hard, batch = config.dp_sgd, config.pretraining.pretrain_batch_size
    steps = hard.num_dp_steps // 2 * hard.expected_batch_size * hard.noise_multiplicity // (batch * len(lessons))
    return {
        **TAUGHT,
        "num_dp_steps": hard.num_dp_steps - hard.num_dp_steps // 2,
        "stages": [*lessons, "dp_sgd"],
        "lesson_budget_share": lesson_share(config),
        "pretrain_steps": steps,
        "mix_lessons": together,
    }


def lesson_share(config: CurriculumConfig) -> float:
    """Fraction of the budget that the lessons of a configuration spend."""
    if config.privacy.lesson_noise_multiplier is None:
        return config.lesson_share
    whole = calibrate_noise_multiplier(
        target_epsilon=config.privacy.target_epsilon,
        target_delta=config.privacy.target_delta,
        sample_rate=1.0,
        num_steps=1,
    )
    rows = [row.event for row in mechanisms_of(plan_lessons(config))]
    return float(f"{sum(row.num_steps * (whole / row.noise_multiplier) ** 2 for row in rows):.4g}")


def _steps_of_equal_compute(config: CurriculumConfig) -> int:
    """Noisy steps that call the network as often as the whole curriculum does."""
    pretraining, hard = config.pretraining, config.dp_sgd
    taught = len(config.curriculum.lessons) - config.has_prior
    inputs = pretraining.pretrain_steps * pretraining.pretrain_batch_size * taught
    return hard.num_dp_steps + round(inputs / (hard.expected_batch_size * hard.noise_multiplicity))


def measure(cell: Cell, data: Path, runs: Path) -> dict[str, Any]:
    """Trains and evaluates; raises `RuntimeError`, which names the log, where a command fails."""
    folder, options = runs / cell.name, training_options(cell)
    if torch.cuda.is_available():  # a GPU is idle with the default of 128; the sum is the same
        options += ["--max_physical_batch_size", "1024"]
    preset = cell.preset.relative_to(ROOT)
    train = ["train", "--config", str(preset), "--dataset_name", str(data), "--output_dir", str(folder), *options]
    evaluate = ["evaluate", str(folder), *EVALUATIONS[cell.size], *_lessons_too(cell)]
    seconds = [
        _call([*train, "--resume_from_checkpoint", "latest"], runs / f"{cell.name}.train.log"),
        _call(evaluate, runs / f"{cell.name}.evaluate.log"),
    ]
    privacy = json.loads((folder / "privacy.json").read_text())
    report = json.loads(_report(folder).read_text())
    found = {row["name"]: row for row in report["metrics"]}
    return {
        **cell._asdict(),
        "commands": [" ".join(["dp-curriculum", *_without_paths(part, data, folder)]) for part in (train, evaluate)],
        "spent_epsilon": privacy["epsilon"],
        "mechanisms": privacy["mechanisms"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor_seconds": {"train": round(seconds[0]), "evaluate": round(seconds[1])},
        "metrics": {name: {"value": found[name]["value"], "spread": found[name]["spread"]} for name in METRICS},
        "stages": report["stages"],
    }


def _lessons_too(cell: Cell) -> list[str]:
    """Without DP-SGD, the model is what the lessons left; in the size of the presets their images take too long."""
    return ["--each_stage"] if cell.method in WITH_LESSONS and cell.size == "small" else []


def _report(folder: Path) -> Path:
    return folder / "run" / "evaluation" / "evaluation.json"


def _without_paths(command: list[str], data: Path, folder: Path) -> list[str]:
    return [{str(data): "DATA", str(folder): "OUT"}.get(part, part) for part in command]


def _call(command: list[str], log: Path) -> float:
    """Runs a command of the package on one thread; returns its processor time in seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "dp_curriculum.cli", *command],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}: see {log}")
    return usage.ru_utime + usage.ru_stime


def table(cells: dict[str, Any]) -> Iterator[str]:
    """Mean and standard deviation over the seeds, as Markdown; what lessons left is a row of its own, "-alone"."""
    yield "| dataset | epsilon | method | seeds | CNN accuracy, % | logistic, % | Fréchet distance, CNN features |"
    yield "|---|---|---|---|---|---|---|"
    every = [row for cell in cells.values() for row in (*_before_dp_sgd(cell), cell)]
    # The lessons of a seed count once, also where they were measured with and without the DP-SGD that follows.
    rows = {(row["dataset"], row["epsilon"], row["method"], row["seed"]): row for row in every}
    order = sorted(rows.values(), key=lambda row: (row["dataset"], float(row["epsilon"])))
    groups = dict.fromkeys((row["dataset"], row["epsilon"]) for row in order)
    for dataset, epsilon in groups:
        for method in METHODS:
            same = [r for r in order if (r["dataset"], r["epsilon"], r["method"]) == (dataset, epsilon, method)]
            if same:
                shown = (("accuracy_cnn", 100), ("accuracy_logistic", 100), ("fd_classifier", 1))
                means = " | ".join(_mean(same, metric, scale) for metric, scale in shown)
                yield f"| {dataset} | {epsilon} | {method} | {len(same)} | {means} |"


def _before_dp_sgd(cell: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the lessons of a training left, if that was measured: a row like that of a training without DP-SGD."""
    for left in cell.get("stages", [])[-2:-1]:
        values = {"accuracy_cnn": left["accuracy"], "fd_classifier": left["fd_classifier"]}
        metrics = {name: {"value": value} for name, value in values.items()}
        yield {**cell, "method": f"{cell['method']}-alone", "metrics": metrics}


def _mean(rows: list[dict[str, Any]], metric: str, scale: float) -> str:
    values = [scale * row["metrics"][metric]["value"] for row in rows if metric in row["metrics"]]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH", help="Folders or Hub ids of datasets.")
    parser.add_argument("--epsilons", nargs="+", default=["10", "1"])
    parser.add_argument("--methods", nargs="+", default=["curriculum", "plain"], choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of the trainings and their logs.")
    parser.add_argument("--jobs", type=int, default=1, help="Cells at once; each has one thread.")
    parser.add_argument("--size", default="preset", choices=SIZES)
    parser.add_argument("--output", type=Path, help="Default: a file of each size, in benchmarks/results.")
    parser.add_argument(
        "--table", action="store_true", help="Print the table of the output file, and measure nothing."
    )
    given = parser.parse_args()
    name = "curriculum_vs_plain" + "_small" * (given.size == "small")
    output = given.output or RESULTS / f"{name}.json"
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    results = json.loads(output.read_text()) if output.exists() else {"machine": machine, "cells": {}}
    data = dict(pair.split("=", 1) for pair in given.data)
    cells = [
        Cell(dataset, epsilon, method, seed, given.size)
        for seed in given.seeds
        for method in given.methods
        for epsilon in given.epsilons
        for dataset in data
    ]

    writing = threading.Lock()

    def one(cell: Cell) -> None:
        start = time.monotonic()
        try:
            found = measure(cell, Path(data[cell.dataset]), given.runs)
        except RuntimeError as error:
            print(error, flush=True)
            return
        with writing:
            results["cells"][cell.name] = found
            partial = output.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(output)
        accuracy, distance = (found["metrics"][name]["value"] for name in ("accuracy_cnn", "fd_classifier"))
        print(f"{cell.name}: {accuracy:.4f}, {distance:.1f}, {time.monotonic() - start:.0f} s", flush=True)

    if not given.table:
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(one, [cell for cell in cells if cell.name not in results["cells"]]))
    print("\n".join(table(results["cells"])))


if __name__ == "__main__":
    main()
