"""One thread and all, alone and beside a busy process, with threads that wait spinning or asleep.

    python benchmarks/cpu_threads.py --out benchmarks/results/cpu_threads.json

Each process measures one thread and all of them in turn; the processes of each way to wait alternate. Ratios are of
medians; below 1, the second thread pays. The load average tells what else the machine did.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dp_curriculum.runtime.cores import usable_cores


CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
POLICIES = {
    "spinning, as torch does": {},
    "asleep": {"OMP_WAIT_POLICY": "passive"},
    "soon asleep, as dp-curriculum does": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"},
}


def parts() -> dict[str, Callable[[], object]]:
    """What is measured: a noisy step of two presets in one physical batch, sampling, and training a classifier."""
    import torch

    from dp_curriculum.config import CurriculumConfig
    from dp_curriculum.data.images import PrivateImages
    from dp_curriculum.diffusion.edm import build_unet
    from dp_curriculum.dp_sgd.trainer import DPTrainer
    from dp_curriculum.evaluation.classifiers import train_cnn
    from dp_curriculum.privacy.randomness import SecretGenerator

    def trainer(preset: str, rows: int) -> DPTrainer:
        config = CurriculumConfig.from_yaml(CONFIGS / f"{preset}.yaml").replace(mixed_precision="no")
        side = config.data.resolution
        unet = build_unet(config.model, resolution=side, num_channels=1, num_classes=10)
        images = rows // config.dp_sgd.noise_multiplicity
        pixels = torch.randint(256, (images, 1, side, side), dtype=torch.uint8)
        private = PrivateImages(pixels, torch.arange(images) % 10, tuple("0123456789"))
        options = {"noise_multiplier": 1.0, "sample_rate": 1.0, "divisor": float(images)}
        return DPTrainer(unet, private, config, secret=SecretGenerator(), **options)

    mnist, demo = trainer("mnist-eps1-cpu", 128), trainer("digits-demo", 32)
    images, labels = torch.rand(512, 1, 28, 28), torch.arange(512) % 10
    sample = torch.no_grad()(lambda: mnist.unet(torch.zeros(64, 1, 28, 28), 1.0, class_labels=labels[:64]))
    return {
        "noisy step, mnist-eps1-cpu, 128 rows": mnist.step,
        "noisy step, digits-demo, 32 rows": demo.step,
        "sampling, 64 images": sample,
        "classifier, 10 steps": functools.partial(train_cnn, images, labels, num_classes=10, num_steps=10),
    }


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each part on one thread and on all, in turn."""
    import torch

    from dp_curriculum.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    counts = (1, usable_cores())
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, compute in parts().items():
        compute()
        seconds[name] = {str(count): [] for count in counts}
        for turn in range(rounds):
            for count in counts if turn % 2 else counts[::-1]:
                torch.set_num_threads(count)
                start = time.perf_counter()
                compute()
                seconds[name][str(count)].append(time.perf_counter() - start)
    return seconds


def measured_apart(policy: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """[`measure`] in a process of its own: OpenMP reads how to wait once."""
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, __file__, "--measure", "--rounds", str(rounds)]
    done = subprocess.run(command, env={**clean, **POLICIES[policy]}, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summary(tries: list[dict[str, dict[str, list[float]]]]) -> dict[str, dict[str, float]]:
    """Median seconds of each part by number of threads, and the ratio of all threads to one."""
    found = {}
    for name, by_count in tries[0].items():
        medians = {c: statistics.median([s for one in tries for s in one[name][c]]) for c in by_count}
        one, most = medians["1"], medians[max(medians, key=int)]
        found[name] = {**{f"{c} threads": round(m, 4) for c, m in medians.items()}, "ratio": round(most / one, 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.rounds)))
        return
    results: dict[str, object] = {"cores": usable_cores(), "command": "python benchmarks/cpu_threads.py"}
    for place in ("alone", "beside one busy process"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if place != "alone" else None
        tries: dict[str, list[dict[str, dict[str, list[float]]]]] = {policy: [] for policy in POLICIES}
        try:
            for _ in range(given.repeats):
                for policy in POLICIES:
                    tries[policy].append(measured_apart(policy, given.rounds))
        finally:
            if busy is not None:
                busy.kill()
                busy.wait()
        results[place] = {policy: summary(found) for policy, found in tries.items()}
        results[f"{place}, load average"] = round(os.getloadavg()[1], 1)
    text = json.dumps(results, indent=2) + "\n"
    print(text)
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
