"""Time and memory of a run before it starts, measured on random inputs on this machine. It reads no data."""

from __future__ import annotations

import functools
import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dp_curriculum.closed_form_prior import ClosedFormPrior
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.reading import reading_seconds
from dp_curriculum.diffusion.autoencoder import LatentSpace
from dp_curriculum.diffusion.trainable import merge_weights, num_trained
from dp_curriculum.dp_sgd.gradient_engine import PerImageGradients
from dp_curriculum.dp_sgd.memory import gradient_limit
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.lessons.class_sums import CHUNK_VALUES
from dp_curriculum.lessons.matching import match_moments
from dp_curriculum.lessons.planned import LessonGroup, PlannedLesson, plan_lessons
from dp_curriculum.lessons.pretraining import pretrain
from dp_curriculum.pipeline_dp_curriculum import NoiseSchedule, unet_output
from dp_curriculum.runtime.threads import computing_threads
from dp_curriculum.training.encoding import Encoder
from dp_curriculum.training.random_pass import random_pass
from dp_curriculum.training.run import SHEET_CLASSES, SHEET_COLUMNS, blank_prior, blank_unet, secret_generator
from dp_curriculum.training.starting import Start


_PROBE_ROWS = 64
_QUERY_IMAGES, _STEPS = 4000, 3
_TRIES, _TRIAL_SECONDS, _LEAST_SECONDS = 3, 3.0, 0.3
_ENCODED, _DECODED, _MATCHED = 4, 4, (500, 2000)  # images of a trial
# What a process on the CPU takes beyond its tensors, for workspaces and holes between them: benchmarks/memory.py.
_CPU_OVERHEAD, _CPU_WORKSPACE = 1.35, 50e6


@dataclass(frozen=True)
class CostEstimate:
    """
    Time and memory that a run will take.

    Args:
        num_parameters (`int`): Parameters of the network.
        num_trained (`int`): Those that noisy steps train.
        num_threads (`int`): Threads that it will compute on, on a CPU.
        reading_seconds (`float`): Of images that are stored as PNG at the resolution of the run.
        encoding_seconds (`float`): Of their latents, if those are trained on.
        query_seconds (`float`): The queries of all lessons.
        pretraining_seconds (`float`): All lessons together.
        dp_sgd_seconds (`float`): The hard stage.
        sheet_seconds (`float`): The sample sheets.
        memory_bytes (`int`): At the peak of the hard stage; of a run in latents, with the autoencoder, its queries and
            the sheets that are decoded. The libraries and the dataset come on top.
        dataset_bytes (`tuple[int, int]`): Of the dataset, until it is encoded, and afterwards.
        matching_seconds (`float`): Of 10,000 public images that are moved to the released moments. It is no part of
            `seconds`, because a plan does not open the public dataset, and so does not know how many there are.
    """

    num_parameters: int
    num_trained: int
    num_threads: int
    reading_seconds: float
    query_seconds: float
    pretraining_seconds: float
    dp_sgd_seconds: float
    sheet_seconds: float
    memory_bytes: int
    encoding_seconds: float = 0.0
    dataset_bytes: tuple[int, int] = (0, 0)
    matching_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """All together."""
        training = self.pretraining_seconds + self.dp_sgd_seconds
        return self.reading_seconds + self.encoding_seconds + self.query_seconds + training + self.sheet_seconds

    @property
    def peak_bytes(self) -> int:
        """The most on a CPU, the dataset included: what it takes at first is kept when it has become smaller."""
        return self.memory_bytes + self.dataset_bytes[0]


