"""What per-image gradients cost: this engine, Opacus and torch.func against plain training, in time and memory.

One cell is a model, a number of rows and K. All methods of a cell compute the clipped sum of the same images, one
after another in each repetition, so that a slow spell of the machine falls on all of them; ratios are taken within a
repetition. Peak memory, and whether a method fits at all, comes from a process of its own.

    python benchmarks/per_image_gradients.py --quick
    python benchmarks/per_image_gradients.py --output benchmarks/results/per_image_gradients.json --plot

A cell that the output file holds already is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import UNet2DModel
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping, register_grad_sampler
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor

from dp_curriculum.diffusion.edm import edm_loss
from dp_curriculum.per_image_gradients import PerImageGradients


RESULTS = Path(__file__).parent / "results" / "per_image_gradients.json"
MAX_GRAD_NORM = 1e-3
MAX_SECONDS = 60
MAX_GIB = 8
NUM_CLASSES = 10
# Channels of the two levels, and residual blocks at each.
SIZES = {"0.25M": ((16, 32), 2), "1.5M": ((48, 96), 1), "4M": ((64, 160), 1)}
ROWS = {"0.25M": 64, "1.5M": 64, "4M": 32}
GROWTH = ("images", "noise_multiplicity", "parameters")

Step = Callable[[], list[Tensor]]


class Cell(NamedTuple):
    """A model as `size-resolution[-attention]`, and what it is run on."""

    model: str
    rows: int
    noise_multiplicity: int

    @property
    def images(self) -> int:
        return self.rows // self.noise_multiplicity


class Batch(NamedTuple):
    """Arguments of `edm_loss`; row k * B + b is draw k of image b."""

    images: Tensor
    noise: Tensor
    sigma: Tensor
    labels: Tensor


def table_cells() -> Iterator[Cell]:
    """Every model and K, at the same number of rows for all K."""
    for size, rows in ROWS.items():
        for kind in ("28", "28-attention", "32", "32-attention"):
            for noise_multiplicity in (1, 4, 16, 32):
                yield Cell(f"{size}-{kind}", rows, noise_multiplicity)


def growth_cells(what: str) -> Iterator[Cell]:
    """Cells that differ in one of `GROWTH`."""
    if what == "images":
        yield from (Cell("0.25M-28-attention", 4 * images, 4) for images in (4, 8, 16, 32, 64))
    elif what == "noise_multiplicity":
        yield from (Cell("0.25M-28-attention", 8 * draws, draws) for draws in (1, 2, 4, 8, 16, 32))
    else:
        yield from (Cell(f"{size}-28-attention", 32, 4) for size in SIZES)


def build(cell: Cell, device: str) -> tuple[UNet2DModel, Batch]:
    """The model of a cell, and random inputs."""
    size, side, *attention = cell.model.split("-")
    (channels, layers_per_block), resolution = SIZES[size], int(side)
    generator = torch.Generator().manual_seed(0)
    unet = UNet2DModel(
        sample_size=resolution,
        in_channels=1,
        out_channels=1,
        block_out_channels=channels,
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D", "AttnDownBlock2D" if attention else "DownBlock2D"),
        up_block_types=("AttnUpBlock2D" if attention else "UpBlock2D", "UpBlock2D"),
        add_attention=bool(attention),
        attention_head_dim=16,
        norm_num_groups=16,
        num_class_embeds=NUM_CLASSES + 1,
    ).to(device)
    for parameter in unet.parameters():
        # The same weights in every process.
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    shape = (cell.rows, 1, resolution, resolution)
    batch = Batch(
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        torch.rand(cell.rows, generator=generator) + 0.1,
        torch.randint(0, NUM_CLASSES, (cell.rows,), generator=generator),
    )
    return unet.train(), Batch(*[tensor.to(device) for tensor in batch])


def losses_of(unet: Any, batch: Batch) -> Tensor:
    return edm_loss(unet, batch.images, batch.noise, batch.sigma, batch.labels, sigma_data=0.5)


def clipped_sum(gradients: list[Tensor]) -> list[Tensor]:
    """What Opacus' optimizer makes of per-image gradients, in the fewest operations."""
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (MAX_GRAD_NORM / norms).clamp(max=1)
    return [(factors @ gradient.flatten(1)).view(gradient.shape[1:]) for gradient in gradients]


