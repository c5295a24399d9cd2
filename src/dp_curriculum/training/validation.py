"""Refusals: everything that can be refused before a folder is made, a draw is taken or anything is spent."""

from __future__ import annotations

import hashlib
from typing import Any, TypeAlias

import datasets
import torch
from diffusers import UNet2DModel

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.fingerprint import Fingerprint
from dp_curriculum.data.holdout import training_part
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.persons import check_number_of_persons
from dp_curriculum.data.places import DIGITS, check_one_place, settle_channels
from dp_curriculum.data.reading import check_not_empty, read_images
from dp_curriculum.data.sources import open_images, open_rows
from dp_curriculum.data.summary import describe_data
from dp_curriculum.diffusion.edm import edm_loss
from dp_curriculum.diffusion.precision import autocast
from dp_curriculum.diffusion.trainable import weights_to_check
from dp_curriculum.dp_sgd.gradient_check import check_per_image_gradients
from dp_curriculum.lessons.public_images import check_not_private
from dp_curriculum.lessons.table import find_lesson
from dp_curriculum.pipeline_dp_curriculum import NoiseSchedule
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.processes import get_logger
from dp_curriculum.sharing.hub import canonical_dataset_id
from dp_curriculum.training.encoding import Encoder
from dp_curriculum.training.plan import BudgetPlan, plan_budget
from dp_curriculum.training.public_model import without_private_images
from dp_curriculum.training.resuming import check_same_config
from dp_curriculum.training.starting import Start


logger = get_logger(__name__)

Rows: TypeAlias = datasets.Dataset | datasets.DatasetDict | None


def check_folder(config: CurriculumConfig, folder: RunFolder, *, resume: bool, overwrite: bool) -> None:
    folder.check(resume=resume, overwrite=overwrite)
    if resume and folder.config.exists():
        check_same_config(config, folder)


def validate_data(
    config: CurriculumConfig,
    dataset: Rows,
    key: bytes | None = None,
    fingerprint: Fingerprint | None = None,
    start: Start | None = None,
    encoder: Encoder | None = None,
) -> tuple[CurriculumConfig, PrivateImages, BudgetPlan]:
    """Opens and reads the images: the configuration as it is for them, the images of training, and the plan."""
    for stage in config.curriculum.lessons:  # one that there is not is refused before anything is opened
        find_lesson(stage)
    if config.data.has_no_images:
        if dataset is not None:
            raise ValueError(
                "Expected dataset to be left out with --dataset_name=none, which says that there is none."
            )
        return without_private_images(config, start, encoder)
    if dataset is None or config.data.train_data_dir is not None or config.data.dataset_name != DIGITS:
        # For a dataset that is passed, the configuration says where it is from; the Hub is not asked about that.
        check_not_private(config, canonical_dataset_id if dataset is None else None)
    if dataset is None:
        check_one_place(config.data)
    source = open_images(config.data) if dataset is None else open_rows(dataset, config.data)
    if fingerprint is not None:
        source = fingerprint.watch(source)
    config = settle_channels(config, source.num_channels, in_memory=dataset is not None)
    for model in (encoder, start):
        if model is not None:
            model.check_channels(config)
    logger.info("\n".join(describe_data(config, source)))
    size = config.privacy.public_dataset_size
    if size is not None:  # a plan that fails should do so before a large dataset is read
        plan_budget(config, dataset_size=config.data.training_size(size), num_classes=len(source.class_names))
    private = read_images(source, config.data)
    if size is None:
        check_not_empty(private, source)
        check_number_of_persons(len(private.units), config.data)
    num_units = config.data.training_size(len(private.units))
    if key is not None and config.data.holdout is not None:
        private = training_part(private, key, config.data.holdout)
    plan = plan_budget(config, dataset_size=num_units, num_classes=private.num_classes)
    for planned in plan.lessons:
        planned.lesson.check(config, private.class_names)
    if config.privacy.target_delta * plan.dataset_size > 1:
        logger.warning(
            f"--target_delta={config.privacy.target_delta:g} is above 1 / {plan.dataset_size:,} {plan.unit}s: with "
            f"that probability, some {plan.unit} may be revealed outright; a tenth of 1 / {plan.unit}s is customary."
        )
    return config, private, plan


def check_gradients(
    unet: UNet2DModel, config: CurriculumConfig, num_classes: int, schedule: NoiseSchedule | None = None
) -> dict[str, Any]:
    """
    Compares the per-image gradients of this very model with autograd's, image by image, on random inputs: those of
    the weights that noisy steps will train.

    Raises:
        PerImageGradientError: If a gradient is wrong; the message names the parameter. Nothing is spent.
    """
    copies, images = min(2, config.dp_sgd.noise_multiplicity), 2
    generator = torch.Generator().manual_seed(0)
    side, out = unet.config.sample_size, unet.config.out_channels
    shape = (copies * images, unet.config.in_channels, side, side)
    inputs = [torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)]
    sigma = torch.rand(shape[0], generator=generator) + 0.1
    labels = torch.tensor([0, num_classes] * copies)

    def losses(images: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with autocast(unet.device, config.runtime.mixed_precision):
            if not config.has_prior:
                return edm_loss(unet, images, noise, sigma, labels, schedule=schedule)
            # A prior hands the network two images, and adds to its output: what it adds has no parameters.
            output = unet(images, sigma.log() / 4, class_labels=labels).sample
            return (output.float() - noise[:, :out]).square().mean(dim=(1, 2, 3))

    rows = [tensor.to(unet.device) for tensor in (*inputs, sigma, labels)]
    with weights_to_check(unet, config.dp_sgd):
        return check_per_image_gradients(unet, losses, rows, noise_multiplicity=copies)


def data_sha256(private: PrivateImages) -> str:
    """Hash of the data that this process has read. It is compared between processes, and never saved or logged."""
    persons = None if private.persons is None else private.persons.tolist()  # numbers in order of appearance
    digest = hashlib.sha256(repr((private.class_names, private.labels.tolist(), persons)).encode())
    digest.update(memoryview(private.images.contiguous().numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def flat_options(config: CurriculumConfig) -> dict[str, Any]:
    return {f"--{name}": value for section in config.to_dict().values() for name, value in section.items()}
