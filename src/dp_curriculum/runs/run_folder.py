"""Layout of the folder of a run.

The folder itself is the pipeline, as `from_pretrained` loads it, with its card. What the run needs for itself is under
`run/`, and is never shared.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dp_curriculum.privacy.hash_chain import lock_path
from dp_curriculum.privacy.ledger import LedgerLockedError, ledger_held
from dp_curriculum.runtime.checkpointing import LITTER, remove_litter


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run."""

    root: Path

    @property
    def card(self) -> Path:
        return self.root / "README.md"

    @property
    def privacy(self) -> Path:
        return self.root / "privacy.json"

    @property
    def sample_sheet(self) -> Path:
        return self.root / "samples.png"

    def lesson_sheet(self, stage: str) -> Path:
        """Picture of what a lesson taught."""
        return self.root / f"lesson_{stage}.png"

    @property
    def adapter(self) -> Path:
        """Folder of the matrices of LoRA, as an adapter of peft; they are merged into the network, too."""
        return self.root / "adapter"

    @property
    def config(self) -> Path:
        return self.root / "run" / "config.yaml"

    @property
    def ledger(self) -> Path:
        return self.root / "run" / "privacy_ledger.jsonl"

    @property
    def holdout_key(self) -> Path:
        """Secret by which images were held out; for the owner of the images."""
        return self.root / "run" / "PRIVATE_holdout.key"

    def lesson(self, number: int, stage: str) -> Path:
        """Folder of what a lesson released, and of the weights after it."""
        return self.root / "run" / "lessons" / f"{number:02d}-{stage}"

    def released(self, number: int, stage: str) -> Path:
        """File of what a lesson's query released."""
        return self.lesson(number, stage) / "released.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.root / "run" / "checkpoints"

    @property
    def sheets(self) -> Path:
        return self.root / "run" / "samples"

    @property
    def logs(self) -> Path:
        return self.root / "run" / "logs"

    def name(self, path: Path) -> str:
        """A path inside the folder, as the ledger names it."""
        return path.relative_to(self.root).as_posix()

    @property
    def holds_run(self) -> bool:
        return self.config.exists() or self.ledger.exists()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """
        Refuses a folder that a run must not be written into; changes nothing.

        Raises:
            ValueError: If it holds a run and neither `resume` nor `overwrite` is set, holds other files, or there is
                nothing to resume.
            LedgerLockedError: If its run is to be replaced, and is under way.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"Expected --output_dir={self.root} to be a folder.")
        if resume and not self.holds_run:
            raise ValueError(
                f"Expected --output_dir={self.root} to hold a run: --resume_from_checkpoint has nothing to resume."
            )
        if self.holds_run and not resume and not overwrite:
            raise ValueError(
                f"Refusing to start a run in --output_dir={self.root}: it holds a run. Add --resume_from_checkpoint "
                "latest to resume it, --overwrite_output_dir to replace it, or name another folder."
            )
        if not self.holds_run and self.root.is_dir() and not all(_is_litter(path) for path in self.root.iterdir()):
            raise ValueError(
                f"Refusing to start a run in --output_dir={self.root}: it holds other files. Name another folder."
            )
        if overwrite and not resume and lock_path(self.ledger).exists():
            with self._no_run_under_way():
                pass

    def prepare(self, *, overwrite: bool) -> None:
        """
        Makes the folder, after the run that is in it was removed if `overwrite` is set.

        Raises:
            LedgerLockedError: If that run is under way. Nothing was removed.
        """
        if overwrite:
            with self._no_run_under_way():
                self._remove_run()
        self.config.parent.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _no_run_under_way(self) -> Iterator[None]:
        """Holds the ledger of the run that is there, if any, so that no process can resume that run meanwhile."""
        if not self.config.parent.is_dir():
            yield
            return
        try:
            with ledger_held(self.ledger):
                yield
        except LedgerLockedError:
            raise LedgerLockedError(
                f"Refusing to replace the run in --output_dir={self.root}: a process is writing it. Let it end first."
            ) from None

    def remove_litter(self) -> None:
        """Removes what an interrupted run left half written. The ledger is held, so that no other run is writing."""
        places = (self.root, self.config.parent, self.checkpoints, self.sheets)
        for folder in (*places, *self.config.parent.glob("lessons/*")):
            remove_litter(folder)

    def _remove_run(self) -> None:
        """Removes what a run wrote, and nothing else."""
        rooms = (self.root / name for name in ("unet", "scheduler", "prior", "vae"))
        for folder in (*rooms, self.adapter):
            shutil.rmtree(folder, ignore_errors=True)
        names = ("README.md", "privacy.json", "samples.png", "model_index.json", "pipeline.py")
        for path in (*(self.root / name for name in names), *self.root.glob("lesson_*.png")):
            path.unlink(missing_ok=True)
        # Last, and at once: what is left of an interrupted removal is the run, or litter.
        if self.config.parent.is_dir():
            os.replace(self.config.parent, self.root / f"{LITTER}run")
        remove_litter(self.root)


def _is_litter(path: Path) -> bool:
    """True if a run that was interrupted before its first file may have left it."""
    if path.name.startswith(LITTER):
        return True
    return path.name == "run" and path.is_dir() and all(inside.name.startswith(LITTER) for inside in path.iterdir())