def take(parameters: list[torch.nn.Parameter], name: str) -> list[Any]:
    """An attribute of all parameters, and clears it and the ordinary gradient."""
    values = [getattr(parameter, name) for parameter in parameters]
    for parameter in parameters:
        setattr(parameter, name, None)
        parameter.grad = None
    return values


def plain(unet: UNet2DModel, batch: Batch, noise_multiplicity: int) -> Step:
    parameters = list(unet.parameters())

    def step() -> list[Tensor]:
        losses_of(unet, batch).sum().backward()
        return take(parameters, "grad")

    return step


def engine(unet: UNet2DModel, batch: Batch, noise_multiplicity: int, mode: Any = "materialize") -> Step:
    parameters = list(unet.parameters())
    gradients = PerImageGradients(unet, noise_multiplicity=noise_multiplicity, mode=mode)

    def step() -> list[Tensor]:
        with gradients:
            gradients.backward(losses_of(unet, batch))
            gradients.accumulate_clipped(MAX_GRAD_NORM)
        return take(parameters, "summed_grad")

    return step


def engine_norms_first(unet: UNet2DModel, batch: Batch, noise_multiplicity: int) -> Step:
    return engine(unet, batch, noise_multiplicity, "norms_first")


def opacus_hooks(unet: UNet2DModel, batch: Batch, noise_multiplicity: int) -> Step:
    """Each copy is a sample of its own: B * K gradients, then averaged to B."""
    model, parameters = GradSampleModule(unet, loss_reduction="sum"), list(unet.parameters())

    def step() -> list[Tensor]:
        losses_of(model, batch).sum().backward()
        gradients = take(parameters, "grad_sample")
        return clipped_sum([gradient.unflatten(0, (noise_multiplicity, -1)).mean(0) for gradient in gradients])

    return step


def opacus_hooks_k_forwards(unet: UNet2DModel, batch: Batch, noise_multiplicity: int) -> Step:
    """K forwards and one backward, over which Opacus adds up the gradients of an image."""
    model, parameters = GradSampleModule(unet, loss_reduction="sum"), list(unet.parameters())
    draws = [Batch(*rows) for rows in zip(*[tensor.chunk(noise_multiplicity) for tensor in batch])]

    def step() -> list[Tensor]:
        torch.stack([losses_of(model, draw).sum() for draw in draws]).mean().backward()
        return clipped_sum(take(parameters, "grad_sample"))

    return step


def opacus_ghost(unet: UNet2DModel, batch: Batch, noise_multiplicity: int) -> Step:
    """Cannot fold the copies: for K > 1 it clips each copy, which is another sum."""
    model = GradSampleModuleFastGradientClipping(unet, max_grad_norm=MAX_GRAD_NORM, loss_reduction="sum")
    parameters = list(unet.parameters())
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(parameters, lr=0.0), noise_multiplier=0.0, max_grad_norm=MAX_GRAD_NORM, expected_batch_size=1
    )

    def step() -> list[Tensor]:
        DPTensorFastGradientClipping(model, optimizer, losses_of(model, batch), "sum").backward()
        return take(parameters, "grad")

    return step


def torch_func(unet: UNet2DModel, batch: Batch, noise_multiplicity: int) -> Step:
    """`vmap` over images of `grad` of an image's mean loss."""
    weights = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    folded = [tensor.unflatten(0, (noise_multiplicity, -1)) for tensor in batch]

    def image_loss(weights: dict[str, Tensor], *draws: Tensor) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(unet, weights, args, kwargs)

        return losses_of(call, Batch(*draws)).mean()

    gradients_of = torch.func.vmap(torch.func.grad(image_loss), in_dims=(None, 1, 1, 1, 1))
    return lambda: clipped_sum(list(gradients_of(weights, *folded).values()))


