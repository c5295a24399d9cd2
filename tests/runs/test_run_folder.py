"""The folder of a run: what it refuses to be written into, and what it removes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dp_curriculum.privacy.ledger import LedgerLockedError, ledger_held
from dp_curriculum.runs.run_folder import RunFolder


def a_run(root: Path, *, started: bool = True) -> RunFolder:
    """A folder with all that a run leaves, and a file of the user's."""
    folder = RunFolder(root)
    folder.prepare(overwrite=False)
    for path in (folder.card, folder.privacy, folder.sample_sheet, folder.lesson_sheet("mean"), root / "pipeline.py"):
        path.write_text("old")
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "run/logs/events"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("old")
    if started:
        folder.config.write_text("data: {}\n")
        folder.ledger.write_text("{}\n")
    return folder


def contents(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_what_a_run_needs_for_itself_is_apart_from_what_is_shared(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    shared = {folder.card, folder.privacy, folder.sample_sheet, folder.lesson_sheet("mean")}
    assert all(path.parent == folder.root for path in shared)
    own = {folder.config, folder.ledger, folder.checkpoints, folder.sheets, folder.logs, folder.lesson(1, "mean")}
    assert all(folder.root / "run" in path.parents for path in own)
    assert len(shared | own) == 10 and folder.lesson(1, "mean") != folder.lesson(2, "mean")
    assert not folder.root.exists(), "names make nothing"


@pytest.mark.parametrize("name", ["out", "a new/folder with spaces", "ünïcode"])
def test_a_new_or_empty_folder_is_taken(name: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / name)
    folder.check(resume=False, overwrite=False)
    assert not folder.root.exists(), "a check changes nothing"
    folder.root.mkdir(parents=True)
    folder.check(resume=False, overwrite=False)
    folder.check(resume=False, overwrite=True)
    folder.prepare(overwrite=False)
    assert folder.config.parent.is_dir() and not folder.holds_run


def test_a_folder_that_holds_a_run_is_refused_unless_told_what_to_do(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "out")
    before = contents(folder.root)
    with pytest.raises(
        ValueError,
        match=r"--output_dir=\S+: it holds a run\. .*--resume_from_checkpoint latest.*--overwrite_output_dir",
    ):
        folder.check(resume=False, overwrite=False)
    folder.check(resume=True, overwrite=False)
    folder.check(resume=False, overwrite=True)
    assert contents(folder.root) == before


@pytest.mark.parametrize("kept", ["config", "ledger"])
def test_a_ledger_or_a_configuration_alone_is_a_run(kept: str, tmp_path: Path) -> None:
    """A run that was interrupted early may have spent: it is not overwritten by accident."""
    folder = a_run(tmp_path / "out", started=False)
    getattr(folder, kept).write_text("{}\n")
    assert folder.holds_run
    with pytest.raises(ValueError, match="it holds a run"):
        folder.check(resume=False, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_never_written_into(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--output_dir=\S+: it holds other files"):
        RunFolder(tmp_path).check(resume=False, overwrite=overwrite)


def test_nothing_to_resume_is_refused(tmp_path: Path) -> None:
    for folder in (RunFolder(tmp_path), RunFolder(tmp_path / "missing")):
        with pytest.raises(ValueError, match="to hold a run: --resume_from_checkpoint has nothing to resume"):
            folder.check(resume=True, overwrite=False)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match=r"--output_dir=\S+ to be a folder"):
        RunFolder(tmp_path / "out").check(resume=False, overwrite=True)


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "out")
    (folder.root / "notes.txt").write_text("mine")
    (folder.root / "pictures").mkdir()
    (folder.root / "pictures" / "1.png").write_text("mine")
    folder.prepare(overwrite=True)
    assert contents(folder.root) == {"notes.txt", "pictures/1.png"}
    assert folder.config.parent.is_dir() and not folder.holds_run


@pytest.mark.parametrize("step", ["check", "prepare"])
def test_a_run_under_way_is_not_overwritten(step: str, tmp_path: Path) -> None:
    """Its process would write on into a folder that is another run's, or is gone."""
    folder = a_run(tmp_path / "out")
    before = contents(folder.root)
    with ledger_held(folder.ledger):
        with pytest.raises(
            LedgerLockedError, match=r"Refusing to replace the run in --output_dir=\S+out: a process is"
        ):
            folder.check(resume=False, overwrite=True) if step == "check" else folder.prepare(overwrite=True)
        folder.check(
            resume=True, overwrite=True
        )  # a resumed run replaces nothing; its ledger refuses to be open twice
    assert contents(folder.root) == before | {"run/privacy_ledger.jsonl.lock"}
    folder.prepare(overwrite=True)
    assert not contents(folder.root)
    with ledger_held(folder.ledger):  # nothing of the old lock is left
        pass


def test_preparing_to_resume_removes_nothing(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "out")
    before = contents(folder.root)
    folder.prepare(overwrite=False)
    assert contents(folder.root) == before


def test_what_an_interrupted_run_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    places = (folder.root, folder.config.parent, folder.checkpoints, folder.sheets, folder.lesson(1, "mean"))
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        for name in (".tmp-sheet.png", "sheet.png"):
            (place / name).write_bytes(b"")
    folder.remove_litter()
    assert not list(tmp_path.rglob(".tmp-*"))
    assert all((place / "sheet.png").exists() for place in places)
