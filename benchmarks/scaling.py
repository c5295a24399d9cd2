"""Time of a noisy step on one process and on several, split into computing and exchanging, and a model of both.

    python benchmarks/scaling.py --processes 1 2 --output benchmarks/results/scaling.json

Processes are gloo ranks on this machine, one thread each. On more processes than cores, they wait for each other's
cores, which no cluster does; on as many as cores, what is measured is the exchange, and memory that they share.
Computing is counted in seconds of the processor, which other programs do not lengthen as they do those of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.dp_sgd import dp_optimizer, sampling
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.runtime import stopping
from dp_curriculum.runtime.stopping import StopRequest


NUM_ROWS = 2048
BYTES = 4  # of a float32


class Clock:
    """Adds up the seconds and bytes of the exchanges between processes."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0

    def watch(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def timed(value: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(value, *args, **kwargs)
            self.seconds += time.perf_counter() - start
            self.bytes += _num_bytes(result if result is not None else value)
            return result

        setattr(owner, name, timed)


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_num_bytes(entry) for entry in value) if isinstance(value, list) else 0


def measure(config: CurriculumConfig, *, steps: int) -> dict[str, Any]:
    """One process' part: medians over `steps` steps, after one that is left out."""
    accelerator = Accelerator(mixed_precision="no")
    torch.set_num_threads(1)
    data, rank, size = config.data, accelerator.process_index, accelerator.num_processes
    images = torch.randint(0, 256, (NUM_ROWS, data.channels, data.resolution, data.resolution), dtype=torch.uint8)
    private = PrivateImages(images, torch.arange(NUM_ROWS) % 10, tuple("0123456789"))
    unet = build_unet(config.model, resolution=data.resolution, num_channels=data.channels, num_classes=10)
    batch = config.dp_sgd.expected_batch_size
    trainer = DPTrainer(
        unet, private, config, noise_multiplier=1.0, sample_rate=batch / NUM_ROWS, divisor=float(batch),
        secret=FixedDraw(batch), process_index=rank, num_processes=size,
    )  # fmt: skip
    clock, stop = Clock(), StopRequest()
    if size > 1:
        clock.watch(torch.distributed, "reduce")
        clock.watch(dp_optimizer, "broadcast")
        clock.watch(sampling, "broadcast_object_list")
        clock.watch(stopping, "gather_object")
    whole, busy, exchange, volume = [], [], [], []
    for _ in range(steps + 1):
        accelerator.wait_for_everyone()
        clock.seconds, clock.bytes, start, cpu = 0.0, 0, time.perf_counter(), time.process_time()
        trainer.step()
        stop.agreed()
        whole.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
        exchange.append(clock.seconds)
        volume.append(clock.bytes)
    return {
        "seconds": statistics.median(whole[1:]),
        "processor_seconds": min(busy[1:]),
        "exchange_seconds": statistics.median(exchange[1:]),
        "exchange_alone_seconds": exchange_alone(unet) if size > 1 else 0.0,
        "exchanged_bytes": volume[-1],
        "num_parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "rank": rank,
    }


def exchange_alone(unet: torch.nn.Module, repeats: int = 10) -> float:
    """The sum and its return, of processes that have nothing else to do: the fastest of some."""
    flat, found = torch.zeros(sum(parameter.numel() for parameter in unet.parameters())), []
    for _ in range(repeats):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.reduce(flat, dst=0)
        torch.distributed.broadcast(flat, src=0)
        found.append(time.perf_counter() - start)
    return min(found)


class FixedDraw(SecretGenerator):
    """Draws as many rows each time, so that steps can be compared. For timing only."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def poisson_sample(self, num_rows: int, sample_rate: float) -> torch.Tensor:
        return torch.randperm(num_rows)[: self.count].sort().values


def launch(num_processes: int, arguments: list[str]) -> list[dict[str, Any]]:
    """What each of several processes measured."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = []
    for rank in range(num_processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        if num_processes > 1:
            environment |= {
                "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{num_processes}",
                "LOCAL_WORLD_SIZE": f"{num_processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}",
            }  # fmt: skip
        command = [sys.executable, __file__, "--worker", *arguments]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def predicted_seconds(
    num_processes: int,
    *,
    row_seconds: float,
    rows: int,
    fixed_seconds: float,
    num_parameters: int,
    latency: float,
    bandwidth: float,
) -> float:
    r"""
    The model of docs/scaling.md: a step is its rows, shared out, what does not shrink, and the exchange.

    The sum goes to the main process and comes back, along trees of depth log2(P), pipelined: each process sends and
    receives all parameters once a way.
    """
    computing = row_seconds * -(-rows // num_processes) + fixed_seconds
    if num_processes == 1:
        return computing
    depth = (num_processes - 1).bit_length()
    return computing + 2 * (depth * latency + num_parameters * BYTES / bandwidth)


def fit(points: dict[int, dict[str, Any]], rows: int, noise: float) -> dict[str, float]:
    """Seconds a row from one process, and the bandwidth of the exchange from two."""
    one = points[1]
    found = {"fixed_seconds": noise, "row_seconds": (one["processor_seconds"] - noise) / rows}
    if 2 in points:
        found["bytes_a_second"] = 2 * one["num_parameters"] * BYTES / points[2]["exchange_alone_seconds"]
    return found


def noise_seconds(num_parameters: int, repeats: int = 5) -> float:
    """Drawing the noise of a step, which the main process does for all."""
    secret, found = SecretGenerator(), []
    for _ in range(repeats):
        start = time.process_time()
        secret.gaussian(num_parameters, 1.0, dtype=torch.float64)
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=16, help="Images a step, all processes together.")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--config", default="examples/configs/mnist-eps10-paper.yaml")
    parser.add_argument("--noise_multiplicity", type=int, default=2)
    parser.add_argument("--output", default="benchmarks/results/scaling.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    config = CurriculumConfig.from_yaml(given.config).replace(
        expected_batch_size=given.batch, noise_multiplicity=given.noise_multiplicity, max_physical_batch_size=32,
        mixed_precision="no", secret_randomness="secure",
    )  # fmt: skip
    if given.worker:
        print(json.dumps(measure(config, steps=given.steps)))
        return
    arguments = ["--batch", f"{given.batch}", "--steps", f"{given.steps}", "--config", given.config]
    arguments += ["--noise_multiplicity", f"{given.noise_multiplicity}"]
    torch.set_num_threads(1)
    points: dict[int, dict[str, Any]] = {}
    for count in given.processes:
        ranks = launch(count, arguments)
        main_rank = next(found for found in ranks if found["rank"] == 0)
        # The main process waits least: what the others wait for it to draw noise is no exchange.
        points[count] = {**main_rank, "compute_seconds": main_rank["seconds"] - main_rank["exchange_seconds"]}
        print(count, points[count], flush=True)
    fitted = fit(points, given.batch, noise_seconds(points[1]["num_parameters"]))
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "torch": torch.__version__, "batch": given.batch, "noise_multiplicity": given.noise_multiplicity,
        "config": given.config, "load_average_at_the_end": os.getloadavg()[0],
        "points": {f"{count}": point for count, point in points.items()}, "fit": fitted,
        "prediction_at_2": None if 2 not in points else _prediction(points, fitted, given.batch),
    }  # fmt: skip
    Path(given.output).parent.mkdir(parents=True, exist_ok=True)
    Path(given.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["prediction_at_2"]))


def _prediction(points: dict[int, dict[str, Any]], fitted: dict[str, float], rows: int) -> dict[str, float]:
    seconds = predicted_seconds(
        2, rows=rows, row_seconds=fitted["row_seconds"], fixed_seconds=fitted["fixed_seconds"],
        num_parameters=points[1]["num_parameters"], latency=0.0, bandwidth=fitted["bytes_a_second"],
    )  # fmt: skip
    return {
        "predicted_seconds": seconds,
        "measured_seconds": points[2]["processor_seconds"] + points[2]["exchange_alone_seconds"],
    }


if __name__ == "__main__":
    main()
