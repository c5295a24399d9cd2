"""The measurements of `gpu.py`: each a generator of names and figures, so that what was found is kept if it is cut.

All of it reads random inputs. Sizes are for one large GPU; with `tiny`, for a CPU and some seconds.
"""

from __future__ import annotations

import functools
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.grad_sample.linear import compute_linear_grad_sample
from per_image_gradients import clipped_sum, take
from torch import Tensor
from torch.nn import functional as F

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.diffusion.edm import build_unet, edm_loss
from dp_curriculum.diffusion.precision import autocast
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.dp_sgd.weight_gradients import CANDIDATES, Geometry, candidates_for, relative_error
from dp_curriculum.per_image_gradients import PerImageGradients
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.training.validation import check_gradients


PRESETS = {"small": "mnist-eps1-cpu.yaml", "paper": "mnist-eps1-paper.yaml"}
CONFIGS = Path(__file__).resolve().parent.parent / "examples" / "configs"
TINY = {
    "resolution": 8,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "attention_resolutions": [],
}
NUM_CLASSES, NUM_IMAGES = 10, 60_000
MAX_GRAD_NORM = 1e-3
GRADIENT_MEMORY_MIB = 32_768  # of a GPU: with the default, a large batch would silently compute its gradients twice
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# How kernels are named, and what they do; the first that fits counts.
KERNELS = {
    "change of layout": r"nchwToNhwc|nhwcToNchw|transpose",
    "normalization": r"group_?norm|RowwiseMoments|ComputeFused|GammaBeta|ComputeInternal|layer_?norm",
    "attention": r"flash|fmha|attention|softmax",
    "weight gradient": r"wgrad|weight_?grad|grad_weight",
    "convolution": r"conv|dgrad|fprop|cudnn|implicit",
    "matrix product": r"gemm|nvjet|cublas|cutlass|bmm|gemv|splitK",
    "many tensors at once": r"multi_tensor",
    "sum or norm": r"reduce|norm",
    "elementwise": r"elementwise|vectorized|copy|fill|cat|index|distribution",
}

Found = Iterator[tuple[str, Any]]


@dataclass
class Bench:
    """What all slices share: the device, the sizes, and what was found before."""

    device: torch.device
    folder: Path
    runs: Path
    data: str
    started: float
    deadline: float
    tiny: bool = False
    quick: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until everything is over."""
        return self.deadline - time.monotonic()

    def found(self, name: str) -> dict[str, Any]:
        """What a slice has found, in this call or an earlier one."""
        return self.results.get("slices", {}).get(name, {}).get("found", {})

    def config(self, preset: str, **changes: Any) -> CurriculumConfig:
        """A preset, with bfloat16 and the memory of a GPU."""
        config = CurriculumConfig.from_yaml(CONFIGS / PRESETS[preset])
        config = config.replace(mixed_precision="bf16", gradient_memory_limit=GRADIENT_MEMORY_MIB)
        return config.replace(**{**(TINY if self.tiny else {}), **changes})

    def network(self, preset: str) -> UNet2DModel:
        """Its network, in which no layer is zero as in a new one: gradients flow everywhere."""
        config = self.config(preset)
        generator = torch.Generator().manual_seed(0)
        unet = build_unet(config.model, resolution=config.data.resolution, num_channels=1, num_classes=NUM_CLASSES)
        for parameter in unet.parameters():
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        return unet.to(self.device).train()


class Batch(NamedTuple):
    """Arguments of `edm_loss`; row k * B + b is draw k of image b."""

    images: Tensor
    noise: Tensor
    sigma: Tensor
    labels: Tensor


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(device: torch.device) -> None:
    """Gives memory back, of a slice that ended or failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def median_seconds(
    step: Callable[[], Any], device: torch.device, *, warm: int = 2, most: int = 10, budget: float = 1.0
) -> float:
    """Median of up to `most` runs, of which at least two are made whatever they take."""
    for _ in range(warm):
        step()
    synchronize(device)
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < most and sum(taken) < budget):
        start = time.perf_counter()
        step()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def words(error: BaseException) -> str:
    """A failure in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:240]


def attempted(device: torch.device, compute: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A figure, or why there is none."""
    try:
        return compute(*args, **options)
    except torch.cuda.OutOfMemoryError:
        result = "out of memory"
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, ImportError) as error:
        result = words(error)
    forget(device)
    return result


