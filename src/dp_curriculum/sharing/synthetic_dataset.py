"""A labelled dataset of generated images as parquet, in Hub layout: written in parts, in constant memory."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from diffusers import EDMEulerScheduler
from PIL import Image
from tqdm.auto import tqdm

from dp_curriculum.evaluation.sampling import Judge, draw_agreeing, draw_images, train_judge
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.runtime.checkpointing import appearing, save_text
from dp_curriculum.runtime.processes import from_main, jointly, process_state


_ROW_GROUP = 1000  # rows held in memory at once
MANIFEST = "synthesis.json"  # what a later try must have in common with the first; it stays here


@dataclass(frozen=True, kw_only=True)
class SynthesisOptions:
    r"""
    Options that decide which images are made.

    Args:
        num_images (`int`): Number of images.
        label_prior (`tuple[float, ...]`, *optional*): Public weight of each class; all equal if unset. Weights
            counted from the private labels would be another release.
        num_inference_steps (`int`, *optional*): Denoising steps; as saved with the pipeline if unset.
        guidance_scale (`float`, *optional*): Classifier-free guidance; as saved if unset.
        s_churn (`float`, *optional*): Noise put back while sampling; as saved if unset.
        seed (`int`, *optional*, defaults to 0): Image i is made from `seed + i`, whatever the batches are.
        images_per_shard (`int`, *optional*, defaults to 5000): Images of one file; an interruption loses at most one.
        filter_by_classifier (`bool`, *optional*, defaults to `False`): Draw images again that a classifier of other
            generated images puts into another class.
    """

    num_images: int
    label_prior: tuple[float, ...] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    s_churn: float | None = None
    seed: int = 0
    images_per_shard: int = 5000
    filter_by_classifier: bool = False

    def __post_init__(self) -> None:
        for name in ("num_images", "images_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected --{name}={getattr(self, name)} to be positive.")
        prior = self.label_prior
        if prior is not None and not (all(np.isfinite(prior)) and min(prior) >= 0 and sum(prior) > 0):
            raise ValueError(f"Expected --label_prior={prior} to be weights of at least 0, not all of them 0.")

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of the sampler; those that are `None` are as saved."""
        return {name: getattr(self, name) for name in ("num_inference_steps", "guidance_scale", "s_churn")}

    @property
    def shards(self) -> list[range]:
        """The images of each file."""
        step = self.images_per_shard
        return [range(first, min(first + step, self.num_images)) for first in range(0, self.num_images, step)]

    def shard_name(self, shard: int) -> str:
        return f"data/train-{shard:05d}-of-{len(self.shards):05d}.parquet"


@dataclass(frozen=True)
class Synthesis:
    """Files of the dataset, images per second of all processes, and of the network alone; `None` if all was there."""

    names: tuple[str, ...]
    images_per_second: float | None
    network_images_per_second: float | None


def plan_labels(options: SynthesisOptions, num_classes: int) -> np.ndarray:
    """
    The class of each image: classes in turn, or shuffled with counts as near to the prior as whole numbers are.

    Raises:
        ValueError: If the prior has another number of classes.
    """
    if options.label_prior is None:
        return (np.arange(options.num_images) % num_classes).astype(np.int32)
    if len(options.label_prior) != num_classes:
        raise ValueError(
            f"Expected --label_prior={options.label_prior} to have one weight for each of the {num_classes} classes."
        )
    exact = np.array(options.label_prior) / sum(options.label_prior) * options.num_images
    counts = np.floor(exact).astype(int)
    largest = np.argsort(counts - exact, kind="stable")[: options.num_images - counts.sum()]
    counts[largest] += 1
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), counts)
    return np.random.default_rng(options.seed).permutation(labels)


def synthesize(
    pipeline: DPCurriculumPipeline,
    folder: Path,
    options: SynthesisOptions,
    *,
    batch_size: int = 64,
    disable_progress_bar: bool = False,
) -> Synthesis:
    r"""
    Writes the images that are not there yet. Each process writes whole files; their number changes no image.

    Args:
        pipeline ([`DPCurriculumPipeline`]): The generator.
        folder (`Path`): Target. The folder of an interrupted try with the same options is continued.
        options ([`SynthesisOptions`]): Which images.
        batch_size (`int`, *optional*, defaults to 64): Images computed at once.
        disable_progress_bar (`bool`, *optional*, defaults to `False`): Whether to show no progress.

    Raises:
        ValueError: If the options do not fit the model, or the folder holds another dataset or other things.

    Privacy:
        Post-processing of released weights: it spends nothing.
    """
    if batch_size < 1:
        raise ValueError(f"Expected --batch_size={batch_size} to be positive.")
    labels = plan_labels(options, pipeline.num_classes)
    state = process_state()
    from_main(state, lambda: _claim_folder(pipeline, folder, options))
    pipeline.set_progress_bar_config(disable=True)
    names = tuple(options.shard_name(shard) for shard in range(len(options.shards)))
    # Asked once: files of the others appear meanwhile.
    missing = from_main(state, lambda: [shard for shard, name in enumerate(names) if not (folder / name).exists()])
    own = missing[state.process_index :: state.num_processes]
    left = sum(len(options.shards[shard]) for shard in missing)
    bar = tqdm(
        total=sum(len(options.shards[shard]) for shard in own),
        unit="image",
        disable=disable_progress_bar or not state.is_main_process,
    )

    def write_own() -> None:
        for shard in own:
            rows = options.shards[shard]
            _write_shard(pipeline, folder / names[shard], rows, labels, options, judge, batch_size, bar)

    judge = train_judge(pipeline, sampling=options.sampling) if options.filter_by_classifier and left else None
    start = time.perf_counter()
    with bar:
        jointly(state, write_own)
    seconds = time.perf_counter() - start
    if not left:
        return Synthesis(names, None, None)
    alone = state.num_processes * network_rate(pipeline, options, min(batch_size, left))
    return Synthesis(names, left / seconds, alone)


