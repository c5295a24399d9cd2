"""The time that a plan announces, beside the time that the run then takes, in one process.

    python benchmarks/plan_accuracy.py --preset mnist-eps1-cpu --data /path/to/mnist --fraction 0.05
    python benchmarks/plan_accuracy.py --preset digits-demo --cpu_time

`--fraction` scales the steps of pretraining and of DP-SGD. `--cpu_time` counts seconds of the processor on one thread,
which other programs on the machine hardly change; the decoding processes are then left out on both sides. `ratio` is
planned / taken.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from dp_curriculum.commands.plan import public_shape
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.runtime import threads
from dp_curriculum.runtime.allocator import keep_freed_memory
from dp_curriculum.training import cost_estimate
from dp_curriculum.training.cost_estimate import estimate_cost
from dp_curriculum.training.curriculum import run_curriculum


CONFIGS = Path(__file__).parents[1] / "examples" / "configs"


def scaled(config: CurriculumConfig, fraction: float) -> CurriculumConfig:
    """The configuration with a share of its steps."""
    steps = {"pretrain_steps": config.pretraining.pretrain_steps, "num_dp_steps": config.dp_sgd.num_dp_steps}
    return config.replace(**{name: max(1, round(fraction * count)) for name, count in steps.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mnist-eps1-cpu")
    parser.add_argument("--data", help="Name or folder of the dataset. Defaults to that of the preset.")
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--cpu_time", action="store_true")
    given = parser.parse_args()
    config = scaled(CurriculumConfig.from_yaml(CONFIGS / f"{given.preset}.yaml"), given.fraction)
    if given.data is not None:
        config = config.replace(dataset_name=given.data)
    clock = time.perf_counter
    if given.cpu_time:
        clock = time.process_time
        config = config.replace(cpu_threads=1)
        for module in (cost_estimate, threads):
            module.time = _ProcessorTime  # type: ignore[attr-defined]
    if config.runtime.mixed_precision == "bf16":
        config = config.replace(mixed_precision="no")
    size, num_classes = public_shape(config)
    keep_freed_memory()
    start = clock()
    cost = estimate_cost(config, num_classes=num_classes, dataset_size=size, device=torch.device("cpu"))
    planning = clock() - start
    with tempfile.TemporaryDirectory() as folder:
        start = clock()
        run_curriculum(config, output_dir=Path(folder) / "run")
        taken = clock() - start
    planned = cost.seconds - (cost.reading_seconds if given.cpu_time else 0.0)
    parts = {name: value for name, value in vars(cost).items() if name.endswith("_seconds")}
    found = {"planning": planning, "planned": planned, "taken": taken, "ratio": planned / taken, **parts}
    facts = {"threads": cost.num_threads, "load_average": os.getloadavg()[0]}
    print(json.dumps({**vars(given), **{name: round(value, 3) for name, value in (facts | found).items()}}, indent=2))


class _ProcessorTime:
    perf_counter = staticmethod(time.process_time)


if __name__ == "__main__":
    main()