METHODS: dict[str, Callable[[UNet2DModel, Batch, int], Step]] = {
    "plain training": plain,
    "engine": engine,
    "engine, norms first": engine_norms_first,
    "Opacus hooks": opacus_hooks,
    "Opacus hooks, K forwards": opacus_hooks_k_forwards,
    "Opacus ghost": opacus_ghost,
    "torch.func": torch_func,
}


def fix_opacus_convolution() -> None:
    """Opacus 1.6 reads channels_last inputs, which diffusers' attention emits, in the wrong order."""

    @register_grad_sampler([torch.nn.Conv2d])
    def sample(layer: Any, activations: Any, backprops: Tensor) -> Any:
        return compute_conv_grad_sample(layer, [activations[0].contiguous()], backprops.contiguous())


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_mib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def probe(connection: Any, method: str, cell: Cell, device: str, threads: int) -> None:
    """Runs in a process of its own: sends the seconds of a second step, and the peak memory above the model's."""
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    fix_opacus_convolution()
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_GIB * 2**30, MAX_GIB * 2**30))
    try:
        unet, batch = build(cell, device)
        before = peak_mib(device)
        step = METHODS[method](unet, batch, cell.noise_multiplicity)
        step()
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        connection.send({"seconds": time.perf_counter() - start, "peak_mib": round(peak_mib(device) - before, 1)})
    except (RuntimeError, MemoryError, NotImplementedError) as error:
        line = str(error).split("\n")[0]
        # The last is how oneDNN says it.
        needs_memory = isinstance(error, MemoryError) or "allocate" in line or "create a primitive" in line
        connection.send({"skipped": f"needs more than {MAX_GIB} GiB" if needs_memory else line[:200]})


