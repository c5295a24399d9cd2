"""What interruptions cost: loss and sample quality of runs that were killed and resumed, beside those that were not.

    python benchmarks/resume_quality.py --runs 4 --output benchmarks/results/resume_quality.json

Each interrupted run is killed three times, at random noisy steps, and goes on. Charged steps that a kill loses are not
taken again, so it ends with fewer steps at the same epsilon. The loss is on held-out digits; the accuracy is that of a
logistic regression that is trained on generated digits and tested on held-out ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset, open_rows, read_images, to_unit_range
from dp_curriculum.diffusion.edm import edm_loss
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.evaluation.evaluation import sample_images
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.training.curriculum import run_curriculum


KILLS = 3


def train(config: CurriculumConfig, folder: Path, kills: list[int]) -> int:
    """Trains in processes, of which all but the last die before the given noisy steps; returns the steps taken."""
    rows, log = digits_dataset(), folder.with_name(folder.name + ".steps")
    for kill in [*kills, None]:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            step = DPTrainer.step

            def counted(self: DPTrainer, kill: int | None = kill, step: Any = step) -> None:
                if kill is not None and self.num_steps_taken >= kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                step(self)
                log.write_text(str(self.num_steps_taken))

            DPTrainer.step = counted  # type: ignore[method-assign]
            run_curriculum(config, rows, output_dir=folder, resume_from_checkpoint="latest")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if kill is None and status != 0:
            raise SystemExit(f"a run ended with status {status}")
    return int(log.read_text())


def quality(folder: Path, config: CurriculumConfig) -> dict[str, float]:
    """Denoising loss and accuracy on held-out digits."""
    pipeline = DPCurriculumPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    held_out = read_images(open_rows(digits_dataset("test"), config.data), config.data)
    images, labels = to_unit_range(held_out.images), held_out.labels
    generator = torch.Generator().manual_seed(0)
    losses = []
    with torch.no_grad():
        for _ in range(8):
            noise = torch.randn(images.shape, generator=generator)
            sigma = (-1.2 + 1.2 * torch.randn(len(images), generator=generator)).exp()
            losses.append(edm_loss(pipeline.unet, images * 2 - 1, noise, sigma, labels).mean())
    generated, classes = sample_images(pipeline, 1000)
    model = LogisticRegression(max_iter=200).fit(generated.flatten(1).numpy(), classes.numpy())
    accuracy = float((model.predict(images.flatten(1).numpy()) == labels.numpy()).mean())
    return {"loss": float(torch.stack(losses).mean()), "accuracy": accuracy}


def draw_figure(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """One point a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(6, 2.6), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy")):
        for place, runs in enumerate(found.values()):
            values = [run[name] for run in runs]
            axis.plot([place] * len(values), values, "o", alpha=0.6)
            axis.plot([place - 0.15, place + 0.15], [np.mean(values)] * 2, "k-")
        axis.set_xticks(range(len(found)), list(found))
        axis.set_xlim(-0.5, len(found) - 0.5)
        axis.set_title(f"{name} on held-out digits", fontsize=9)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain_steps", type=int, default=300)
    parser.add_argument("--num_dp_steps", type=int, default=60)
    parser.add_argument("--output", default="benchmarks/results/resume_quality.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng, config = random.Random(given.seed), CurriculumConfig.from_yaml("benchmarks/digits_mean.yaml")
    config = config.replace(
        pretrain_steps=given.pretrain_steps, num_dp_steps=given.num_dp_steps, checkpointing_steps=2, sample_steps=0,
        noise_multiplicity=2,
    )  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {"uninterrupted": [], "killed 3 times": []}
    with tempfile.TemporaryDirectory() as name:
        for index in range(given.runs):
            for kind, kills in (
                ("uninterrupted", []),
                ("killed 3 times", sorted(rng.sample(range(1, given.num_dp_steps - 4 * KILLS), KILLS))),
            ):
                folder = Path(name) / f"{kind.split()[0]}-{index}"
                steps = train(config, folder, kills)
                report = json.loads((folder / "privacy.json").read_text())
                row = {**quality(folder, config), "noisy_steps": steps, "epsilon": report["epsilon"]}
                found[kind].append(row)
                print(kind, row, flush=True)
    result: dict[str, Any] = {"num_dp_steps": given.num_dp_steps, "checkpointing_steps": 2, "runs": found}
    for metric in ("loss", "accuracy"):
        groups = [np.array([run[metric] for run in runs]) for runs in found.values()]
        spread = float(np.sqrt((groups[0].var(ddof=1) + groups[1].var(ddof=1)) / given.runs))
        result[metric] = {
            "uninterrupted": float(groups[0].mean()), "killed": float(groups[1].mean()),
            "difference_in_standard_errors": float((groups[1].mean() - groups[0].mean()) / spread),
        }  # fmt: skip
    output = Path(given.output)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw_figure(found, output.with_suffix(".png"))
    print(json.dumps({metric: result[metric] for metric in ("loss", "accuracy")}, indent=2))


if __name__ == "__main__":
    main()
