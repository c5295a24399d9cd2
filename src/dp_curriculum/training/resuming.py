"""Resuming a run: from what is there and of this run, as the ledger says, and on what is left of the budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffusers import UNet2DModel

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons.planned import mechanisms_of, plan_lessons
from dp_curriculum.privacy.ledger import LedgerTamperedError, PrivacyLedger
from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.runs.run_contents import check_contents, check_recorded, taught_weights
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.checkpointing import (
    Checkpoint,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    remove_later_checkpoints,
)
from dp_curriculum.runtime.processes import get_logger
from dp_curriculum.training.plan import BudgetPlan, plan_budget
from dp_curriculum.training.run import Run
from dp_curriculum.training.stages import mechanism_sha256


logger = get_logger(__name__)


def open_ledger(
    config: CurriculumConfig, folder: RunFolder, path: Path | None
) -> tuple[PrivacyLedger, Checkpoint | None]:
    """The ledger, held from now on, and the checkpoint to resume from: the one at `path`, or the last valid one."""
    checkpoint = _find_checkpoint(config, folder, path)
    head = None if checkpoint is None else checkpoint.facts["ledger_head"]
    try:
        ledger = PrivacyLedger.open(folder.ledger, expected_at_least=None if head is None else (int(head[0]), head[1]))
    except LedgerTamperedError as error:
        which = "" if checkpoint is None else f" (checkpoint of step {checkpoint.step})"
        raise LedgerTamperedError(f"{error}{which}") from None
    try:
        _check_belongs(config, folder, ledger, checkpoint)
    except BaseException:
        ledger.close()
        raise
    folder.remove_litter()
    if path is not None and checkpoint is not None:
        remove_later_checkpoints(folder.checkpoints, checkpoint.step)
    return ledger, checkpoint


def _check_belongs(
    config: CurriculumConfig, folder: RunFolder, ledger: PrivacyLedger, checkpoint: Checkpoint | None
) -> None:
    """Refuses to resume from anything that this ledger has not charged or has no hash of."""
    if ledger.tuning is not None:
        raise ValueError(
            f"Refusing to resume the run in --output_dir={folder.root}: it was chosen among several tries, and is "
            "finished. More steps would not be in its epsilon."
        )
    if not ledger.has_hashes:
        raise ValueError(
            f"Refusing to resume the run in --output_dir={folder.root}: an earlier version began it, and its ledger "
            "has no hashes of what the run holds. Start another run."
        )
    if checkpoint is not None:
        named = checkpoint_path(folder.checkpoints, checkpoint.step)
        check_recorded(folder, ledger, named, checkpoint.sha256)
    check_contents(folder, plan_lessons(config), ledger)


def _find_checkpoint(config: CurriculumConfig, folder: RunFolder, path: Path | None) -> Checkpoint | None:
    if path is None:
        checkpoint, passed_over = latest_checkpoint(folder.checkpoints)
        for line in passed_over:
            logger.warning(line)
    else:
        try:
            checkpoint = load_checkpoint(path)
        except ValueError as error:
            raise ValueError(f"Expected --resume_from_checkpoint={path} to be a checkpoint: {error}") from None
    if checkpoint is None:
        return None
    if checkpoint.facts.get("mechanism") != mechanism_sha256(config) or "ledger_head" not in checkpoint.facts:
        raise ValueError(
            f"Refusing to resume from the checkpoint of step {checkpoint.step} in {path or folder.checkpoints}: it is "
            f"not of the run in --output_dir={folder.root}. Remove it, or name one with --resume_from_checkpoint."
        )
    return checkpoint


def plan_to_go_on_with(run: Run) -> BudgetPlan:
    """The plan of a run that may have begun: its hard stage is calibrated anew only where that has not."""
    plan, config, ledger = run.plan, run.config, run.ledger
    assert ledger is not None, "the main process holds the ledger"
    if not ledger.events:
        return plan
    groups = [(group, taught_weights(run.folder, group)) for group in plan.groups]
    for _, weights in groups:
        classes = UNet2DModel.load_config(weights)["num_class_embeds"] - 1 if weights.is_dir() else plan.num_classes
        if classes != plan.num_classes:
            raise ValueError(
                f"Refusing to resume the run in --output_dir={run.folder.root}: it began with {classes} classes, not "
                f"{plan.num_classes}. Restore the dataset."
            )
    begun = [row for row in ledger.mechanisms if row["name"] == DP_SGD]
    if begun and plan.dp_sgd is not None:
        if begun[0]["sample_rate"] != plan.dp_sgd.event.sample_rate:
            raise ValueError(
                f"Refusing to resume the run in --output_dir={run.folder.root}: it began with another number of "
                f"{plan.unit}s, at sample rate {begun[0]['sample_rate']:.6g}, not "
                f"{plan.dp_sgd.event.sample_rate:.6g}. Restore the dataset."
            )
        for _, weights in groups:
            if not weights.is_dir():
                raise ValueError(
                    f"Refusing to resume the run: {weights.parent} lacks the weights after its lesson, which is not "
                    "charged again once the hard stage has begun. Restore it, or start another run."
                )
        event = replace(plan.dp_sgd.event, noise_multiplier=begun[0]["noise_multiplier"])
        return replace(plan, dp_sgd=replace(plan.dp_sgd, event=event))
    # A lesson that crashed between charge and save is paid twice; the hard stage makes room for it.
    unsaved = [
        mechanism.event
        for group, weights in groups
        for lesson in group
        if not weights.is_dir() and not run.folder.released(lesson.number, lesson.stage).exists()
        for mechanism in lesson.mechanisms
    ]
    again = plan_budget(
        config,
        dataset_size=plan.dataset_size,
        num_classes=plan.num_classes,
        prior_events=(*ledger.events, *unsaved),
    )
    planned = sum(mechanism.event.num_steps for mechanism in mechanisms_of(plan.groups))
    if sum(event.num_steps for event in (*ledger.events, *unsaved)) > planned:
        logger.warning(
            "A lesson that was charged was lost to an interruption: it is paid again, from the same budget."
        )
    return again


def check_same_config(config: CurriculumConfig, folder: RunFolder) -> None:
    before, now = CurriculumConfig.from_yaml(folder.config).to_dict(), config.to_dict()
    for section in before:
        for name, value in before[section].items():
            unsaid = name == "num_channels" and now[section][name] is None  # the type of the images says it
            if section != "runtime" and now[section][name] != value and not unsaid:
                raise ValueError(
                    f"Expected --{name}={now[section][name]} to be {value}, as the run in --output_dir={folder.root} "
                    "has it: resuming cannot change the mechanism."
                )