def measure_alone(method: str, cell: Cell, device: str, threads: int) -> dict[str, Any]:
    """Peak memory of a method, or why it is left out."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "diffusers", "opacus", "dp_curriculum.per_image_gradients"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=probe, args=(theirs, method, cell, device, threads))
    child.start()
    theirs.close()
    result: dict[str, Any] = {"skipped": f"takes more than {MAX_SECONDS} s a repetition"}
    try:
        if ours.poll(3 * MAX_SECONDS):
            answer = ours.recv()
            result = result if answer.get("seconds", 0) > MAX_SECONDS else answer
    except EOFError:
        result = {"skipped": "ended without an answer"}
    child.kill()
    child.join()
    return result


def quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(low, 4), round(high, 4)]


def measure(cell: Cell, repetitions: int, device: str, threads: int) -> dict[str, Any]:
    """One cell of the table."""
    methods = {name: measure_alone(name, cell, device, threads) for name in METHODS}
    unet, batch = build(cell, device)
    steps = {
        name: METHODS[name](copy.deepcopy(unet), batch, cell.noise_multiplicity)
        for name, result in methods.items()
        if "skipped" not in result
    }
    sums = {name: torch.cat([total.flatten() for total in step()]) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        ratios = [own / reference for own, reference in zip(taken, seconds["plain training"])]
        methods[name] = {
            "images_per_second": round(cell.images / statistics.median(taken), 3),
            "seconds": round(statistics.median(taken), 5),
            "seconds_quartiles": quartiles(taken),
            "ratio_to_plain": round(statistics.median(ratios), 4),
            "ratio_quartiles": quartiles(ratios),
            "peak_mib": methods[name]["peak_mib"],
        }
        if name != "plain training":
            difference = (sums[name] - sums["engine"]).norm() / sums["engine"].norm()
            methods[name]["difference_from_engine"] = float(f"{difference:.1e}")
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    return {**cell._asdict(), "images": cell.images, "parameters": parameters, "methods": methods}


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the figures depend on; nothing that names the machine."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        **{package: version(package) for package in ("torch", "opacus", "diffusers")},
        "python": platform.python_version(),
    }


def print_table(results: dict[str, Any]) -> None:
    print("| model | B | K | method | images/s | ratio to plain (quartiles) | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for cell in results["cells"].values():
        head = f"| {cell['model']} | {cell['images']} | {cell['noise_multiplicity']} |"
        for name, found in cell["methods"].items():
            if "skipped" in found:
                print(f"{head} {name} | {found['skipped']} | | |")
                continue
            low, high = found["ratio_quartiles"]
            ratio = f"{found['ratio_to_plain']:.2f} ({low:.2f}–{high:.2f})"
            print(f"{head} {name} | {found['images_per_second']:.1f} | {ratio} | {found['peak_mib']:.0f} |")


def save_plot(results: dict[str, Any], path: Path) -> None:
    """Ratio to plain training by K over all models, and the growth of time with B, K and parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4), layout="constrained")
    cells = results["cells"]
    table = [cells[key_of(cell)] for cell in table_cells() if key_of(cell) in cells] or list(cells.values())
    draws = sorted({cell["noise_multiplicity"] for cell in table})
    for name in METHODS:
        ratios = [
            [
                cell["methods"][name]["ratio_to_plain"]
                for cell in table
                if cell["noise_multiplicity"] == k and "skipped" not in cell["methods"][name]
            ]
            for k in draws
        ]
        kept = [(k, values) for k, values in zip(draws, ratios) if values]
        middle = [statistics.median(values) for _, values in kept]
        spread = [[m - min(v) for m, (_, v) in zip(middle, kept)], [max(v) - m for m, (_, v) in zip(middle, kept)]]
        axes[0].errorbar([k for k, _ in kept], middle, yerr=spread, marker="o", capsize=3, label=name)
        for axis, what in zip(axes[1:], GROWTH):
            found = [cells[key] for key in map(key_of, growth_cells(what)) if key in cells]
            found = [cell for cell in found if "skipped" not in cell["methods"][name]]
            found.sort(key=lambda cell: cell[what])
            if found:
                axis.loglog([c[what] for c in found], [c["methods"][name]["seconds"] for c in found], marker="o")
    axes[0].set(title="Ratio to plain training, median and range of models", xlabel="K", xscale="log", yscale="log")
    axes[0].set_xticks(draws, [str(k) for k in draws])
    for axis in axes:
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    for axis, title in zip(axes[1:], ("images; K = 4", "K; 8 images", "parameters; 8 images, K = 4")):
        axis.set(title=f"Seconds by {title}", xlabel=title.split(";")[0])
    figure.legend(loc="outside lower center", ncols=len(METHODS))
    figure.savefig(path, dpi=90)


def key_of(cell: Cell) -> str:
    return f"{cell.model}/rows={cell.rows}/K={cell.noise_multiplicity}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Two small cells, to see that it works.")
    parser.add_argument("--models", nargs="*", help="Only models whose name starts with one of these, such as 0.25M.")
    parser.add_argument("--output", type=Path, help=f"JSON file; {RESULTS.name} beside this script if unset.")
    parser.add_argument("--repetitions", type=int, default=7, help="Paired runs of all methods of a cell.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", action="store_true", help="Also draw the output file as a PNG beside it.")
    options = parser.parse_args()
    output = options.output or (RESULTS.with_stem("quick") if options.quick else RESULTS)
    cells = [*table_cells(), *[cell for what in GROWTH for cell in growth_cells(what)]]
    if options.quick:
        cells = [Cell("0.25M-28-attention", 8, draws) for draws in (1, 4)]
    if options.models is not None:
        cells = [cell for cell in cells if cell.model.startswith(tuple(options.models))]

    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    fix_opacus_convolution()
    here = machine(options.device, options.threads)
    results = json.loads(output.read_text()) if output.exists() else {"machine": here, "cells": {}}
    if results["machine"] != here:
        raise SystemExit(f"Expected {output} to be of this machine: give another --output.")
    output.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        if key_of(cell) not in results["cells"]:
            print("measuring", key_of(cell), flush=True)
            results["cells"][key_of(cell)] = measure(cell, options.repetitions, options.device, options.threads)
            partial = output.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(output)
    print_table(results)
    if options.plot:
        save_plot(results, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
