"""What the folder of a run holds, and that it belongs to its ledger: charged there, and of the hash recorded there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import UNet2DModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from dp_curriculum.runtime.checkpointing import list_checkpoints, read_manifest
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.runtime.hashing import hash_file, hash_folder
from dp_curriculum.privacy.ledger import LedgerTamperedError, PrivacyLedger
from dp_curriculum.lessons.table import find_lesson
from dp_curriculum.runs.run_folder import RunFolder


NumberedStage = tuple[int, str]


def taught_together(config: CurriculumConfig) -> list[list[NumberedStage]]:
    """The lessons with their numbers, in order; those of one list are taught at once."""
    lessons = list(enumerate(config.curriculum.lessons, start=1))
    return [lessons] if lessons and config.curriculum.mix_lessons else [[lesson] for lesson in lessons]


def taught_weights(folder: RunFolder, lessons: Sequence[NumberedStage]) -> Path:
    """Where the weights are kept that lessons taught together left."""
    return folder.lesson(*lessons[-1]) / "unet"


def taught_name(lessons: Sequence[NumberedStage]) -> str:
    """What lessons taught together are called, in trackers and reports."""
    return "_".join(stage for _, stage in lessons)


def load_unet(folder: Path) -> UNet2DModel:
    """The network that `save_pretrained` wrote, from its one file of safetensors: no other weights are read."""
    unet = UNet2DModel.from_config(UNet2DModel.load_config(folder))
    unet.load_state_dict(load_file(folder / SAFETENSORS_WEIGHTS_NAME))
    return unet.eval()


def charged_steps(ledger: PrivacyLedger, name: str) -> int:
    """Steps of a mechanism that are charged already, by this process or one before it."""
    return sum(row["num_steps"] for row in ledger.mechanisms if row["name"] == name)


def check_contents(folder: RunFolder, config: CurriculumConfig, ledger: PrivacyLedger) -> None:
    """
    Refuses what the ledger knows nothing of: it would be used, and not be in the report.

    A ledger of an earlier version has no hashes: then charges are all that is compared.

    Raises:
        LedgerTamperedError: If a lesson that was released or taught is not charged, or it or a checkpoint is not the
            one that was recorded: it was changed, is of another run, or the ledger was lost.
    """
    for lessons in taught_together(config):
        weights = taught_weights(folder, lessons)
        for number, stage in lessons:
            released = folder.released(number, stage)
            if weights.is_dir() or released.exists():
                _check_charged(folder, config, ledger, number, stage)
            if released.exists():
                check_recorded(folder, ledger, released, hash_file(released))
        if weights.is_dir():
            check_recorded(folder, ledger, weights, hash_folder(weights))
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
            f"Expected {path} to be what {folder.ledger} has the hash of: it was changed, or is of another run; "
            "restore it, or start another run."
        )


def _check_charged(
    folder: RunFolder, config: CurriculumConfig, ledger: PrivacyLedger, number: int, stage: str
) -> None:
    for planned in find_lesson(stage).plan(config):
        if charged_steps(ledger, planned.name) < planned.event.num_steps:
            raise LedgerTamperedError(
                f"Expected {folder.ledger} to charge {planned.name}, which {folder.lesson(number, stage)} holds the "
                "answer of: restore the ledger, or start another run."
            )
