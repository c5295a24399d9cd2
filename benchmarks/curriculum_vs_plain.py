"""Does the curriculum pay? Images of the curriculum beside those of plain DP-SGD, at equal epsilon and equal compute.

    python benchmarks/curriculum_vs_plain.py --data mnist=PATH fashion-mnist=PATH --runs RUNS --jobs 2
    python benchmarks/curriculum_vs_plain.py --data mnist=PATH --runs RUNS --epsilons 1 --methods curriculum --seeds 0
    python benchmarks/curriculum_vs_plain.py --table

A cell is a dataset, an epsilon, a method and a seed; it takes about half an hour of one core. Each is one training and
one evaluation by the commands that users have, in processes of one thread. Cells that the output file holds are left
alone, and a training that was interrupted goes on from its last checkpoint, so the table can be made in parts.

Methods, all with the preset of their dataset and epsilon, and with the same seed for initial weights and samples:

- curriculum: the preset as it is;
- means: the same with the lesson of DP-FETA, central images, in place of the preset's; the privacy that the lesson
  costs is the same;
- plain: DP-SGD alone, with as many more noisy steps as pretraining has network inputs;
- easy: the lessons alone;
- non-private: as plain, without noise.
"""

from __future__ import annotations

import argparse
import json
import math
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

from dp_curriculum.config import CurriculumConfig


ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "curriculum_vs_plain.json"
METHODS = ("curriculum", "means", "plain", "easy", "non-private")
METRICS = ("accuracy_cnn", "accuracy_logistic", "fd_classifier", "precision", "recall")
EVALUATION = ["--num_images", "5000", "--classifiers", "cnn", "logistic", "--num_seeds", "3"]


class Cell(NamedTuple):
    """One training."""

    dataset: str
    epsilon: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-eps{self.epsilon}-{self.method}-seed{self.seed}"

    @property
    def preset(self) -> Path:
        return ROOT / "examples" / "configs" / f"{self.dataset}-eps{self.epsilon}-cpu.yaml"


def training_options(cell: Cell) -> list[str]:
    """What a method changes of its preset, as options of `dp-curriculum train`."""
    config = CurriculumConfig.from_yaml(cell.preset)
    options = ["--seed", str(cell.seed), "--sample_steps", "0"]
    if cell.method == "means":
        # One query with this noise costs what the two of `moments` cost together.
        noise = config.moment_images.moment_noise_multiplier / math.sqrt(2)
        norm, center = config.moment_images.moment_max_image_norm, config.moment_images.moment_center
        options += ["--stages", "mean", "dp_sgd", "--central_noise_multiplier", f"{noise:.6g}"]
        options += ["--central_max_image_norm", str(norm), "--central_center", str(center)]
    elif cell.method == "easy":
        options += ["--stages", *config.curriculum.lessons]
    elif cell.method in ("plain", "non-private"):
        pretraining, hard = config.pretraining, config.dp_sgd
        inputs = pretraining.pretrain_steps * pretraining.pretrain_batch_size * len(config.curriculum.lessons)
        more = round(inputs / (hard.expected_batch_size * hard.noise_multiplicity))
        options += ["--stages", "dp_sgd", "--num_dp_steps", str(hard.num_dp_steps + more)]
    return options + ["--non_private", "True"] * (cell.method == "non-private")


def measure(cell: Cell, data: Path, runs: Path) -> dict[str, Any]:
    """Trains and evaluates; raises `RuntimeError`, which names the log, where a command fails."""
    folder, options = runs / cell.name, training_options(cell)
    preset = cell.preset.relative_to(ROOT)
    train = ["train", "--config", str(preset), "--dataset_name", str(data), "--output_dir", str(folder), *options]
    evaluate = ["evaluate", str(folder), *EVALUATION]
    seconds = [
        _call([*train, "--resume_from_checkpoint", "latest"], folder.with_suffix(".train.log")),
        _call(evaluate, folder.with_suffix(".evaluate.log")),
    ]
    privacy = json.loads((folder / "privacy.json").read_text())
    found = {row["name"]: row for row in json.loads(_report(folder).read_text())["metrics"]}
    return {
        **cell._asdict(),
        "commands": [" ".join(["dp-curriculum", *_without_paths(part, data, folder)]) for part in (train, evaluate)],
        "spent_epsilon": privacy["epsilon"],
        "mechanisms": privacy["mechanisms"],
        "processor_seconds": {"train": round(seconds[0]), "evaluate": round(seconds[1])},
        "metrics": {name: {"value": found[name]["value"], "spread": found[name]["spread"]} for name in METRICS},
    }


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
    """Mean and standard deviation over the seeds, as Markdown."""
    yield "| dataset | epsilon | method | seeds | CNN accuracy, % | logistic, % | Fréchet distance, CNN features |"
    yield "|---|---|---|---|---|---|---|"
    order = sorted(cells.values(), key=lambda cell: (cell["dataset"], float(cell["epsilon"])))
    groups = dict.fromkeys((cell["dataset"], cell["epsilon"]) for cell in order)
    for dataset, epsilon in groups:
        for method in METHODS:
            same = [c for c in order if (c["dataset"], c["epsilon"], c["method"]) == (dataset, epsilon, method)]
            if same:
                shown = (("accuracy_cnn", 100), ("accuracy_logistic", 100), ("fd_classifier", 1))
                means = " | ".join(_mean(same, metric, scale) for metric, scale in shown)
                yield f"| {dataset} | {epsilon} | {method} | {len(same)} | {means} |"


def _mean(cells: list[dict[str, Any]], metric: str, scale: float) -> str:
    values = [scale * cell["metrics"][metric]["value"] for cell in cells]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH", help="Folders or Hub ids of datasets.")
    parser.add_argument("--epsilons", nargs="+", default=["10", "1"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of the trainings and their logs.")
    parser.add_argument("--jobs", type=int, default=1, help="Cells at once; each has one thread.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--table", action="store_true", help="Print the table of the output file, and measure nothing."
    )
    given = parser.parse_args()
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    results = json.loads(given.output.read_text()) if given.output.exists() else {"machine": machine, "cells": {}}
    data = dict(pair.split("=", 1) for pair in given.data)
    cells = [
        Cell(dataset, epsilon, method, seed)
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
            partial = given.output.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(given.output)
        accuracy, distance = (found["metrics"][name]["value"] for name in ("accuracy_cnn", "fd_classifier"))
        print(f"{cell.name}: {accuracy:.4f}, {distance:.1f}, {time.monotonic() - start:.0f} s", flush=True)

    if not given.table:
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(one, [cell for cell in cells if cell.name not in results["cells"]]))
    print("\n".join(table(results["cells"])))


if __name__ == "__main__":
    main()