def network_rate(pipeline: DPCurriculumPipeline, options: SynthesisOptions, batch_size: int) -> float:
    """Images per second if sampling were calls of the network and nothing else: as many as an image takes, timed."""
    saved, unet = pipeline.config.sampling or {}, pipeline.unet
    steps = options.num_inference_steps or int(saved.get("num_inference_steps", 18))
    guidance = options.guidance_scale if options.guidance_scale is not None else saved.get("guidance_scale", 1.0)
    calls = 2 * steps - 1 if isinstance(pipeline.scheduler, EDMEulerScheduler) else steps
    rows = batch_size * (2 if guidance > 1 else 1)
    shape = (rows, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    images = torch.zeros(shape, device=unet.device, dtype=unet.dtype)
    labels = torch.zeros(rows, dtype=torch.long, device=unet.device)
    time_of_noise = torch.zeros(1, device=unet.device)
    with torch.no_grad():
        unet(images, time_of_noise, class_labels=labels)  # the first call of a shape is slower
        start = time.perf_counter()
        for _ in range(calls):
            output = unet(images, time_of_noise, class_labels=labels).sample
        output.sum().item()  # waits for the device
    return batch_size / (time.perf_counter() - start)


def dataset_features(pipeline: DPCurriculumPipeline) -> datasets.Features:
    """Columns of the dataset: `image`, and `label` with the names of the classes."""
    names = sorted(pipeline.labels, key=pipeline.labels.__getitem__)
    names = names or [str(index) for index in range(pipeline.num_classes)]
    return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})


def _claim_folder(pipeline: DPCurriculumPipeline, folder: Path, options: SynthesisOptions) -> None:
    """Makes the folder, or finds that an earlier try with the same options and model did."""
    facts = asdict(options)
    if not options.filter_by_classifier:  # as an earlier version wrote it, so that its dataset can be continued
        del facts["filter_by_classifier"]
    ours = json.dumps({**facts, "model": _fingerprint(pipeline)}, indent=2)
    manifest = folder / MANIFEST
    if manifest.exists():
        if manifest.read_text(encoding="utf-8") != ours:
            raise ValueError(
                f"Refusing to continue the dataset in --output_dir={folder}: it is of another model or other options. "
                "Name another folder."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"Expected --output_dir={folder} to be a new or empty folder.")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    save_text(manifest, ours)


def _fingerprint(pipeline: DPCurriculumPipeline) -> str:
    digest = hashlib.sha256(json.dumps(dict(pipeline.config.sampling or {}), sort_keys=True).encode())
    parts = (pipeline.prior, pipeline.vae)
    for model in (pipeline.unet, *(part for part in parts if part is not None)):
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _write_shard(
    pipeline: DPCurriculumPipeline,
    path: Path,
    indices: range,
    labels: np.ndarray,
    options: SynthesisOptions,
    judge: Judge | None,
    batch_size: int,
    bar: tqdm,
) -> None:
    """Writes one file under another name first: what has its name is whole."""
    schema = dataset_features(pipeline).arrow_schema
    with appearing(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        rows: list[dict[str, object]] = []
        for start in range(indices.start, indices.stop, batch_size):
            batch = range(start, min(start + batch_size, indices.stop))
            pictures = _generate(pipeline, batch, labels[batch.start : batch.stop], options, judge)
            rows += [
                {"image": {"bytes": _png(picture), "path": None}, "label": int(labels[index])}
                for index, picture in zip(batch, pictures)
            ]
            bar.update(len(batch))
            if len(rows) >= _ROW_GROUP or batch.stop == indices.stop:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                rows = []


def _generate(
    pipeline: DPCurriculumPipeline, batch: range, labels: np.ndarray, options: SynthesisOptions, judge: Judge | None
) -> Iterator[Image.Image]:
    def draw(labels: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        return draw_images(pipeline, labels, seeds, options.sampling).cpu()

    seeds = options.seed + torch.arange(batch.start, batch.stop)
    images = draw_agreeing(draw, torch.from_numpy(labels).long(), seeds, judge)
    yield from pipeline.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
