"""Generated images to be measured or shared; where asked, without those that a classifier puts into another class.

The classifier was trained on generated images alone, and on none that it judges: no private image is read, so that a
filter is post-processing and spends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from dp_curriculum.evaluation.classifiers import SmallCNN, as_classifiers_see, train_cnn
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.runtime.processes import from_main, process_state


MOST_DRAWS = 20  # of an image, until the judge puts it into its class
# Seeds of other draws of an image: torch seeds the generator of a CPU by the lowest 32 bits.
_OTHER_DRAW, _JUDGE_SEED = 100_000_007, 3_000_000_019
_MOST_JUDGE_IMAGES, _LEAST_JUDGE_IMAGES, _PER_CLASS = 10_000, 2_000, 200

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (labels, seeds) to images


@dataclass(frozen=True)
class Judge:
    """A classifier of generated images. Make one with [`train_judge`]."""

    network: SmallCNN

    @torch.no_grad()
    def agrees(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """True for each of the images `(B, C, H, W)` in `[0, 1]` that the network puts into its class, `(B,)`."""
        device = next(self.network.parameters()).device
        return self.network(as_classifiers_see(images.to(device))).argmax(1).cpu() == labels


def train_judge(
    pipeline: DPCurriculumPipeline, *, sampling: Mapping[str, Any] = MappingProxyType({}), num_steps: int = 800
) -> Judge:
    r"""
    Trains a classifier on generated images: 200 per class, but 2,000 to 10,000 in all.

    Their seeds are far from those of images that are shared or measured, so that it judges no image that it was
    trained on. One process trains it, so that all have the same.

    Args:
        pipeline ([`DPCurriculumPipeline`]): The generator.
        sampling (`Mapping`, *optional*): Options of the sampler in place of the saved ones.
        num_steps (`int`, *optional*, defaults to 800): Steps of 128 images.

    Raises:
        ValueError: If the pipeline has one class only.

    Privacy:
        Post-processing of released weights: it spends nothing.
    """
    if pipeline.num_classes < 2:
        raise ValueError("Expected --filter_by_classifier to come with a model of at least 2 classes: this one has 1.")
    count = min(_MOST_JUDGE_IMAGES, max(_LEAST_JUDGE_IMAGES, _PER_CLASS * pipeline.num_classes))
    images, labels = sample_images(pipeline, count, seed=_JUDGE_SEED, sampling=sampling)
    device = pipeline.device if pipeline.device.type == "cuda" else torch.device("cpu")

    def train() -> SmallCNN:
        given = (as_classifiers_see(images.to(device)), labels.to(device))
        return train_cnn(*given, num_classes=pipeline.num_classes, num_steps=num_steps).cpu()

    return Judge(from_main(process_state(), train).to(device))


def draw_agreeing(draw: Draw, labels: torch.Tensor, seeds: torch.Tensor, judge: Judge | None) -> torch.Tensor:
    """
    Draws images, and those that the judge puts into another class again, with other seeds.

    An image stays as it is after its 20th draw, because a model may have a class that nothing recognises.

    Args:
        draw (`Callable`): Images `(B, C, H, W)` of labels `(B,)` and seeds `(B,)`.
        labels (`torch.LongTensor` of shape `(B,)`): Their classes.
        seeds (`torch.LongTensor` of shape `(B,)`): Their seeds.
        judge ([`Judge`], *optional*): The judge; without one, each image is drawn once.
    """
    images = draw(labels, seeds)
    if judge is None:
        return images
    left = torch.arange(len(labels))
    for number in range(1, MOST_DRAWS):
        left = left[~judge.agrees(images[left], labels[left])]
        if not len(left):
            break
        images[left] = draw(labels[left], seeds[left] + number * _OTHER_DRAW)
    return images


def sample_images(
    pipeline: DPCurriculumPipeline,
    num_images: int,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    judge: Judge | None = None,
    sampling: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Generates images with the classes in turn, so that all are as frequent.

    Each process computes a share of them, each image with its own generator, so their number changes no image.
    `batch_size` images are computed at once; if unset, 250 small or 100 large ones on a CPU, and 1,000 elsewhere.
    Images that `judge` puts into another class are drawn again, see [`draw_agreeing`]. `sampling` are options of the
    sampler in place of the saved ones.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Images `(num_images, C, H, W)` in [0, 1] and labels `(num_images,)`, on
        the CPU of every process.
    """
    state = process_state()
    if batch_size is None:
        batch_size = _images_at_once(pipeline)
    labels = torch.arange(num_images) % pipeline.num_classes
    parts = torch.arange(num_images).split(batch_size)
    own = range(state.process_index, len(parts), state.num_processes)

    def draw(labels: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        return draw_images(pipeline, labels, seeds, sampling).cpu()

    images = {}
    for part in tqdm(
        own, desc=f"sampling, {batch_size} images per step", leave=False, disable=not state.is_main_process
    ):
        images[part] = draw_agreeing(draw, labels[parts[part]], seed + parts[part], judge)
    if state.num_processes > 1:
        images = {part: batch for share in gather_object([images]) for part, batch in share.items()}
    return torch.cat([images[part] for part in range(len(parts))]), labels


def _images_at_once(pipeline: DPCurriculumPipeline) -> int:
    if pipeline.device.type != "cpu":
        return 1000
    # 16 % faster than 100 with images of 28 pixels; the memory of larger ones grows with their number.
    return 250 if pipeline.vae is None and pipeline.unet.config.sample_size <= 32 else 100


def draw_images(
    pipeline: DPCurriculumPipeline, labels: torch.Tensor, seeds: torch.Tensor, sampling: Mapping[str, Any]
) -> torch.Tensor:
    """Images `(B, C, H, W)` in `[0, 1]` of labels `(B,)`, each from a generator with its seed `(B,)`."""
    (images,) = pipeline(
        class_labels=labels.tolist(),
        generator=[torch.Generator().manual_seed(number) for number in seeds.tolist()],
        output_type="pt",
        return_dict=False,
        **sampling,
    )
    return images