def estimate_cost(
    config: CurriculumConfig,
    *,
    num_classes: int,
    dataset_size: int,
    device: torch.device,
    start: Start | None = None,
    encoder: Encoder | None = None,
) -> CostEstimate:
    """
    Times a few steps of each stage on random inputs, on the threads and in the physical batches that a run will have.

    Args:
        config ([`CurriculumConfig`]): The configuration.
        num_classes (`int`): Number of classes.
        dataset_size (`int`): Public number of images.
        device (`torch.device`): Where the run will be.
        start ([`Start`], *optional*): The model that training starts from; its weights are not needed.
        encoder ([`Encoder`], *optional*): The autoencoder; its weights are not needed.
    """
    data, options = config.data, config.dp_sgd
    schedule = None if start is None else start.schedule
    steps = config.pretraining.pretrain_steps * (len(config.curriculum.lessons) - config.has_prior)
    prior = blank_prior(config, num_classes)
    prior = None if prior is None else prior.to(device)
    unet = blank_unet(config, num_classes, start).to(device)
    groups, space = plan_lessons(config), None if encoder is None else encoder.blank(device)
    pixels, values = data.channels * data.resolution**2, math.prod(config.input_shape)
    with computing_threads(device, config.runtime.cpu_threads) as threads:
        threads.settle(functools.partial(random_pass, unet, config.pretraining.pretrain_batch_size, config))
        num_parameters, trained = sum(parameter.numel() for parameter in unet.parameters()), num_trained(unet, options)
        trainer = _trainer(unet, config, num_classes, prior, schedule)
        images = min(trainer.images_at_once, options.expected_batch_size)
        has_hard = "dp_sgd" in config.curriculum.stages
        noisy_step, memory = _noisy_step_seconds(trainer, images) if has_hard else 0.0, _memory(unet, images, config)
        merge_weights(unet)
        if space is not None:
            queries = _query_bytes(groups, config, num_classes, dataset_size, device)
            memory = _memory_beside(space, memory, queries, num_parameters, config, num_classes)
        return CostEstimate(
            num_parameters=num_parameters,
            num_trained=trained,
            num_threads=torch.get_num_threads(),
            reading_seconds=reading_seconds(data, dataset_size),
            query_seconds=_query_seconds(groups, config, num_classes, dataset_size, device),
            pretraining_seconds=_pretraining_step_seconds(unet, config, prior, schedule) * steps if steps else 0.0,
            dp_sgd_seconds=noisy_step * options.num_dp_steps,
            sheet_seconds=_sheets_seconds(unet, config, num_classes, len(groups), prior, space),
            memory_bytes=memory,
            encoding_seconds=0.0 if space is None else _encoding_seconds(space, config) * dataset_size,
            matching_seconds=_matching_seconds(prior, config),
            dataset_bytes=(dataset_size * (pixels + (0 if space is None else values)), dataset_size * values),
        )


def _seconds(compute: Callable[[], object], device: torch.device) -> float:
    """The mean of a few tries, after one that makes what is made at first use."""
    compute()
    taken: list[float] = []
    while sum(taken) < _LEAST_SECONDS or (len(taken) < _TRIES and sum(taken) < _TRIAL_SECONDS):
        start = time.perf_counter()
        compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return sum(taken) / len(taken)


def _random_images(config: CurriculumConfig, count: int, num_classes: int) -> PrivateImages:
    """Images of random pixels."""
    shape = (count, *config.input_shape)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return PrivateImages(pixels, torch.arange(count) % num_classes, tuple(map(str, range(num_classes))))


def _trainer(
    unet: UNet2DModel,
    config: CurriculumConfig,
    num_classes: int,
    prior: ClosedFormPrior | None,
    schedule: NoiseSchedule | None,
) -> DPTrainer:
    """A trainer on one random image per class, whose steps draw none."""
    return DPTrainer(
        unet,
        _random_images(config, num_classes, num_classes),
        config,
        noise_multiplier=1.0,
        sample_rate=0.0,
        divisor=float(config.dp_sgd.expected_batch_size),
        secret=secret_generator(config, unet.device),
        prior=prior,
        schedule=schedule,
    )