# What the device can do.


def ceilings(bench: Bench) -> Found:
    """Memory, matrix units and launches: what the other figures are shares of."""
    yield "copy, TB/s", _copy_rate(bench)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "float32")):
        yield f"{name} product, TFLOP/s", _product_rate(bench, dtype)
    number = torch.zeros(1, device=bench.device)

    def launches() -> None:
        for _ in range(1000):
            number.add_(1)

    yield "a launch, microseconds", rounded(median_seconds(launches, bench.device) * 1e3)
    if bench.is_gpu:
        yield "a launch within a CUDA graph, microseconds", attempted(bench.device, _graph_launch, launches, bench)


def _copy_rate(bench: Bench) -> float:
    """Bytes read and written a second."""
    source = torch.randn(2**30 if bench.is_gpu else 2**20, device=bench.device)
    target = torch.empty_like(source)
    return rounded(8e-12 * source.numel() / median_seconds(lambda: target.copy_(source), bench.device, most=20))


def _product_rate(bench: Bench, dtype: torch.dtype) -> float:
    side = 8192 if bench.is_gpu else 128
    left, right = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
    return rounded(2e-12 * side**3 / median_seconds(lambda: left @ right, bench.device, most=20))


def _graph_launch(launches: Callable[[], None], bench: Bench) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    return rounded(median_seconds(graph.replay, bench.device) * 1e3)


def self_check(bench: Bench) -> Found:
    """Gradients per image beside those of autograd, as each run has them checked before anything is spent."""
    for preset in PRESETS:
        for precision in ("bf16", "no"):
            config = bench.config(preset, mixed_precision=precision)
            unet = bench.network(preset)
            yield f"{preset}, {precision}", attempted(bench.device, check_gradients, unet, config, NUM_CLASSES)


# Weight gradients.


class Shape(NamedTuple):
    """A convolution of the presets' networks."""

    channels: int
    filters: int
    side: int
    stride: int = 1

    @property
    def geometry(self) -> Geometry:
        return Geometry(stride=(self.stride, self.stride))

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.channels} to {self.filters} channels, {self.side}x{self.side}{stride}"


SHAPES = (
    Shape(64, 64, 28), Shape(128, 64, 28), Shape(64, 64, 14), Shape(128, 64, 14), Shape(16, 16, 28), Shape(48, 48, 14),
    Shape(64, 64, 28, 2), Shape(1, 64, 28), Shape(64, 1, 28),
)  # fmt: skip
TINY_SHAPES = (Shape(4, 6, 6), Shape(4, 4, 6, 2))
FUSED_VARIANTS = ((64, 4, 3), (64, 4, 4), (32, 4, 4), (128, 8, 2), (128, 4, 2), (64, 8, 3), (64, 4, 2))


