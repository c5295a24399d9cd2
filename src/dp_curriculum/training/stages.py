"""What the stages of a curriculum do: lessons are released and learned, DP-SGD goes on from checkpoints."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.sheets import save_sheet
from dp_curriculum.dp_sgd.trainer import DPTrainer, finetune
from dp_curriculum.lessons.lesson import hold_out
from dp_curriculum.lessons.pretraining import Draw, mixed, pretrain
from dp_curriculum.lessons.table import find_lesson
from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.runs.run_contents import (
    NumberedStage,
    charged_steps,
    load_unet,
    taught_name,
    taught_together,
    taught_weights,
)
from dp_curriculum.runtime.checkpointing import appearing, save_checkpoint
from dp_curriculum.runtime.hashing import hash_file, hash_folder
from dp_curriculum.runtime.processes import from_main, jointly
from dp_curriculum.training.run import Run, broadcast_tensors, broadcast_weights


logger = get_logger(__name__)

_SHEET_COLUMNS = 8


def lesson_stage(run: Run, lessons: Sequence[NumberedStage]) -> None:
    """Easy: releases lessons once, keeps them for a resumed run, and pretrains on them, which spends nothing."""
    weights = taught_weights(run.folder, lessons)
    if from_main(run.accelerator, weights.is_dir):
        if run.accelerator.is_main_process:
            run.unet.load_state_dict(load_unet(weights).state_dict())
        broadcast_weights(run.unet, run.accelerator)
        return
    draws, checks = zip(*(_draws_of(run, number, stage) for number, stage in lessons))
    steps, name = run.config.pretraining.pretrain_steps, taught_name(lessons)
    first_step = (lessons[0][0] - 1) * steps
    pretrain(
        run.unet,
        mixed(draws),
        run.config,
        check_draw=mixed(checks),
        generator=run.generator,
        num_steps=len(lessons) * steps,
        num_processes=run.accelerator.num_processes,
        description=f"lesson {name}, spends nothing",
        on_step=lambda step, loss: run.accelerator.log({f"{name}/loss": loss}, step=first_step + step),
        should_stop=run.stop.agreed,
        disable_progress_bar=run.quiet,
    )
    run.save_samples(run.unet.eval(), run.folder.sheets / f"after-{name}.png")
    if not run.quiet and not run.stop.requested:
        with appearing(weights) as temporary:
            run.unet.save_pretrained(temporary)
            run.record(weights, hash_folder(temporary))


def _draws_of(run: Run, number: int, stage: str) -> tuple[Draw, Draw]:
    """What a lesson is taught and checked with, released if that has not been done yet."""
    released = _released(run, stage, run.folder.released(number, stage))
    prepared = _prepared(run, stage, released)
    resolution, lesson = run.config.data.resolution, find_lesson(stage)

    def draw(
        tensors: Mapping[str, torch.Tensor], count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return lesson.draw(tensors, count, resolution, generator)

    if not run.quiet:
        _save_lesson_sheet(run.folder.lesson_sheet(stage), released, functools.partial(draw, prepared), run)
    has_checks = run.config.pretraining.pretrain_patience is not None
    taught, checked = hold_out(prepared) if has_checks else (prepared, prepared)
    return functools.partial(draw, taught), functools.partial(draw, checked)


def _released(run: Run, stage: str, path: Path) -> Mapping[str, torch.Tensor]:
    """The released tensors of a lesson: charged, drawn by the main process, saved; or those of an earlier try."""
    lesson = find_lesson(stage)
    if not from_main(run.accelerator, path.exists):
        planned = lesson.plan(run.config)
        for mechanism in planned:
            run.reserve(mechanism, mechanism.event.num_steps)
        if run.accelerator.is_main_process:
            tensors, events = lesson.release(run.private, run.config, run.plan.dataset_size, run.secret)
            if events != tuple(mechanism.event for mechanism in planned):
                raise RuntimeError(f"the lesson {stage} spent what was not charged")
            _save_tensors(run, tensors, path)
    return broadcast_tensors(load_file(path) if run.accelerator.is_main_process else None, run.accelerator)


def _prepared(run: Run, stage: str, released: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """What a lesson draws from, on the device: made of the released tensors by the main process."""
    device, lesson, is_main = run.accelerator.device, find_lesson(stage), run.accelerator.is_main_process
    released = {name: tensor.to(device) for name, tensor in released.items()}
    prepared = jointly(
        run.accelerator,
        lambda: lesson.prepare(released, run.config, run.private.class_names, run.generator) if is_main else None,
    )
    return {name: tensor.to(device) for name, tensor in broadcast_tensors(prepared, run.accelerator).items()}


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
    level = logging.WARNING if trainer.is_recomputed else logging.INFO
    logger.log(level, trainer.describe_batches())
    _take_up_checkpoint(run, trainer)
    charged = run.from_main(lambda ledger: charged_steps(ledger, DP_SGD))
    left = planned.event.num_steps - charged
    if charged > trainer.num_steps_taken:
        lost = charged - trainer.num_steps_taken
        logger.warning(f"{lost} charged steps were lost to an interruption: training goes on for {left} steps.")
    _run_dp_sgd(run, trainer, left)
    with trainer.averaged_weights() as unet:
        averaged = {name: value.clone() for name, value in unet.state_dict().items()}
    run.unet.load_state_dict(averaged)


def _take_up_checkpoint(run: Run, trainer: DPTrainer) -> None:
    """Gives the trainers of all processes what the main one has read, if anything."""
    step = from_main(run.accelerator, lambda: 0 if run.checkpoint is None else run.checkpoint.step)
    if step == 0:
        return
    groups = {} if run.checkpoint is None else run.checkpoint.tensors
    flat = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    received = broadcast_tensors(flat or None, run.accelerator)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in received.items():
        group, name = key.split("/", 1)
        tensors.setdefault(group, {})[name] = tensor
    trainer.load_state(step, tensors)


def _run_dp_sgd(run: Run, trainer: DPTrainer, num_steps: int) -> None:
    runtime, planned = run.config.runtime, run.plan.dp_sgd
    assert planned is not None
    total = trainer.num_steps_taken + num_steps
    first_step = len(run.config.curriculum.lessons) * run.config.pretraining.pretrain_steps
    # No time of a step, which grows with the images drawn, and as many lines as steps: terminals are logged.
    bar = tqdm(
        total=total,
        initial=trainer.num_steps_taken,
        desc="hard stage",
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}",
        mininterval=0,
        miniters=1,
        disable=run.quiet,
    )

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
                facts={"ledger_head": list(run.ledger.head), "mechanism": mechanism_sha256(run.config)},
                total_limit=runtime.checkpoints_total_limit,
                record=run.record,
            )

    with bar:  # an error ends the line of the bar before it is told
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


def run_stages(run: Run) -> None:
    """All stages in order; a stop request ends after the step under way."""
    for lessons in taught_together(run.config):
        if run.stop.agreed():
            return
        lesson_stage(run, lessons)
    if run.plan.dp_sgd is not None and not run.stop.agreed():
        dp_sgd_stage(run)


def mechanism_sha256(config: CurriculumConfig) -> str:
    """Of everything but the runtime options, as far as it differs from the defaults: an option that is new is not."""
    defaults = CurriculumConfig().to_dict()
    mechanism = {
        f"{section}.{name}": value
        for section, values in config.to_dict().items()
        for name, value in values.items()
        if section != "runtime" and value != defaults[section][name]
    }
    return hashlib.sha256(json.dumps(mechanism, sort_keys=True).encode()).hexdigest()


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
        images, labels = draw_for_sheet(draw, num_classes, torch.Generator(run.accelerator.device).manual_seed(0))
        columns = _SHEET_COLUMNS
    save_sheet(images[labels.argsort(stable=True)], path, columns=columns)


def draw_for_sheet(draw: Draw, num_classes: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A few images of each of the first ten classes that occur; one class where a public dataset has others."""
    kept: dict[int, list[torch.Tensor]] = {}
    for _ in range(math.ceil(num_classes / 10)):
        images, labels = draw(80 * _SHEET_COLUMNS, generator)
        for label in labels.unique().tolist():
            rows = images[labels == label][:_SHEET_COLUMNS].clone()
            kept[label] = [*kept.get(label, []), *rows][:_SHEET_COLUMNS]
        kept = {label: kept[label] for label in sorted(kept)[:10]}
    shown = [(label, image) for label, images_of_class in kept.items() for image in images_of_class]
    return torch.stack([image for _, image in shown]), torch.tensor([label for label, _ in shown])


def _save_tensors(run: Run, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Their hash is in the ledger before the file has its name: a crash leaves a hash without a file, at worst."""
    with appearing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        run.record(path, hash_file(temporary))
