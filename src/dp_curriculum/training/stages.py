"""The stages of a run, in order. The hard stage is a loop of noisy steps, from the last checkpoint if there is one."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time

import torch
from tqdm.auto import tqdm

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.trainable import merge_weights
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.mechanism import DP_SGD, PlannedMechanism
from dp_curriculum.runs.run_contents import charged_steps
from dp_curriculum.runtime.checkpointing import save_checkpoint
from dp_curriculum.runtime.processes import from_main, get_logger
from dp_curriculum.runtime.progress import duration
from dp_curriculum.training.adapter import save_adapter
from dp_curriculum.training.run import Run, broadcast_tensors, secret_generator
from dp_curriculum.training.teaching import lesson_stage


logger = get_logger(__name__)

_PASSES_BETWEEN_TRIALS = 500  # of a physical batch; a trial on two cores takes eleven


def run_stages(run: Run) -> None:
    """Runs all stages in order; a stop request ends them after the current step."""
    for group in run.plan.groups:
        if run.stop.agreed():
            return
        lesson_stage(run, group)
    if run.plan.dp_sgd is not None and not run.stop.agreed():
        dp_sgd_stage(run)


def dp_sgd_stage(run: Run) -> None:
    """
    Hard: DP-SGD on the images, from the last checkpoint if there is one; leaves the averaged weights, and beside them,
    where LoRA was trained, its matrices.
    """
    mechanism = run.plan.dp_sgd
    assert mechanism is not None, "the plan has a hard stage"
    trainer = DPTrainer(
        run.unet,
        run.private,
        run.config,
        max_grad_norm=mechanism.clip_norm,
        noise_multiplier=mechanism.event.noise_multiplier,
        sample_rate=mechanism.event.sample_rate,
        divisor=mechanism.event.sample_rate * run.plan.dataset_size,
        secret=run.secret,
        prior=run.prior,
        schedule=run.schedule,
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
    )
    level = logging.WARNING if trainer.is_recomputed else logging.INFO
    logger.log(level, trainer.describe_batches())
    _take_up_checkpoint(run, trainer)
    left = mechanism.event.num_steps - _charged_before(run, trainer)
    seconds = _step_seconds(run, trainer)
    logger.info(
        "time left of noisy steps: from a trial on random images and the expected number of images per step, because "
        "the true pace would show how many images each step drew"
    )
    with run.stop.finishing("the noisy step", seconds):
        take_noisy_steps(run, trainer, mechanism, left, step_seconds=seconds)
    with trainer.averaged_weights() as unet:
        averaged = {name: value.clone() for name, value in unet.state_dict().items()}
    run.unet.load_state_dict(averaged)
    if run.is_main and run.config.dp_sgd.trainable == "lora":
        save_adapter(run)
    merge_weights(run.unet)


def _step_seconds(run: Run, trainer: DPTrainer) -> float:
    """Expected seconds of a noisy step, by a trial. A generator that is used for that alone draws its noise."""
    num_weights = sum(parameter.numel() for parameter in trainer.trained)
    secret = secret_generator(run.config, run.accelerator.device)
    start = time.perf_counter()
    secret.gaussian(num_weights, 1.0)
    return trainer.expected_pass_seconds() + time.perf_counter() - start


def take_noisy_steps(
    run: Run, trainer: DPTrainer, mechanism: PlannedMechanism, left: int, *, step_seconds: float | None = None
) -> None:
    """
    The loop of DP-SGD: charges a block of steps, takes them, refunds what a stop left untaken, and saves.

    Args:
        run ([`Run`]): Its ledger is charged. `checkpointing_steps` is the size of a block.
        trainer ([`DPTrainer`]): Takes the steps.
        mechanism ([`PlannedMechanism`]): What a step is charged as.
        left (`int`): Steps that have not been charged yet.
        step_seconds (`float`, *optional*): What a step is expected to take, for the time left.
    """
    untried: int | None = None
    with _StepsBar(run, trainer, left, step_seconds) as bar:  # an error ends the line of the bar before it is reported
        while left > 0 and not run.stop.agreed():
            block, taken = min(left, run.config.runtime.checkpointing_steps), 0
            untried = _try_threads(run, trainer, untried)
            run.reserve(mechanism, block)
            with trainer.attached():
                while taken < block and not run.stop.agreed():
                    trainer.step()
                    taken += 1
                    bar.step()
                    _save_samples(run, trainer)
            if taken < block:
                run.refund(mechanism, block - taken)
            left -= taken
            untried += taken
            _log(run, trainer, bar)
            _save_checkpoint(run, trainer)


def _try_threads(run: Run, trainer: DPTrainer, untried: int | None) -> int:
    """
    Chooses the number of threads again after many steps, because other work may have begun or ended on the machine.

    The times of the trials follow from public constants, and their outcomes from random inputs.
    `untried` is the number of steps since the last trial, or `None` before the first. It returns that number anew.
    """
    if not run.threads.can_be_fewer:
        return 0
    images = trainer.images_at_once
    if untried is not None and untried * run.config.dp_sgd.expected_batch_size < _PASSES_BETWEEN_TRIALS * images:
        return untried
    before = torch.get_num_threads()
    run.threads.settle(functools.partial(trainer.try_images, images))
    if torch.get_num_threads() != before:
        logger.info(run.threads.describe())
    return 0


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


def _charged_before(run: Run, trainer: DPTrainer) -> int:
    """Steps that are charged already; those that no checkpoint holds are lost, and stay charged."""
    charged = run.ask_ledger(lambda ledger: charged_steps(ledger, DP_SGD))
    lost = charged - trainer.num_steps_taken
    if lost > 0:
        logger.warning(f"{lost} charged steps were lost to an interruption and stay charged.")
    return charged


class _StepsBar:
    """
    The bar of the noisy steps. It has a line for each step, and no true time per step: that grows with the images
    drawn, and terminals are logged. The time left is what the steps that are left take by a trial.
    """

    def __init__(self, run: Run, trainer: DPTrainer, num_steps: int, step_seconds: float | None) -> None:
        self._left, self._step_seconds, self._epsilon = num_steps, step_seconds, ""
        self._bar = tqdm(
            total=trainer.num_steps_taken + num_steps,
            initial=trainer.num_steps_taken,
            desc="hard stage",
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}",
            mininterval=0,
            miniters=1,
            disable=not run.is_main,
        )

    def __enter__(self) -> _StepsBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def step(self) -> None:
        self._left -= 1
        self._describe()
        self._bar.update()

    def show_epsilon(self, epsilon: float) -> None:
        self._epsilon = f"epsilon={epsilon:.3f}"
        self._describe()
        self._bar.refresh()

    def _describe(self) -> None:
        has_time = self._step_seconds is not None and self._left > 0
        time_left = f"about {duration(self._left * (self._step_seconds or 0.0))} left" if has_time else ""
        self._bar.set_postfix_str(", ".join(filter(None, (time_left, self._epsilon))), refresh=False)


def _save_samples(run: Run, trainer: DPTrainer) -> None:
    every = run.config.runtime.sample_steps
    if every and trainer.num_steps_taken % every == 0:
        with trainer.averaged_weights() as unet:
            run.save_samples(unet, run.folder.sheets / f"dp-step-{trainer.num_steps_taken:06d}.png")


def _log(run: Run, trainer: DPTrainer, bar: _StepsBar) -> None:
    values: dict[str, float] = {"dp_sgd/learning_rate": float(trainer.lr_scheduler.get_last_lr()[0])}
    epsilon = run.epsilon()
    if epsilon is not None:
        bar.show_epsilon(epsilon)
        values["privacy/epsilon"] = epsilon
    lesson_steps = len(run.plan.lessons) * run.config.pretraining.pretrain_steps
    run.accelerator.log(values, step=lesson_steps + trainer.num_steps_taken)


def _save_checkpoint(run: Run, trainer: DPTrainer) -> None:
    if run.ledger is not None:
        save_checkpoint(
            run.folder.checkpoints,
            step=trainer.num_steps_taken,
            tensors=trainer.state(),
            facts={"ledger_head": list(run.ledger.head), "mechanism": mechanism_sha256(run.config)},
            total_limit=run.config.runtime.checkpoints_total_limit,
            record=run.record,
        )


def mechanism_sha256(config: CurriculumConfig) -> str:
    """SHA-256 of all options but the runtime's that differ from their defaults: a new option invalidates nothing."""
    defaults = CurriculumConfig().replace(num_channels=1).to_dict()  # what was the default of earlier checkpoints
    mechanism = {
        f"{section}.{name}": value
        for section, values in config.to_dict().items()
        for name, value in values.items()
        if section != "runtime" and value != defaults[section][name]
    }
    return hashlib.sha256(json.dumps(mechanism, sort_keys=True).encode()).hexdigest()