def _noisy_step_seconds(trainer: DPTrainer, images: int) -> float:
    """Passes over the images that a step has on average, of all classes, noise and update."""
    rows = torch.arange(images) % trainer.private.num_classes
    passes = trainer.config.dp_sgd.expected_batch_size / images
    with trainer.attached():
        one_pass = _seconds(lambda: trainer.try_rows(rows), trainer.device)
        part = _seconds(lambda: trainer.try_rows(rows[: -(-images // 2)]), trainer.device)
        update = _seconds(trainer.step, trainer.device)
    # A draw ends within a physical batch, in the middle on average: what a pass costs whatever its size comes once
    # more in every second step.
    fixed = one_pass if trainer.has_constant_batches else max(0.0, 2 * part - one_pass)
    return passes * one_pass + update + (fixed / 2 if passes > 1 else 0.0)


def _pretraining_step_seconds(
    unet: UNet2DModel, config: CurriculumConfig, prior: ClosedFormPrior | None, schedule: NoiseSchedule | None
) -> float:

    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (count, *config.input_shape)
        images = torch.rand(shape, generator=generator, device=unet.device)
        return images, torch.zeros(count, dtype=torch.int64, device=unet.device)

    def steps() -> None:
        generator = torch.Generator(unet.device).manual_seed(0)
        pretrain(
            unet,
            draw,
            config,
            prior=prior,
            schedule=schedule,
            generator=generator,
            num_steps=_STEPS,
            disable_progress_bar=True,
        )

    return _seconds(steps, unet.device) / _STEPS


def _query_seconds(
    groups: Sequence[LessonGroup], config: CurriculumConfig, num_classes: int, dataset_size: int, device: torch.device
) -> float:
    """The queries of all lessons; those of a large dataset from what two small ones take."""
    large = min(dataset_size, _QUERY_IMAGES)
    small = large // 4

    def seconds(planned: PlannedLesson, count: int) -> float:
        images, secret = _random_images(config, count, num_classes), secret_generator(config, device)
        release = planned.lesson.release
        return _seconds(lambda: release(images, config, planned.mechanisms, dataset_size, secret), device)

    total = 0.0
    for planned in (planned for group in groups for planned in group if planned.mechanisms):
        most = seconds(planned, large)
        slope = max(0.0, most - seconds(planned, small)) / (large - small) if dataset_size > large else 0.0
        total += most + slope * (dataset_size - large)
    return total


@torch.no_grad()
def _sheets_seconds(
    unet: UNet2DModel,
    config: CurriculumConfig,
    num_classes: int,
    num_groups: int,
    prior: ClosedFormPrior | None,
    space: LatentSpace | None,
) -> float:
    """All sample sheets: one after each lesson, some between noisy steps, and the last."""
    sampler, every = config.sampler, config.runtime.sample_steps
    num_sheets = num_groups + 1
    if every and "dp_sgd" in config.curriculum.stages:
        num_sheets += config.dp_sgd.num_dp_steps // every
    rows = SHEET_COLUMNS * min(SHEET_CLASSES, num_classes) * (1 if sampler.guidance_scale == 1 else 2)
    inputs = torch.zeros(rows, *config.input_shape)
    inputs, labels = inputs.to(unet.device), torch.zeros(rows, dtype=torch.int64, device=unet.device)
    levels = torch.ones(rows, device=unet.device)

    def call() -> None:
        if prior is None:
            unet_output(unet, inputs, levels, labels)
        else:
            prior.denoise(functools.partial(unet_output, unet), inputs, levels, labels)

    one_call = _seconds(call, unet.device)
    decoding = 0.0
    if space is not None:
        few = _images_of_sheet(config, num_classes)[:_DECODED]
        decoding = _seconds(lambda: space.decode(few), unet.device) * _sheet_size(num_classes) / len(few)
    return num_sheets * ((2 * sampler.num_inference_steps - 1) * one_call + decoding)


def _sheet_size(num_classes: int) -> int:
    return SHEET_COLUMNS * min(SHEET_CLASSES, num_classes)


def _images_of_sheet(config: CurriculumConfig, num_classes: int) -> torch.Tensor:
    return torch.full((_sheet_size(num_classes), *config.input_shape), 0.5)


def _matching_seconds(prior: ClosedFormPrior | None, config: CurriculumConfig) -> float:
    """Seconds that 10,000 public images take to be moved to the moments, if some will be."""
    if prior is None or "public" not in config.curriculum.stages or not config.matches_public_images:
        return 0.0
    few, many = _MATCHED
    images = _random_images(config, many, 1).images
    least = _seconds(lambda: match_moments(images[:few], prior), prior.means.device)
    most = _seconds(lambda: match_moments(images, prior), prior.means.device)
    return most + max(0.0, most - least) / (many - few) * (10_000 - many)


def _encoding_seconds(space: LatentSpace, config: CurriculumConfig) -> float:
    """Seconds that the latents of one image take."""
    return _seconds(lambda: space.encode(_blank_images(config, _ENCODED)), space.vae.device) / _ENCODED


def _blank_images(config: CurriculumConfig, count: int) -> torch.Tensor:
    side = config.data.resolution
    return torch.zeros(count, config.data.channels, side, side, dtype=torch.uint8)


def _memory(unet: UNet2DModel, images: int, config: CurriculumConfig) -> int:
    """Bytes at the peak of a step over `images`, from the tensors of passes over a few."""
    options, runtime, device = config.dp_sgd, config.runtime, unet.device
    rows = options.noise_multiplicity
    probe_images = max(1, min(images, _PROBE_ROWS // rows))
    engine = PerImageGradients(
        unet,
        noise_multiplicity=rows,
        mode=runtime.per_image_gradients,
        memory_limit=gradient_limit(device, runtime.gradient_memory_limit) * probe_images // images,
    )

    def backward(losses: torch.Tensor) -> None:
        engine.backward(losses)
        engine.accumulate_clipped(options.dp_max_grad_norm)

    def peak(count: int) -> int:
        with _PeakBytes() as tracked:
            random_pass(unet, count * rows, config, backward)
        return tracked.peak

    fewer, slope = (probe_images + 1) // 2, 0.0
    with engine:
        most = peak(probe_images)
    if fewer < probe_images:
        with engine:  # anew, for it keeps the memory of gradients from pass to pass
            slope = (most - peak(fewer)) / (probe_images - fewer)
    # Weights, and of those that are trained two moments and average, in float32; beside them a pass, or the update
    # after it: the sum, the gradient, and noise and noisy sum in float64.
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    passing, updating = most + slope * (images - probe_images), (2 * 4 + 2 * 8) * trained
    memory = 4 * num_parameters + 3 * 4 * trained + max(passing, updating)
    return int(_CPU_OVERHEAD * memory + _CPU_WORKSPACE) if device.type == "cpu" else int(memory)


def _memory_beside(
    space: LatentSpace, training: int, queries: int, num_parameters: int, config: CurriculumConfig, num_classes: int
) -> int:
    """
    Bytes at the peak of a run with an autoencoder, which stays in memory: beside training, those of encoding an image,
    of the queries and of a sheet that is decoded.
    """
    own = 4 * sum(parameter.numel() for parameter in space.vae.parameters())
    encoding = _peak(lambda: space.encode(_blank_images(config, 1)))
    images = _images_of_sheet(config, num_classes)
    beside = 4 * 4 * num_parameters  # weights and average of the network, and the moments of its updates
    most = max(encoding, max(queries, _peak(lambda: space.decode(images))) + beside)
    if space.vae.device.type != "cpu":
        return own + max(training, most)
    # What is freed is kept there, and training does not find room in all of its holes: benchmarks/latents.py.
    return training + int(_CPU_OVERHEAD * (own + most))


def _peak(compute: Callable[[], object]) -> int:
    with _PeakBytes() as tracked:
        compute()
    return tracked.peak


def _query_bytes(
    groups: Sequence[LessonGroup], config: CurriculumConfig, num_classes: int, dataset_size: int, device: torch.device
) -> int:
    """Bytes at the peak of the queries of all lessons, which take a chunk of the images at once."""
    at_once = max(1, min(dataset_size, CHUNK_VALUES // math.prod(config.input_shape)))
    tried = min(at_once, _QUERY_IMAGES)

    def peak(planned: PlannedLesson) -> float:
        images, secret = _random_images(config, tried, num_classes), secret_generator(config, device)
        release = planned.lesson.release
        found = _peak(lambda: release(images, config, planned.mechanisms, dataset_size, secret))
        return found * at_once / tried

    return int(max((peak(planned) for group in groups for planned in group if planned.mechanisms), default=0))


class _PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the context take at once, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._current = 0, 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self._current += size
        self.peak = max(self.peak, self._current)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._current -= size
