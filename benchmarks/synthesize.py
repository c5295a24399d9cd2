"""What does `dp-curriculum synthesize` cost beside the network, and does its memory grow with the number of images?

Writes 28x28 images of a network with random weights. Measures the memory of the process along the way, and processor
time in all over processor time inside the network, in the same run, so that what else the machine does falls on
neither. Run it on one thread of a CPU.

    OMP_NUM_THREADS=1 python benchmarks/synthesize.py --num_images 10000
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import EDMEulerScheduler

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.edm import SIGMA_DATA, build_unet
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.sharing.synthetic_dataset import SynthesisOptions, synthesize


def resident_mib() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Watch(threading.Thread):
    """Samples the memory until `stop`."""

    def __init__(self, every: float) -> None:
        super().__init__(daemon=True)
        self.every, self.samples, self.done = every, [resident_mib()], threading.Event()

    def run(self) -> None:
        while not self.done.wait(self.every):
            self.samples.append(resident_mib())

    def stop(self) -> list[float]:
        self.done.set()
        self.join()
        return self.samples


class Stopwatch:
    """Seconds of processor time inside the network."""

    def __init__(self, pipeline: DPCurriculumPipeline) -> None:
        self.seconds, self.forward = 0.0, pipeline.unet.forward
        pipeline.unet.forward = self

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        start = time.process_time()
        output = self.forward(*arguments, **options)
        self.seconds += time.process_time() - start
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_images", type=int, default=10_000)
    parser.add_argument("--num_inference_steps", type=int, default=4)
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "synthesize.json")
    given = parser.parse_args()
    config = CurriculumConfig().replace(block_out_channels=given.block_out_channels)
    unet = build_unet(config.model, resolution=28, num_channels=1, num_classes=10).eval()
    pipeline = DPCurriculumPipeline(unet, EDMEulerScheduler(sigma_data=SIGMA_DATA))
    options = SynthesisOptions(num_images=given.num_images, num_inference_steps=given.num_inference_steps)
    with tempfile.TemporaryDirectory() as folder:
        synthesize(pipeline, Path(folder) / "warm-up", SynthesisOptions(num_images=2 * given.batch_size))
        stopwatch, begin = Stopwatch(pipeline), time.process_time()
        watch = Watch(0.5)
        watch.start()
        done = synthesize(pipeline, Path(folder) / "dataset", options, batch_size=given.batch_size)
        seconds, samples = time.process_time() - begin, watch.stop()
        size = sum(path.stat().st_size for path in (Path(folder) / "dataset" / "data").iterdir())
    assert done.images_per_second is not None and done.network_images_per_second is not None
    half = len(samples) // 2
    result = {
        "num_images": given.num_images,
        "shape": "1x28x28",
        "num_parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "num_inference_steps": given.num_inference_steps,
        "batch_size": given.batch_size,
        "images_per_second": round(done.images_per_second, 1),
        "network_images_per_second": round(done.network_images_per_second, 1),
        "processor_time_over_network": round(seconds / stopwatch.seconds, 4),
        "memory_mib_at_start": round(samples[0]),
        "memory_mib_peak_first_half": round(max(samples[: half + 1])),
        "memory_mib_peak_second_half": round(max(samples[half:])),
        "dataset_mib": round(size / 2**20, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
