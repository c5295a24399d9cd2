"""What does tuning cost, and what does it gain over the recipe of a preset, under one budget?

    python benchmarks/tuning.py --config examples/configs/mnist-eps10-cpu.yaml --data PATH --cell tuned --seed 0 \\
        --vary dp_learning_rate=0.003,0.006 lesson_budget_share=0.1,0.2 --output benchmarks/results/tuning_mnist.json
    python benchmarks/tuning.py --config examples/configs/digits-demo.yaml --cell preset --seed 0 --output RESULT

Three cells per seed, all of them under the target epsilon of the configuration:

- `preset`: the recipe of the configuration, with the whole budget, on all images.
- `tuned`: `dp-curriculum tune` over the settings of `--vary`; a tenth of the images is held out for scores.
- `one_try`: the recipe of the configuration with what a try of that tuning may spend, on the images that a try has.
  Beside `preset` it shows the cost, and beside `tuned` the gain.

Each is measured on the split `test`, which nothing reads before. A cell is added to the results in `--output`, so that
they can be made one at a time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from dp_curriculum import DPCurriculumPipeline
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.reading import load_images
from dp_curriculum.evaluation.evaluation import evaluate_images, sample_images
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.training.curriculum import run_curriculum
from dp_curriculum.training.tuning import tune
from dp_curriculum.training.tuning_plan import TuningOptions, TuningPlan, parse_settings, plan_tuning


CELLS = ("preset", "tuned", "one_try")
HOLDOUT = 0.1


def measure(folder: Path, config: CurriculumConfig, num_images: int) -> dict[str, float]:
    """Utility and fidelity of a finished run, on real images that nothing has read."""
    pipeline = DPCurriculumPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images, labels = sample_images(pipeline, num_images, seed=1_000_000)
    reference = load_images(config.data, "test")
    found = evaluate_images(images, labels, reference, reference_name="test")
    return {name: found.value(name) for name in ("accuracy_cnn", "accuracy_logistic", "fd_classifier")}


def planned(config: CurriculumConfig, given: argparse.Namespace) -> tuple[CurriculumConfig, TuningPlan]:
    """The tuning, and the configuration with held-out images that it is made for."""
    config = config.replace(holdout=HOLDOUT)
    settings = parse_settings(given.vary, None, None)
    expected = len(settings) if given.expected_tries is None else given.expected_tries
    options = TuningOptions(settings, expected, num_images=given.score_images)
    size = config.data.training_size(config.privacy.public_dataset_size or 0)
    return config, plan_tuning(config, options, dataset_size=size, num_classes=10)


def run_cell(config: CurriculumConfig, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains one cell into `folder`, and says what it was."""
    start = time.perf_counter()
    facts: dict[str, Any] = {}
    if given.cell == "preset":
        facts["epsilon"] = run_curriculum(config, output_dir=folder).report.epsilon
    else:
        held, plan = planned(config, given)
        facts |= {"expected_tries": plan.tries and plan.tries.expected, "epsilon_of_a_try": plan.without_tuning}
        facts["seconds_of_planning"] = time.perf_counter() - start
        if given.cell == "tuned":
            facts["epsilon"] = tune(held, plan, output_dir=folder).epsilon
            kept = CurriculumConfig.from_yaml(RunFolder(folder).config).to_dict()
            fields = {name: value for section in kept.values() for name, value in section.items()}
            facts["kept"] = {name: fields[name] for name in plan.options.settings[0]}
        else:
            target = plan.configs[0].privacy.target_epsilon
            facts["epsilon"] = run_curriculum(held.replace(target_epsilon=target), output_dir=folder).report.epsilon
    return {**facts, "seconds_of_training": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", help="Folder of the dataset, in place of the name in the configuration.")
    parser.add_argument("--cell", choices=CELLS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--vary", nargs="+", default=["dp_learning_rate=0.003,0.006", "lesson_budget_share=0.1,0.2"])
    parser.add_argument("--expected_tries", type=float)
    parser.add_argument("--score_images", type=int, default=2000)
    parser.add_argument("--num_images", type=int, default=5000, help="Generated images for the measurement.")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    config = CurriculumConfig.from_yaml(given.config).replace(seed=given.seed, sample_steps=0)
    if given.data is not None:
        config = config.replace(dataset_name=given.data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / given.cell
        cell = run_cell(config, given, folder)
        cell |= measure(folder, config, given.num_images)
    row = {"config": Path(given.config).name, "cell": given.cell, "seed": given.seed, "vary": given.vary, **cell}
    rows = json.loads(given.output.read_text()) if given.output.exists() else []
    given.output.write_text(json.dumps([*rows, row], indent=2) + "\n")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
