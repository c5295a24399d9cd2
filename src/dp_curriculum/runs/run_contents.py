"""Contents of the folder of a run, and the check that its ledger has charged them and recorded their hashes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import UNet2DModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from dp_curriculum.lessons.planned import LessonGroup, PlannedLesson
from dp_curriculum.privacy.ledger import LedgerTamperedError, PrivacyLedger
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.checkpointing import list_checkpoints, read_manifest
from dp_curriculum.runtime.hashing import hash_file, hash_folder


def taught_weights(folder: RunFolder, group: LessonGroup) -> Path:
    """Folder of the weights after a group of lessons."""
    last = group[-1]
    return folder.lesson(last.number, last.stage) / "unet"


def load_unet(folder: Path) -> UNet2DModel:
    """The network that `save_pretrained` wrote, from its one file of safetensors: no other weights are read."""
    unet = UNet2DModel.from_config(UNet2DModel.load_config(folder))
    unet.load_state_dict(load_file(folder / SAFETENSORS_WEIGHTS_NAME))
    return unet.eval()


def charged_steps(ledger: PrivacyLedger, name: str) -> int:
    """Steps of a mechanism that are charged already, by this process or one before it."""
    return sum(row["num_steps"] for row in ledger.mechanisms if row["name"] == name)


def check_contents(folder: RunFolder, groups: Sequence[LessonGroup], ledger: PrivacyLedger) -> None:
    """
    Refuses what the ledger knows nothing of: it would be used, and not be in the report.

    A ledger of an earlier version has no hashes: then charges are all that is compared.

    Args:
        folder ([`RunFolder`]): The run.
        groups (`Sequence[LessonGroup]`): Its lessons, as planned.
        ledger ([`PrivacyLedger`]): Its ledger.

    Raises:
        LedgerTamperedError: If a lesson that was released or taught is not charged, or it or a checkpoint is not the
            one that was recorded: it was changed, is of another run, or the ledger was lost.
    """
    for group in groups:
        weights = taught_weights(folder, group)
        for lesson in group:
            released = folder.released(lesson.number, lesson.stage)
            if weights.is_dir() or released.exists():
                _check_charged(folder, ledger, lesson)
            if released.exists():
                check_recorded(folder, ledger, released, hash_file(released))
        if weights.is_dir():
            check_recorded(folder, ledger, weights, hash_folder(weights))
    if folder.holdout_key.exists():
        check_recorded(folder, ledger, folder.holdout_key, hash_file(folder.holdout_key))
    for path in list_checkpoints(folder.checkpoints):
        try:
            digest = read_manifest(path)["sha256"]
        except ValueError:  # a run passes it over, too
            continue
        check_recorded(folder, ledger, path, digest)


def check_recorded(folder: RunFolder, ledger: PrivacyLedger, path: Path, digest: str) -> None:
    """
    Refuses a file or folder whose hash the ledger has not.

    Raises:
        LedgerTamperedError: If it is not the one that this run wrote.
    """
    if ledger.has_hashes and digest not in ledger.digests(folder.name(path)):
        raise LedgerTamperedError(
            f"Refusing to use {path}: its hash is not in {folder.ledger}, so it was changed or is of another run. "
            "Restore it, or start another run."
        )


def _check_charged(folder: RunFolder, ledger: PrivacyLedger, lesson: PlannedLesson) -> None:
    for mechanism in lesson.mechanisms:
        if charged_steps(ledger, mechanism.name) < mechanism.event.num_steps:
            raise LedgerTamperedError(
                f"Refusing to use {folder.lesson(lesson.number, lesson.stage)}: {folder.ledger} does not charge "
                f"{mechanism.name}. Restore the ledger, or start another run."
            )
