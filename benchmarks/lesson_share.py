"""How much of the budget should the lessons get? Quality of the digits over `--lesson_budget_share`.

    python benchmarks/lesson_share.py --epsilons 10 2 --shares 0.005 0.02 0.05 0.2 0.5 --runs 3

Each run trains as `benchmarks/digits_mean.yaml` with fewer steps, on one thread. The accuracy is that of a
logistic regression that is trained on generated digits and tested on held-out ones, the loss that of denoising them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from resume_quality import quality

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.training.curriculum import run_curriculum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[10, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.005, 0.02, 0.05, 0.2, 0.5])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pretrain_steps", type=int, default=600)
    parser.add_argument("--pretrain_patience", type=int)
    parser.add_argument("--num_dp_steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lesson_share.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = CurriculumConfig.from_yaml("benchmarks/digits_mean.yaml").replace(
        pretrain_steps=given.pretrain_steps,
        pretrain_patience=given.pretrain_patience,
        num_dp_steps=given.num_dp_steps,
        noise_multiplicity=2,
        sample_steps=0,
    )
    rows, cells = digits_dataset(), []
    for seed in range(given.runs):  # whole sweeps first: one that is cut short is a sweep of fewer seeds
        for epsilon in given.epsilons:
            for share in given.shares:
                config = base.replace(seed=seed, target_epsilon=epsilon, lesson_budget_share=share)
                with tempfile.TemporaryDirectory() as name:
                    result = run_curriculum(config, rows, output_dir=Path(name) / "run")
                    found = quality(Path(name) / "run", config)
                noise = [row["noise_multiplier"] for row in result.report.fields["mechanisms"]]
                cells.append({"epsilon": epsilon, "share": share, "seed": seed, "noise_multipliers": noise, **found})
                print(cells[-1], flush=True)
                given.output.write_text(json.dumps({"table": table(cells, "share"), "cells": cells}, indent=1) + "\n")


def table(cells: list[dict], varied: str) -> list[dict]:
    """Mean and range over the seeds, for each epsilon and each value of what was varied."""
    rows = []
    for epsilon, value in dict.fromkeys((cell["epsilon"], cell[varied]) for cell in cells):
        same = [cell for cell in cells if (cell["epsilon"], cell[varied]) == (epsilon, value)]
        row = {"epsilon": epsilon, varied: value, "runs": len(same)}
        for metric in ("accuracy", "loss"):
            values = [cell[metric] for cell in same]
            row[metric] = {"mean": statistics.mean(values), "least": min(values), "most": max(values)}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
