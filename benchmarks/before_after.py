"""Wall-clock time of a preset in two versions of the source tree, in alternating order.

    python benchmarks/before_after.py --before ../before --after . --data /path/to/mnist --output ratios.json
    python benchmarks/before_after.py --before ../before --after . --data /path/to/mnist --fraction 0.02 --processes 2

Each part is a separate process, as a user starts it:

- `read`: the training images into memory, without the imports;
- `train`: the preset under `accelerate launch`, from the images to the sample sheets;
- `sample`: `--num_images` images of the model that this version trained.

`--fraction` scales the steps of pretraining and of DP-SGD. Reading and queries stay whole, so that the ratio of a
small fraction is mostly theirs. Ratios are after / before. Run it on an idle machine: the load average of
each pair is in the output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml


# Both versions have these names.
_READ = """
import sys, time
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import load_images
data = CurriculumConfig.from_yaml(sys.argv[1]).replace(dataset_name=sys.argv[2]).data
start = time.perf_counter()
load_images(data)
print(time.perf_counter() - start)
"""
_LAUNCH = "-m accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no --num_processes"
_SHEET_STEPS = 100
_OF_USER = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "ACCELERATE_USE_CPU")


class Version:
    """
    One version of the source tree.

    Args:
        tree (`Path`): Its root.
        scratch (`Path`): A folder for what it writes.
        given (`argparse.Namespace`): The options of this benchmark.
        processes (`int`): Processes that a training is launched with.
    """

    def __init__(self, tree: Path, scratch: Path, given: argparse.Namespace, processes: int) -> None:
        self.tree, self.scratch, self.given, self.processes = tree.resolve(), scratch, given, processes
        scratch.mkdir()
        self.preset = self.tree / "examples" / "configs" / f"{given.preset}.yaml"
        self.settings = yaml.safe_load(self.preset.read_text(encoding="utf-8"))

    def read(self) -> float:
        """Seconds to read the images, as the process itself measures them."""
        return float(self._run("-c", _READ, str(self.preset), self.given.data).splitlines()[-1])

    def train(self) -> float:
        """Seconds of a training from start to exit."""
        script = self.tree / "examples" / "train_dp_curriculum.py"
        options = {"config": self.preset, "output_dir": self.scratch / "run", "dataset_name": self.given.data}
        if self.given.fraction != 1:
            for section, name in (("pretraining", "pretrain_steps"), ("dp_sgd", "num_dp_steps")):
                options[name] = max(1, round(self.given.fraction * self.settings[section][name]))
            options["sample_steps"] = max(1, round(self.given.fraction * _SHEET_STEPS))
        flags = [f"--{name}={value}" for name, value in options.items()]
        shutil.rmtree(self.scratch / "run", ignore_errors=True)
        launch = [*_LAUNCH.split(), str(self.processes), *(["--multi_gpu"] if self.processes > 1 else [])]
        return self._timed(*launch, str(script), *flags)

    def sample(self) -> float:
        """Seconds of `dp-curriculum sample`, from start to exit."""
        run, folder = self.scratch / "run", self.scratch / "sampled"
        if not run.is_dir():
            raise SystemExit("Expected --parts to have train before sample.")
        shutil.rmtree(folder, ignore_errors=True)
        flags = (f"--output_dir={folder}", f"--num_images={self.given.num_images}")
        return self._timed("-m", "dp_curriculum.cli", "sample", str(run), *flags)

    def _timed(self, *arguments: str) -> float:
        start = time.perf_counter()
        self._run(*arguments)
        return time.perf_counter() - start

    def _run(self, *arguments: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name not in _OF_USER}
        environment["PYTHONPATH"] = str(self.tree / "src")
        if self.processes > 1:
            environment["ACCELERATE_USE_CPU"] = "true"
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.scratch, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{self.tree}: exit status {done.returncode}\n{done.stdout}{done.stderr}"[-4000:])
        return done.stdout


def compare(versions: dict[str, Version], parts: list[str], repeats: int) -> list[dict[str, Any]]:
    """Seconds of each part and version; every second pair begins with the new version."""
    found: list[dict[str, Any]] = []
    for turn in range(repeats):
        for part in parts:
            order = list(versions) if turn % 2 == 0 else list(versions)[::-1]
            pair: dict[str, Any] = {"part": part, "order": " ".join(order)}
            for name in order:
                pair[name] = round(getattr(versions[name], part)(), 2)
            pair |= {"ratio": round(pair["after"] / pair["before"], 3), "load_average": round(os.getloadavg()[0], 1)}
            print(json.dumps(pair), flush=True)
            found.append(pair)
    return found


def summary(pairs: list[dict[str, Any]], parts: list[str]) -> dict[str, dict[str, float]]:
    """Per part: the median of the ratios of pairs, and the ratio of the shortest times."""
    ratios = {}
    for part in parts:
        of_part = [pair for pair in pairs if pair["part"] == part]
        shortest = {name: min(pair[name] for pair in of_part) for name in ("before", "after")}
        ratios[part] = {
            **shortest,
            "ratio": round(statistics.median(pair["ratio"] for pair in of_part), 3),
            "ratio_of_shortest": round(shortest["after"] / shortest["before"], 3),
        }
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="Source tree of the old version.")
    parser.add_argument("--after", type=Path, default=Path(__file__).parents[1], help="Source tree of the new one.")
    parser.add_argument("--preset", default="mnist-eps1-cpu", help="Preset that both trees have.")
    parser.add_argument("--data", default="ylecun/mnist", help="Name or folder of the dataset.")
    parser.add_argument("--parts", nargs="+", default=["read", "train", "sample"], choices=["read", "train", "sample"])
    parser.add_argument("--repeats", type=int, default=3, help="Pairs per part.")
    parser.add_argument("--processes", type=int, default=1, help="Processes of a training of the new version.")
    parser.add_argument("--fraction", type=float, default=1.0, help="Share of the steps.")
    parser.add_argument("--num_images", type=int, default=1000, help="Images to sample.")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if Path(given.data).is_dir():
        given.data = str(Path(given.data).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        trees = {"before": given.before, "after": given.after}
        processes = {"before": 1, "after": given.processes}
        versions = {name: Version(tree, Path(scratch) / name, given, processes[name]) for name, tree in trees.items()}
        pairs = compare(versions, given.parts, given.repeats)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"preset": given.preset, "fraction": given.fraction, "cores": cores, "processes": given.processes}
    result = {**facts, "summary": summary(pairs, given.parts), "pairs": pairs}
    print(json.dumps(result["summary"], indent=2))
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
