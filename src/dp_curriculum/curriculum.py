"""The curriculum: stages from easy to hard, in order, on one ledger."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.logging import get_logger
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from dp_curriculum.checkpointing import latest_checkpoint, save_checkpoint
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages, find_columns, open_dataset, read_images
from dp_curriculum.dp_finetuning import DPTrainer, finetune, stop_on_signal
from dp_curriculum.edm import edm_loss
from dp_curriculum.finishing import save_release
from dp_curriculum.ledger import PrivacyLedger, PrivacyReport
from dp_curriculum.lessons import find_lesson
from dp_curriculum.per_image_gradients import check_per_image_gradients
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.plan import DP_SGD, BudgetPlan, plan_budget
from dp_curriculum.pretraining import Draw, pretrain
from dp_curriculum.run import (
    Run,
    broadcast_weights,
    initial_unet,
    make_accelerator,
    public_generator,
    secret_generator,
)
from dp_curriculum.run_folder import RunFolder
from dp_curriculum.sheets import save_sheet


logger = get_logger(__name__)

_SHEET_COLUMNS = 8


@dataclass(frozen=True)
class CurriculumResult:
    """
    What a run leaves behind.

    Args:
        pipeline ([`DPCurriculumPipeline`]): The generator, as saved.
        ledger (`Path`): The ledger's file.
        report ([`PrivacyReport`]): What was spent.
        finished (`bool`): Whether all steps were taken; `False` after Ctrl-C.
    """

    pipeline: DPCurriculumPipeline
    ledger: Path
    report: PrivacyReport
    finished: bool


# --- the stages ----------------------------------------------------------------------------------------------------


def lesson_stage(run: Run, number: int, stage: str) -> None:
    """Easy: releases a lesson once, keeps it for a resumed run, and pretrains on it, which spends nothing."""
    folder = run.folder.lesson(number, stage)
    weights = folder / "unet"
    if weights.is_dir():
        run.unet.load_state_dict(UNet2DModel.from_pretrained(weights).state_dict())
        return
    released = {
        name: tensor.to(run.accelerator.device)
        for name, tensor in _released(run, stage, folder / "released.safetensors").items()
    }
    resolution, lesson = run.config.data.resolution, find_lesson(stage)

    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return lesson.draw(released, count, resolution, generator)

    if not run.quiet:
        _save_lesson_sheet(run.folder.lesson_sheet(stage), released, draw, run)
    first_step = (number - 1) * run.config.pretraining.pretrain_steps
    pretrain(
        run.unet,
        draw,
        run.config,
        generator=run.generator,
        num_processes=run.accelerator.num_processes,
        description=f"lesson {stage}, spends nothing",
        on_step=lambda step, loss: run.accelerator.log({f"{stage}/loss": loss}, step=first_step + step),
        should_stop=run.stop.agreed,
        disable_progress_bar=run.quiet,
    )
    run.save_samples(run.unet.eval(), run.folder.sheets / f"after-{stage}.png")
    if not run.quiet and not run.stop.requested:
        temporary = folder / ".tmp-unet"
        run.unet.save_pretrained(temporary)
        os.replace(temporary, weights)


def _released(run: Run, stage: str, path: Path) -> Mapping[str, torch.Tensor]:
    """The released tensors of a lesson: charged, drawn by the main process, saved; or those of an earlier try."""
    lesson = find_lesson(stage)
    if not path.exists():
        planned = lesson.plan(run.config)
        for mechanism in planned:
            run.reserve(mechanism, mechanism.event.num_steps)
        if run.accelerator.is_main_process:
            tensors, events = lesson.release(run.private, run.config, run.plan.dataset_size, run.secret)
            assert events == tuple(mechanism.event for mechanism in planned), f"{stage} spent what was not charged"
            _save_tensors(tensors, path)
        run.accelerator.wait_for_everyone()
    return load_file(path)


def dp_sgd_stage(run: Run) -> None:
    """Hard: DP-SGD on the images, from the last checkpoint where there is one."""
    planned = run.plan.dp_sgd
    assert planned is not None, "the plan has a hard stage"
    trainer = DPTrainer(
        run.unet,
        run.private,
        run.config,
        noise_multiplier=planned.event.noise_multiplier,
        sample_rate=planned.event.sample_rate,
        divisor=planned.event.sample_rate * run.plan.dataset_size,
        secret=run.secret,
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
    )
    checkpoint, passed_over = latest_checkpoint(run.folder.checkpoints)
    for line in passed_over:
        logger.warning(line)
    if checkpoint is not None:
        trainer.load_state(checkpoint.step, checkpoint.tensors)
    charged = run.from_main(lambda ledger: _charged_steps(ledger, DP_SGD))
    left = planned.event.num_steps - charged
    if charged > trainer.num_steps_taken:
        lost = charged - trainer.num_steps_taken
        logger.warning(f"{lost} charged steps were lost to an interruption: training goes on for {left} steps.")
    _run_dp_sgd(run, trainer, left)
    with trainer.averaged_weights() as unet:
        averaged = {name: value.clone() for name, value in unet.state_dict().items()}
    run.unet.load_state_dict(averaged)


def _run_dp_sgd(run: Run, trainer: DPTrainer, num_steps: int) -> None:
    runtime, planned = run.config.runtime, run.plan.dp_sgd
    assert planned is not None
    total = trainer.num_steps_taken + num_steps
    first_step = len(run.config.curriculum.lessons) * run.config.pretraining.pretrain_steps
    bar = tqdm(total=total, initial=trainer.num_steps_taken, desc="hard stage", disable=run.quiet)

    def on_step(trainer: DPTrainer) -> None:
        bar.update()
        if runtime.sample_steps and trainer.num_steps_taken % runtime.sample_steps == 0:
            with trainer.averaged_weights() as unet:
                run.save_samples(unet, run.folder.sheets / f"dp-step-{trainer.num_steps_taken:06d}.png")

    def on_block(trainer: DPTrainer) -> None:
        epsilon = run.epsilon()
        values: dict[str, float] = {"dp_sgd/learning_rate": float(trainer.lr_scheduler.get_last_lr()[0])}
        if epsilon is not None:
            bar.set_postfix(epsilon=f"{epsilon:.3f}")
            values["privacy/epsilon"] = epsilon
        run.accelerator.log(values, step=first_step + trainer.num_steps_taken)
        if run.ledger is not None:
            save_checkpoint(
                run.folder.checkpoints,
                step=trainer.num_steps_taken,
                tensors=trainer.state(),
                facts={"ledger_head": list(run.ledger.head)},
                total_limit=runtime.checkpoints_total_limit,
            )

    finetune(
        trainer,
        num_steps=num_steps,
        block=runtime.checkpointing_steps,
        reserve=lambda steps: run.reserve(planned, steps),
        give_back=lambda steps: run.give_back(planned, steps),
        on_step=on_step,
        on_block=on_block,
        stop=run.stop,
    )
    bar.close()


def run_stages(run: Run) -> None:
    """All stages in order; a stop request ends after the step under way."""
    for number, stage in enumerate(run.config.curriculum.stages, start=1):
        if run.stop.agreed():
            return
        if stage == "dp_sgd":
            dp_sgd_stage(run)
        else:
            lesson_stage(run, number, stage)


# --- the run -------------------------------------------------------------------------------------------------------


def run_curriculum(
    config: CurriculumConfig,
    dataset: datasets.Dataset | None = None,
    *,
    output_dir: str | Path,
    resume: bool = False,
    overwrite_output_dir: bool = False,
) -> CurriculumResult:
    r"""
    Trains from easy to hard under one privacy budget and saves pipeline, report, card and sample sheet.

    Args:
        config ([`CurriculumConfig`]): Public constants of the run.
        dataset (`datasets.Dataset`, *optional*): The private images; opened as `config.data` says if unset.
        output_dir (`str` or `Path`): A new or empty folder.
        resume (`bool`, *optional*, defaults to `False`): Go on with the run that is in `output_dir`.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`): Replace the run that is in `output_dir`. What
            it released stays released: its epsilon adds to that of the new run if both are shared.

    Returns:
        [`CurriculumResult`]

    Privacy:
        The weights after each noisy step, their averages, the lessons and everything made from them are released
        together at the epsilon of the report, for one image under the configured adjacency.

    Raises:
        ValueError: If the configuration, the dataset or the folder does not fit; nothing is spent.
        PrivacyBudgetExceeded: If the lessons alone spend the budget; nothing is spent.
    """
    folder = RunFolder(Path(output_dir))
    folder.check(resume=resume, overwrite=overwrite_output_dir)
    if resume:
        _check_same_config(config, folder)
    accelerator = make_accelerator(config, folder)
    private, plan = _validate(config, dataset)
    unet = initial_unet(config, plan.num_classes, accelerator)
    gradient_check = check_gradients(unet, config, plan.num_classes) if plan.dp_sgd is not None else None
    if accelerator.is_main_process:
        folder.prepare(overwrite=overwrite_output_dir and not resume)
        config.to_yaml(folder.config)
    accelerator.wait_for_everyone()
    if config.runtime.report_to != "none":
        accelerator.init_trackers(config.runtime.tracker_project_name)
    ledger = _open_ledger(folder) if accelerator.is_main_process else None
    try:
        run = Run(
            config=config,
            folder=folder,
            accelerator=accelerator,
            private=private,
            plan=plan,
            ledger=ledger,
            secret=secret_generator(config, accelerator.device),
            generator=public_generator(config, accelerator),
            unet=unet,
        )
        run.plan = run.from_main(lambda ledger: _plan_to_go_on_with(run, ledger))
        if ledger is not None and config.privacy.non_private and not ledger.not_private_reasons:
            ledger.mark_not_private("trained without noise, on request")
        if ledger is not None and not run.secret.is_private:
            ledger.mark_not_private("masks and noise do not come from secret randomness")
        with stop_on_signal() as run.stop:
            run_stages(run)
        return _finish(run, gradient_check)
    finally:
        if ledger is not None:
            ledger.close()
        if config.runtime.report_to != "none":
            accelerator.end_training()


def _validate(config: CurriculumConfig, dataset: datasets.Dataset | None) -> tuple[PrivateImages, BudgetPlan]:
    """Everything that can be refused is refused here, before a folder is made or a draw is taken."""
    opened = open_dataset(config.data) if dataset is None else dataset
    size = config.privacy.public_dataset_size
    if opened.features is not None:
        class_names = find_columns(opened.features, config.data)[2]
        if size is not None:  # a plan that fails should do so before a large dataset is read
            plan_budget(config, dataset_size=size, num_classes=len(class_names))
    private = read_images(opened, config.data, streamed=dataset is None)
    plan = plan_budget(config, dataset_size=len(private), num_classes=private.num_classes)
    if config.privacy.target_delta * plan.dataset_size > 1:
        logger.warning(
            f"--target_delta={config.privacy.target_delta:g} is above 1 / {plan.dataset_size:,} images: with that "
            "probability, some image may be revealed outright; a tenth of 1 / images is customary."
        )
    return private, plan


def _open_ledger(folder: RunFolder) -> PrivacyLedger:
    checkpoint, _ = latest_checkpoint(folder.checkpoints)
    head = (
        None if checkpoint is None else (int(checkpoint.facts["ledger_head"][0]), checkpoint.facts["ledger_head"][1])
    )
    return PrivacyLedger.open(folder.ledger, expected_at_least=head)


def _charged_steps(ledger: PrivacyLedger, name: str) -> int:
    """Steps of a mechanism that are charged already, by this process or one before it."""
    return sum(row["num_steps"] for row in ledger.mechanisms if row["name"] == name)


def _plan_to_go_on_with(run: Run, ledger: PrivacyLedger) -> BudgetPlan:
    """The plan of a run that may have begun: its hard stage is calibrated anew only where that has not."""
    plan, config = run.plan, run.config
    if not ledger.events or plan.dp_sgd is None:
        return plan
    hard = [row["noise_multiplier"] for row in ledger.mechanisms if row["name"] == DP_SGD]
    if hard:
        event = replace(plan.dp_sgd.event, noise_multiplier=hard[0])
        return replace(plan, stages=(*plan.stages[:-1], replace(plan.dp_sgd, event=event)))
    # A lesson that crashed between charge and save is paid twice; the hard stage makes room for it.
    unsaved = [
        mechanism.event
        for number, stage in enumerate(config.curriculum.lessons, start=1)
        if not (run.folder.lesson(number, stage) / "released.safetensors").exists()
        for mechanism in find_lesson(stage).plan(config)
    ]
    return plan_budget(
        config,
        dataset_size=plan.dataset_size,
        num_classes=plan.num_classes,
        prior_events=(*ledger.events, *unsaved),
    )


def _check_same_config(config: CurriculumConfig, folder: RunFolder) -> None:
    before, now = CurriculumConfig.from_yaml(folder.config).to_dict(), config.to_dict()
    for section in before:
        for name, value in before[section].items():
            if section != "runtime" and now[section][name] != value:
                raise ValueError(
                    f"Expected --{name}={now[section][name]} to be {value}, as the run in --output_dir={folder.root} "
                    "has it: --resume cannot change the mechanism."
                )


def check_gradients(unet: UNet2DModel, config: CurriculumConfig, num_classes: int) -> dict[str, Any]:
    """
    Compares the per-image gradients of this very model with autograd's, image by image, on random inputs.

    Raises:
        PerImageGradientError: If a gradient is wrong; the message names the parameter. Nothing is spent.
    """
    copies, images = min(2, config.dp_sgd.noise_multiplicity), 2
    generator = torch.Generator().manual_seed(0)
    shape = (copies * images, config.data.num_channels, config.data.resolution, config.data.resolution)
    inputs = [torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)]
    sigma = torch.rand(shape[0], generator=generator) + 0.1
    labels = torch.tensor([0, num_classes] * copies)

    def losses(images: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(unet.device.type, torch.bfloat16, enabled=config.runtime.mixed_precision == "bf16"):
            return edm_loss(unet, images, noise, sigma, labels, sigma_data=config.model.sigma_data)

    rows = [tensor.to(unet.device) for tensor in (*inputs, sigma, labels)]
    return check_per_image_gradients(unet, losses, rows, noise_multiplicity=copies)


def _finish(run: Run, gradient_check: dict[str, Any] | None) -> CurriculumResult:
    """Saves the release, and reads the pipeline back as a user will."""
    finished = not run.stop.requested
    broadcast_weights(run.unet, run.accelerator)
    report = save_release(run, gradient_check) if run.ledger is not None else None
    run.accelerator.wait_for_everyone()
    if report is None:
        report = PrivacyReport.from_file(run.folder.privacy)
    pipeline = DPCurriculumPipeline.from_pretrained(run.folder.root)
    return CurriculumResult(pipeline, run.folder.ledger, report, finished)


def _save_lesson_sheet(path: Path, released: Mapping[str, torch.Tensor], draw: Draw, run: Run) -> None:
    """What a lesson teaches: the released images where they are few, else some draws, one class a row."""
    num_classes = run.private.num_classes
    if "images" in released and len(released["images"]) <= _SHEET_COLUMNS * num_classes:
        images, labels, columns = (
            released["images"],
            released["labels"],
            max(10, len(released["images"]) // num_classes),
        )
    else:
        images, labels = draw(8 * _SHEET_COLUMNS * num_classes, torch.Generator(run.accelerator.device).manual_seed(0))
        first = torch.cat([(labels == label).nonzero()[:_SHEET_COLUMNS, 0] for label in range(min(10, num_classes))])
        images, labels, columns = images[first], labels[first], _SHEET_COLUMNS
    save_sheet(images[labels.argsort(stable=True)], path, columns=columns)


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, path)
