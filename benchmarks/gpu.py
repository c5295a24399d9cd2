"""Nine minutes of a GPU: what it can do, what bounds a noisy step, and a training in the size that fits the rest.

    python benchmarks/gpu.py --data MNIST --output gpu.json
    python benchmarks/gpu.py --data MNIST --output gpu.json --resume --seconds 400 --slices rates training evaluation
    python benchmarks/gpu.py --tiny --output gpu.json

A slice that fails, or takes longer than it may, costs nothing but itself. The output is written again after each
figure; with `--resume`, slices that ended are not made again. MNIST is a folder or a Hub id with the splits `train`
and `test`. With `--tiny`, everything runs on a CPU in some seconds, on the embedded digits.

Beside the output lie the tables of the profiler, and a sheet of images of the training. The trained pipeline is in
`--runs`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from gpu_slices import SLICES, Bench, forget, words
from gpu_training import EVALUATION_SECONDS, TRAINING_SLICES
from per_image_gradients import machine


# In this order, and for how many seconds at most. A training has what is left.
LIMITS = {
    "ceilings": 12, "self_check": 25, "weight_gradients": 35, "rates": 35, "reading": 20, "rehearsal": 45,
    "methods": 45, "profile": 25, "fused_variants": 25, "normalization": 10, "compiled": 90,
    "training": float("inf"), "evaluation": EVALUATION_SECONDS,
}  # fmt: skip
ALL_SLICES = {name: {**SLICES, **TRAINING_SLICES}[name] for name in LIMITS}
RESULTS = Path(__file__).parent / "results" / "gpu.json"


class OutOfTime(BaseException):
    """A slice is over. No `Exception`: compilers wrap those in errors of their own."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises [`OutOfTime`] in the block once the time is over, and again every five seconds if that was swallowed."""

    def interrupt(signum: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def short(value: Any) -> str:
    """A figure in a line; of a row of times, the milliseconds."""
    if isinstance(value, dict) and any(isinstance(cell, dict) and "ms" in cell for cell in value.values()):
        cells = {name: cell.get("ms") if isinstance(cell, dict) else cell for name, cell in value.items()}
        return ", ".join(f"{name} {str(cell)[:40]}" for name, cell in cells.items())
    return json.dumps(value)[:400]


def save(bench: Bench, output: Path) -> None:
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(bench.results, indent=1) + "\n")
    partial.replace(output)


def seconds_for(name: str, bench: Bench, later: list[str]) -> float:
    """What a slice may take: its limit, and no time of the training and the evaluation that come later."""
    kept = 0.0 if bench.tiny or "evaluation" not in later else EVALUATION_SECONDS
    kept += 0.0 if bench.tiny or "training" not in later else bench.options["training_seconds"]
    return min(LIMITS[name], bench.left() - kept)


def run_slice(name: str, bench: Bench, output: Path, seconds: float) -> None:
    """Makes one slice; whatever happens is in the output."""
    record: dict[str, Any] = {"found": {}, "ended": False}
    bench.results["slices"][name] = record
    start = time.monotonic()
    try:
        with limited(seconds):
            for key, value in ALL_SLICES[name](bench):
                record["found"][key] = value
                record["seconds"] = round(time.monotonic() - start, 1)
                save(bench, output)
        record["ended"] = True
    except OutOfTime:
        record["error"] = f"took longer than {seconds:.0f} s"
    except Exception as error:  # whatever it is, the other slices are still wanted
        record["error"] = words(error)
        traceback.print_exc()
    record["seconds"] = round(time.monotonic() - start, 1)
    save(bench, output)
    for key, value in record["found"].items():
        print(f"  {key}: {short(value)}")
    print(f"[{time.monotonic() - bench.started:4.0f} s] {name}: {record.get('error', 'ended')}", flush=True)


def is_well(device: torch.device) -> bool:
    """Whether the device still answers; after some failures, no call of this process would."""
    try:
        torch._dynamo.reset()
        forget(device)
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


def begin_again(bench: Bench, later: list[str]) -> None:
    """The slices that are left, in a new process."""
    options = ["--resume", "--seconds", str(max(1.0, bench.left())), "--slices", *later]
    os.execv(sys.executable, [sys.executable, *sys.argv, *options])


def earlier_results(output: Path, resume: bool) -> dict[str, Any]:
    if resume and output.exists():
        return json.loads(output.read_text())
    return {"slices": {}}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--data", default="ylecun/mnist", help="Folder or Hub id of MNIST.")
    result.add_argument("--output", type=Path, default=RESULTS)
    result.add_argument(
        "--runs", type=Path, help="Folder of the trained pipelines; gpu_runs beside --output if unset."
    )
    result.add_argument("--slices", nargs="+", choices=ALL_SLICES, default=list(ALL_SLICES), metavar="SLICE",
                        help=", ".join(ALL_SLICES))  # fmt: skip
    result.add_argument("--seconds", type=float, default=540, help="For everything.")
    result.add_argument("--training_seconds", type=float, default=200, help="Kept for the training, at least.")
    result.add_argument("--train_options", default="", help="Options of `dp-curriculum train` for the training.")
    result.add_argument("--num_images", type=int, default=5000, help="Generated for the evaluation.")
    result.add_argument("--resume", action="store_true", help="Go on with what --output holds.")
    result.add_argument("--quick", action="store_true", help="Only the cells that matter most.")
    result.add_argument("--tiny", action="store_true", help="Tiny sizes, for a test on a CPU.")
    return result


def main() -> int:
    given = parser().parse_args()
    started = time.monotonic()
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    bench = Bench(
        device=device,
        folder=given.output.parent,
        runs=given.runs or given.output.parent / "gpu_runs",
        data=given.data,
        started=started,
        deadline=started + given.seconds,
        tiny=given.tiny,
        quick=given.quick,
        results=earlier_results(given.output, given.resume),
        options=vars(given),
    )
    bench.results["machine"] = machine(str(device), torch.get_num_threads())
    for index, name in enumerate(given.slices):
        if given.resume and bench.results["slices"].get(name, {}).get("ended"):
            continue
        seconds = seconds_for(name, bench, given.slices[index + 1 :])
        if seconds < 2:
            print(f"{name}: no time is left", flush=True)
            continue
        run_slice(name, bench, given.output, seconds)
        later = given.slices[index + 1 :]
        if not is_well(device) and later:
            print("the device no longer answers: a new process goes on", flush=True)
            begin_again(bench, later)
    wanted = [bench.results["slices"].get(name, {}) for name in given.slices]
    return 0 if all(record.get("ended") for record in wanted) else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if code:  # a compiler's threads may be left of a slice that was cut off
        os._exit(code)
