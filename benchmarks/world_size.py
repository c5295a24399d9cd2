"""Does the number of processes change the images? Loss and sample quality of runs on one, two and three of them.

    python benchmarks/world_size.py --processes 1 2 3 --runs 4 --output benchmarks/results/world_size.json

Each run is `dp-curriculum train` on gloo processes of this machine, on the embedded digits, with noise of its own. The
loss is on held-out digits; the accuracy is that of a logistic regression that is trained on generated digits and
tested on held-out ones. That sums and noise follow the same law is shown in tests/runtime/test_processes.py; this is
what it is for.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from resume_quality import draw_figure, quality

from dp_curriculum.config import CurriculumConfig


def train(config: Path, folder: Path, num_processes: int) -> None:
    """Runs `dp-curriculum train` on connected processes of one thread each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "dp_curriculum.cli", "train", f"--config={config}", f"--output_dir={folder}"]
    children = []
    for rank in range(num_processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if num_processes > 1:
            environment |= {
                "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes),
            }  # fmt: skip
        with folder.with_name(f"{folder.name}-{rank}.log").open("w") as log:
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    if sum(child.wait() != 0 for child in children):
        raise SystemExit(folder.with_name(f"{folder.name}-0.log").read_text()[-2000:])


def differences(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Means, and how far they are from those of one process, in standard errors."""
    first, result = next(iter(found.values())), {}
    for metric in ("loss", "accuracy"):
        base = np.array([run[metric] for run in first])
        result[metric] = {}
        for name, runs in found.items():
            values = np.array([run[metric] for run in runs])
            error = np.sqrt(values.var(ddof=1) / len(values) + base.var(ddof=1) / len(base))
            result[metric][name] = {
                "mean": float(values.mean()),
                "standard_deviation": float(values.std(ddof=1)),
                "standard_errors_from_the_first": float((values.mean() - base.mean()) / error),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--pretrain_steps", type=int, default=300)
    parser.add_argument("--num_dp_steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/world_size.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = CurriculumConfig.from_yaml("benchmarks/digits_mean.yaml").replace(
        pretrain_steps=given.pretrain_steps, num_dp_steps=given.num_dp_steps, noise_multiplicity=2, sample_steps=0
    )
    found: dict[str, list[dict[str, float]]] = {f"P = {count}": [] for count in given.processes}
    with tempfile.TemporaryDirectory() as name:
        for index in range(given.runs):
            seeded, path = config.replace(seed=index), Path(name) / f"{index}.yaml"
            seeded.to_yaml(path)
            for count, runs in zip(given.processes, found.values()):
                folder = Path(name) / f"{count}-{index}"
                train(path, folder, count)
                epsilon = json.loads((folder / "privacy.json").read_text())["epsilon"]
                runs.append({**quality(folder, seeded), "epsilon": epsilon})
                print(count, runs[-1], flush=True)
    result = {"num_dp_steps": given.num_dp_steps, "runs": found, **differences(found)}
    given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw_figure(found, given.output.with_suffix(".png"))
    print(json.dumps({metric: result[metric] for metric in ("loss", "accuracy")}, indent=2))


if __name__ == "__main__":
    main()