def _rows(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random inputs and output gradients, channels first."""
    out = (shape.side - 1) // shape.stride + 1
    inputs = torch.randn(rows, shape.channels, shape.side, shape.side, device=device, dtype=dtype)
    return inputs, torch.randn(rows, shape.filters, out, out, device=device, dtype=dtype)


def _flops(shape: Shape, rows: int) -> float:
    out = (shape.side - 1) // shape.stride + 1
    return 2.0 * rows * out**2 * shape.channels * shape.filters * 9


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """No TF32 in products and convolutions of float32."""
    cudnn = torch.backends.cudnn
    limit = cudnn.benchmark_limit or 10
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "benchmark_limit": limit}
    with cudnn.flags(**kept, allow_tf32=dtype != torch.float32):
        yield


def _checked_time(
    method: Callable[..., Tensor], shape: Shape, inputs: Tensor, gradients: Tensor, draws: int
) -> dict[str, float] | str:
    """Milliseconds and rate, if the first two images are right."""
    images = len(inputs) // draws
    first = [tensor.unflatten(0, (draws, images))[:, :2].flatten(0, 1) for tensor in (inputs, gradients)]
    if inputs.is_contiguous(memory_format=torch.channels_last):
        first = [tensor.contiguous(memory_format=torch.channels_last) for tensor in first]
    # What is not written shows: the next tensors get this memory.
    poison = [torch.full_like(tensor, torch.nan) for tensor in (inputs, gradients)]
    del poison
    with exact_products(inputs.dtype):
        error = relative_error(method, *first, shape.geometry, draws)
        if not error < TOLERANCE[inputs.dtype]:
            return f"wrong by {error:.1e}"
        compute = functools.partial(method, inputs, gradients, shape.geometry, draws)
        seconds = median_seconds(compute, inputs.device, warm=1, most=7, budget=0.1)
    return {
        "ms": rounded(seconds * 1e3),
        "TFLOP/s": rounded(_flops(shape, len(inputs)) / seconds / 1e12),
        "error": rounded(error, 2),
    }


def weight_gradients(bench: Bench) -> Found:
    """Each candidate on each shape, for rows in either memory format, K = 32 and 1."""
    rows, shapes = (64, TINY_SHAPES) if bench.tiny else (4096, SHAPES)
    cells = [(shape, draws, torch.bfloat16) for shape in shapes for draws in (32, 1)]
    cells += [(shapes[0], 32, torch.float32), (shapes[0], 1, torch.float32)]
    for shape, draws, dtype in cells[:6] if bench.quick else cells[:3] if bench.tiny else cells:
        row: dict[str, Any] = {}
        inputs, gradients = _rows(shape, rows, dtype, bench.device)
        for layout, form in (("channels first", torch.contiguous_format), ("channels last", torch.channels_last)):
            pair = [tensor.contiguous(memory_format=form) for tensor in (inputs, gradients)]
            for name, method in candidates_for(shape.geometry).items():
                if name == "fused" and not bench.is_gpu:
                    continue
                row[f"{name}, {layout}"] = attempted(bench.device, _checked_time, method, shape, *pair, draws)
        timed = {name: found["ms"] for name, found in row.items() if isinstance(found, dict)}
        row["fastest"] = min(timed, key=timed.__getitem__, default=None)
        yield f"{shape}, K = {draws}, {str(dtype).removeprefix('torch.')}", row
    # At the end, as it may try slow ones: the grouped convolution with the fastest of cuDNN's ways.
    for shape, draws in ((shapes[0], 32), (shapes[0], 1)):
        inputs, gradients = _rows(shape, rows, torch.bfloat16, bench.device)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, benchmark_limit=4):
            found = attempted(bench.device, _checked_time, CANDIDATES["grouped"], shape, inputs, gradients, draws)
        yield f"{shape}, K = {draws}, bfloat16, grouped, by cuDNN's benchmark", found


def _variant(inputs: Tensor, gradients: Tensor, geometry: Geometry, draws: int, **settings: int) -> Tensor:
    from dp_curriculum.dp_sgd.weight_gradient_kernel import three_by_three

    return three_by_three(inputs, gradients, geometry.stride, geometry.padding, draws, **settings)


def fused_variants(bench: Bench) -> Found:
    """The kernel of our own with other tiles, warps and stages, on the shapes that matter."""
    if not bench.is_gpu:
        yield "left out", "needs a GPU"
        return
    for shape, draws in ((SHAPES[0], 32), (SHAPES[1], 32), (SHAPES[0], 1), (SHAPES[5], 1)):
        inputs, gradients = _rows(shape, 4096, torch.bfloat16, bench.device)
        pair = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (inputs, gradients)]
        row: dict[str, Any] = {}
        for block, warps, stages in FUSED_VARIANTS:
            method = functools.partial(_variant, block_positions=block, num_warps=warps, num_stages=stages)
            row[f"{block} positions, {warps} warps, {stages} stages"] = attempted(
                bench.device, _checked_time, method, shape, *pair, draws
            )
        yield f"{shape}, K = {draws}", row


# What lies between the convolutions.


def normalization(bench: Bench) -> Found:
    """GroupNorm and SiLU, forward and backward: as autocast has them computed, and in bfloat16."""
    shape = (4096, 64, 28, 28) if bench.is_gpu else (8, 16, 6, 6)
    x = torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(shape[1], device=bench.device) for _ in range(2))
    gradient = torch.randn_like(x)

    def in_float32() -> Tensor:
        return F.silu(F.group_norm(x.float(), 8, weight, bias)).to(x.dtype)

    def in_bfloat16() -> Tensor:
        return F.silu(F.group_norm(x, 8, weight.to(x.dtype), bias.to(x.dtype)))

    functions = {"float32": in_float32, "bfloat16": in_bfloat16}
    if bench.is_gpu:
        functions["float32, compiled"] = torch.compile(in_float32, dynamic=False)
    for name, function in functions.items():
        yield name, attempted(bench.device, _normalization_time, function, x, gradient)


def _normalization_time(function: Callable[[], Tensor], x: Tensor, gradient: Tensor) -> dict[str, float]:
    """Beside the least that moves: x and the gradient read twice, the result and x's gradient written, in bfloat16."""
    seconds = median_seconds(lambda: torch.autograd.grad(function(), x, gradient), x.device)
    return {"ms": rounded(seconds * 1e3), "TB/s of 12 bytes an element": rounded(12e-12 * x.numel() / seconds)}


# The engine beside other ways.


def random_batch(config: CurriculumConfig, rows: int, device: torch.device) -> Batch:
    side = config.data.resolution
    return Batch(
        torch.randn(rows, 1, side, side, device=device),
        torch.randn(rows, 1, side, side, device=device),
        torch.rand(rows, device=device) + 0.1,
        torch.randint(0, NUM_CLASSES, (rows,), device=device),
    )


def losses_of(model: Any, batch: Batch, config: CurriculumConfig) -> Tensor:
    with autocast(batch.images.device, config.runtime.mixed_precision):
        return edm_loss(model, *batch)


Step = Callable[[], Any]
Method = Callable[[UNet2DModel, Batch, CurriculumConfig], AbstractContextManager[Step]]


@contextmanager
def forward(unet: UNet2DModel, batch: Batch, config: CurriculumConfig) -> Iterator[Step]:
    with torch.no_grad():
        yield lambda: losses_of(unet, batch, config)


@contextmanager
def plain(unet: UNet2DModel, batch: Batch, config: CurriculumConfig) -> Iterator[Step]:
    def step() -> None:
        losses_of(unet, batch, config).sum().backward()
        unet.zero_grad(set_to_none=True)

    yield step


@contextmanager
def plain_tuned(unet: UNet2DModel, batch: Batch, config: CurriculumConfig) -> Iterator[Step]:
    """With channels last, and with cuDNN's choice by measurement."""
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    measured = {"enabled": True, "benchmark": True, "benchmark_limit": 4}
    with torch.backends.cudnn.flags(**measured), plain(unet, batch, config) as step:
        yield step


@contextmanager
def engine(unet: UNet2DModel, batch: Batch, config: CurriculumConfig, mode: Any = "materialize") -> Iterator[Step]:
    parameters = list(unet.parameters())
    with PerImageGradients(unet, noise_multiplicity=config.dp_sgd.noise_multiplicity, mode=mode) as gradients:
        weights = getattr(gradients, "fixed_weights", nullcontext)  # as the trainer: cast once a step

        def step() -> None:
            with weights():
                gradients.backward(losses_of(unet, batch, config))
                gradients.accumulate_clipped(MAX_GRAD_NORM)
            take(parameters, "summed_grad")

        yield step


def engine_norms_first(unet: UNet2DModel, batch: Batch, config: CurriculumConfig) -> AbstractContextManager[Step]:
    return engine(unet, batch, config, "norms_first")


def mend_opacus() -> None:
    """Opacus 1.6 reads channels_last inputs of convolutions in the wrong order, and autocast leaves it two dtypes."""

    @register_grad_sampler([torch.nn.Conv2d])
    def convolution(layer: Any, activations: Any, backprops: Tensor) -> Any:
        return compute_conv_grad_sample(
            layer, [activations[0].to(backprops.dtype).contiguous()], backprops.contiguous()
        )

    @register_grad_sampler([torch.nn.Linear])
    def linear(layer: Any, activations: Any, backprops: Tensor) -> Any:
        return compute_linear_grad_sample(layer, [activations[0].to(backprops.dtype)], backprops)


@contextmanager
def opacus_hooks(unet: UNet2DModel, batch: Batch, config: CurriculumConfig) -> Iterator[Step]:
    """Each copy is a sample of its own: B * K gradients, then averaged to B."""
    model, parameters = GradSampleModule(unet, loss_reduction="sum"), list(unet.parameters())
    draws = config.dp_sgd.noise_multiplicity

    def step() -> None:
        losses_of(model, batch, config).sum().backward()
        gradients = take(parameters, "grad_sample")
        clipped_sum([gradient.float().unflatten(0, (draws, -1)).mean(0) for gradient in gradients])

    yield step


METHODS: dict[str, Method] = {
    "forward": forward,
    "plain": plain,
    "plain, tuned": plain_tuned,
    "engine": engine,
    "engine, norms first": engine_norms_first,
    "Opacus hooks": opacus_hooks,
}


def _peak_gib(bench: Bench) -> float | None:
    return rounded(torch.cuda.max_memory_allocated() / 2**30, 3) if bench.is_gpu else None


def timed_method(bench: Bench, preset: str, method: Method, rows: int, config: CurriculumConfig) -> dict[str, Any]:
    """Rate and peak memory of one method, on a copy of the network."""
    unet, batch = bench.network(preset), random_batch(config, rows, bench.device)
    if bench.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    with method(unet, batch, config) as step:
        seconds = median_seconds(step, bench.device, budget=0.5 if bench.is_gpu else 0.1)
    return {"rows/s": round(rows / seconds), "ms": rounded(seconds * 1e3), "peak GiB": _peak_gib(bench)}


def with_ratios(row: Mapping[str, Any]) -> dict[str, Any]:
    """Times over that of the fastest plain training."""
    times = {name: found["ms"] for name, found in row.items() if isinstance(found, dict)}
    best = min((ms for name, ms in times.items() if name.startswith("plain")), default=None)
    if best is None:
        return dict(row)
    return {
        name: {**found, "ratio": rounded(found["ms"] / best, 3)} if isinstance(found, dict) else found
        for name, found in row.items()
    }


def methods(bench: Bench) -> Found:
    """Forward, plain training, the engine and Opacus' hooks, at a small and a large physical batch."""
    mend_opacus()
    large = 16 if bench.tiny else 4096
    cells = [("paper", large, "bf16"), ("small", large, "bf16")]
    if not bench.quick and not bench.tiny:
        few = large // 32 if bench.is_gpu else large
        cells += [("paper", few, "bf16"), ("small", few, "bf16"), ("paper", large, "no"), ("small", large, "no")]
    for preset, rows, precision in cells:
        draws = 4 if bench.tiny and preset == "paper" else bench.config(preset).dp_sgd.noise_multiplicity
        config = bench.config(preset, mixed_precision=precision, noise_multiplicity=draws)
        name, row = f"{preset}, {rows} rows, K = {draws}, {precision}", {}
        for method_name, method in METHODS.items():
            if precision == "no" and method_name in ("forward", "engine, norms first"):
                continue
            row[method_name] = attempted(bench.device, timed_method, bench, preset, method, rows, config)
            forget(bench.device)
            yield name, with_ratios(row)


def compiled(bench: Bench) -> Found:
    """Plain training through `torch.compile`, where the compiler ends in time."""
    rows = 16 if bench.tiny else 4096
    backend = "inductor" if bench.is_gpu else "eager"
    for preset in ("small", "paper"):
        yield f"{preset}, {rows} rows, bf16", attempted(bench.device, _compiled_time, bench, preset, rows, backend)
        torch._dynamo.reset()
        forget(bench.device)


def _compiled_time(bench: Bench, preset: str, rows: int, backend: str) -> dict[str, Any]:
    config, unet = bench.config(preset), bench.network(preset)
    batch = random_batch(config, rows, bench.device)
    model = torch.compile(unet, dynamic=False, backend=backend)

    def step() -> None:
        losses_of(model, batch, config).sum().backward()
        unet.zero_grad(set_to_none=True)

    start = time.perf_counter()
    step()
    synchronize(bench.device)
    compiling = time.perf_counter() - start
    seconds = median_seconds(step, bench.device, budget=0.5)
    return {"rows/s": round(rows / seconds), "ms": rounded(seconds * 1e3), "s of compiling": rounded(compiling, 3)}


# Where the time goes.


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in KERNELS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def profile(bench: Bench) -> Found:
    """One physical batch of the engine under the profiler: busy time, kernels and operators."""
    cells = (("paper", 16), ("small", 16)) if bench.tiny else (("paper", 4096), ("small", 2048), ("small", 128))
    for preset, rows in cells:
        draws = 4 if bench.tiny and preset == "paper" else bench.config(preset).dp_sgd.noise_multiplicity
        config = bench.config(preset, noise_multiplicity=draws)
        yield f"{preset}, {rows} rows", attempted(bench.device, _profiled, bench, preset, rows, config)
        forget(bench.device)


def _profiled(bench: Bench, preset: str, rows: int, config: CurriculumConfig) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.is_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with engine(bench.network(preset), random_batch(config, rows, bench.device), config) as step:
        for _ in range(3):
            step()
        synchronize(bench.device)
        start = time.perf_counter()
        step()
        synchronize(bench.device)
        wall = time.perf_counter() - start
        with torch.profiler.profile(activities=activities) as profiler:
            step()
            synchronize(bench.device)
    averages = profiler.key_averages()
    own = "self_device_time_total" if bench.is_gpu else "self_cpu_time_total"
    table = averages.table(sort_by=own, row_limit=80, max_name_column_width=100)
    (bench.folder / f"profile-{preset}-{rows}.txt").write_text(table)
    return summary([(e.key, getattr(e, own) / 1e3, e.count, _is_kernel(e, bench)) for e in averages], wall * 1e3)


def _is_kernel(entry: Any, bench: Bench) -> bool:
    return not bench.is_gpu or entry.device_type == torch.autograd.DeviceType.CUDA


def summary(entries: list[tuple[str, float, int, bool]], wall_ms: float) -> dict[str, Any]:
    """The kernels of a profile by time and by kind, the operators that launched them, and what bounds the whole."""
    kernels = sorted((e for e in entries if e[3] and e[1] > 0), key=lambda e: -e[1])
    operators = sorted((e for e in entries if not e[3] and e[1] > 0), key=lambda e: -e[1])
    busy = sum(e[1] for e in kernels)
    kinds: dict[str, float] = {}
    for name, ms, _, _ in kernels:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + ms
    kinds = dict(sorted(kinds.items(), key=lambda pair: -pair[1]))
    idle = 1 - min(1.0, busy / wall_ms)
    first = next(iter(kinds), "nothing")
    bound = f"launches: idle for {idle:.0%}" if idle > 0.3 else f"{first}: {kinds.get(first, 0) / max(busy, 1e-9):.0%}"
    return {
        "wall ms": rounded(wall_ms),
        "busy ms": rounded(busy),
        "launches": sum(e[2] for e in kernels),
        "bound by": bound,
        "ms by kind": {kind: rounded(ms, 3) for kind, ms in kinds.items()},
        "kernels": [[name[:90], rounded(ms, 3), count] for name, ms, count, _ in kernels[:16]],
        "operators": [[name[:60], rounded(ms, 3), count] for name, ms, count, _ in operators[:14]],
    }


# Whole steps of the trainer.


class Rate(NamedTuple):
    """A logical step to be timed: images drawn, K, and rows computed at once, or `None` for what fits."""

    preset: str
    images: int
    draws: int
    physical: int | None

    def __str__(self) -> str:
        return f"{self.preset}, {self.images} images, K = {self.draws}, {self.physical or 'fitting'} rows at once"


RATES = (
    Rate("paper", 512, 32, 4096), Rate("small", 4096, 1, 4096), Rate("paper", 4096, 4, 4096),
    Rate("paper", 4096, 1, 4096), Rate("paper", 4096, 4, None), Rate("small", 4096, 1, None),
    Rate("small", 4096, 4, 8192), Rate("small", 2048, 1, 128), Rate("small", 8192, 1, 8192),
    Rate("paper", 512, 32, 8192), Rate("paper", 4096, 1, 2048),
)  # fmt: skip
TINY_RATES = (Rate("paper", 8, 4, 16), Rate("small", 16, 1, 16))


def make_trainer(bench: Bench, rate: Rate) -> DPTrainer:
    """A trainer on random images, which draws about as many of them a step."""
    config = bench.config(rate.preset, noise_multiplicity=rate.draws, max_physical_batch_size=rate.physical)
    side, total = config.data.resolution, 200 if bench.tiny else NUM_IMAGES
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (total, 1, side, side), generator=generator, dtype=torch.uint8)
    names = tuple(str(index) for index in range(NUM_CLASSES))
    private = PrivateImages(pixels, torch.arange(total) % NUM_CLASSES, names)
    secret = SecretGenerator("fast" if bench.is_gpu else "secure", device=bench.device)
    return DPTrainer(
        bench.network(rate.preset),
        private,
        config,
        noise_multiplier=1.0,
        sample_rate=rate.images / total,
        divisor=float(rate.images),
        secret=secret,
    )


def _rate(bench: Bench, rate: Rate) -> dict[str, Any]:
    trainer = make_trainer(bench, rate)
    if bench.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    budget = 1.2 if bench.is_gpu else 0.1
    seconds = median_seconds(trainer.step, bench.device, warm=1, most=10, budget=budget)
    rows = rate.images * rate.draws
    return {**rate._asdict(), "s": rounded(seconds), "rows/s": round(rows / seconds), "peak GiB": _peak_gib(bench)}


def rates(bench: Bench) -> Found:
    """Rows a second of whole noisy steps: draw, gradients, clipping, noise, Adam and average."""
    every = TINY_RATES if bench.tiny else RATES
    for rate in every[:6] if bench.quick else every:
        yield str(rate), attempted(bench.device, _rate, bench, rate)
        forget(bench.device)


SLICES: dict[str, Callable[[Bench], Found]] = {
    "ceilings": ceilings,
    "self_check": self_check,
    "weight_gradients": weight_gradients,
    "methods": methods,
    "rates": rates,
    "profile": profile,
    "normalization": normalization,
    "fused_variants": fused_variants,
    "compiled": compiled,
}
