"""The end of a run, tried before anything is spent: what it will write is written once, with the planned numbers."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.ledger import PrivacyLedger, PrivacyReport
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.checkpointing import LITTER
from dp_curriculum.runtime.stopping import StopRequest
from dp_curriculum.runtime.storage import naming
from dp_curriculum.training.finishing import write_release
from dp_curriculum.training.run import Run, public_generator, secret_generator


def rehearse_release(run: Run) -> None:
    r"""
    Writes the release of the planned run, with its initial weights, into a scratch folder; reads and removes it.

    What a run writes last is written when all is spent. A name that no text can hold, a full disk or a report that
    cannot be computed would lose it then. What changes until then is the values of the weights, and how many of the
    planned steps were taken.

    Args:
        run ([`Run`]): As it will begin, without a ledger. Its folder need not exist, and is left as it was found. Only
            the main process calls this.

    Raises:
        ValueError: If the name of a class, or another text of the release, cannot be written; it says which.
        OSError: If the disk refuses.
    """
    _check_texts(run.folder, run.private.class_names)
    with _scratch(run.folder) as scratch:
        # An account, or randomness that is used up, would be left changed.
        trial = replace(
            run,
            folder=scratch,
            secret=secret_generator(run.config, run.accelerator.device),
            generator=public_generator(run.config, run.accelerator),
            stop=StopRequest(),
            account=None,
        )
        report = _write(trial)
        _read_back(run.config, scratch, run.private, report)


def _check_texts(folder: RunFolder, class_names: tuple[str, ...]) -> None:
    texts = {f"--output_dir={str(folder.root)!a}": str(folder.root)}  # safetensors opens no other path
    texts |= {f"the class name {name!a}": name for name in class_names}
    for what, text in texts.items():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"Expected {what} to be UTF-8, or it could not be written: rename the folder.") from None


@contextmanager
def _scratch(folder: RunFolder) -> Iterator[RunFolder]:
    """A folder in that of the run, so on the same file system. It goes, and that of the run too if it is new."""
    is_new = not folder.root.exists()
    scratch = RunFolder(folder.root / f"{LITTER}rehearsal")
    try:
        _make_folder(folder.root)
        shutil.rmtree(scratch.root, ignore_errors=True)
        with naming(scratch.root):
            yield scratch
    except UnicodeEncodeError as error:
        text = error.object[error.start : error.end]
        raise ValueError(
            f"Refusing to train: the run would write {text!a}, which is not UTF-8. Rename what holds it."
        ) from None
    finally:
        shutil.rmtree(scratch.root, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                folder.root.rmdir()


def _make_folder(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError:
        raise
    except OSError as error:
        raise OSError(
            f"Expected --output_dir={root} to be a folder that can be made: {error.strerror}. Name another one."
        ) from None


def _write(run: Run) -> PrivacyReport:
    """Everything that the end of the run writes, for a ledger that charges the plan."""
    run.folder.config.parent.mkdir(parents=True)
    run.config.to_yaml(run.folder.config)
    with PrivacyLedger.open(run.folder.ledger) as ledger:
        run.ledger = ledger
        for mechanism in run.plan.mechanisms:
            ledger.reserve(
                mechanism.event,
                stage=mechanism.name,
                clip_norm=mechanism.clip_norm,
                execution=run.execution_of(mechanism),
            )
        was_training = run.unet.training
        try:
            return write_release(run, run.folder)
        finally:
            run.unet.train(was_training)


def _read_back(config: CurriculumConfig, scratch: RunFolder, private: PrivateImages, report: PrivacyReport) -> None:
    """Checks that what was written reads back as it was given, as users, the Hub and a resumed run will read it."""
    pipeline = DPCurriculumPipeline.from_pretrained(scratch.root)
    found = {
        "privacy.json": PrivacyReport.from_file(scratch.privacy).to_dict() == report.to_dict(),
        "model_index.json": tuple(pipeline.labels) == tuple(sorted(private.class_names)),
        "README.md": _metadata(scratch.card).get("differential_privacy") == report.to_dict(),
        "run/config.yaml": CurriculumConfig.from_yaml(scratch.config) == config,
    }
    for name, is_whole in found.items():
        if not is_whole:
            raise ValueError(
                f"Refusing to train: {name} would not read back as written, because of a name in it. Change that name."
            )


def _metadata(card: Path) -> dict[str, Any]:
    """The YAML on top of a card; nothing if it is none."""
    try:
        return dict(yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1]))
    except (yaml.YAMLError, IndexError, TypeError, ValueError):
        return {}
