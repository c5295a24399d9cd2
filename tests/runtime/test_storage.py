"""What is written: of the mode that the umask gives, flushed as far as the file system can, named where it fails."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dp_curriculum import cli
from dp_curriculum.commands import sample, synthesize
from dp_curriculum.data import digits_dataset
from dp_curriculum.diffusion.sheets import save_sheet
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.runtime import storage
from dp_curriculum.runtime.checkpointing import appearing, appearing_in, load_checkpoint, save_checkpoint, save_text
from dp_curriculum.runtime.processes import ProcessLostError
from dp_curriculum.runtime.storage import fsync_directory, naming, settle
from dp_curriculum.sharing.export import export_release
from dp_curriculum.training.curriculum import run_curriculum


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture(autouse=True)
def _nobody_was_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_warned_of", set())


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


def check_modes(folder: Path, umask: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(expected), path


# --- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077], indirect=True, ids=oct)
def test_every_file_of_a_run_and_of_what_is_made_of_it_has_the_mode_that_the_umask_gives(
    umask: int, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = make_config(
        num_inference_steps=1, checkpointing_steps=2, sample_steps=2, expected_batch_size=30, report_to="tensorboard"
    )
    run_curriculum(config, digits_dataset().select(range(30)), output_dir=run)
    written = {Path(name).name for name, mode in modes(run).items()}
    assert {
        "README.md", "privacy.json", "samples.png", "pipeline.py", "model_index.json", "config.yaml",
        "lesson_mean.png", "diffusion_pytorch_model.safetensors", "released.safetensors", "optimizer.safetensors",
        "manifest.json", "privacy_ledger.jsonl", "privacy_ledger.jsonl.head", "privacy_ledger.jsonl.lock",
    } <= written  # fmt: skip
    export_release(run, tmp_path / "export")
    synthesize.main(
        [str(run), "--num_images", "5", "--images_per_shard", "3", "--output_dir", str(tmp_path / "dataset")]
    )
    sample.main([str(run), "--num_images", "3", "--output_dir", str(tmp_path / "samples")])
    for folder in ("run", "export", "dataset", "samples"):
        check_modes(tmp_path / folder, umask)


@pytest.mark.parametrize("umask", [0o022], indirect=True)
def test_the_check_of_modes_notices_a_file_for_its_owner_alone(umask: int, tmp_path: Path) -> None:
    """The twin: what a library that writes private files leaves by itself."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "weights").touch(mode=0o600)
    with pytest.raises(AssertionError, match="weights"):
        check_modes(folder, umask)
    settle(folder)
    check_modes(folder, umask)


def test_what_a_file_system_without_modes_refuses_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").touch(mode=0o600)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    settle(tmp_path / "weights")


# --- folders that cannot be flushed --------------------------------------------------------------------------------


class NoFolderFlush:
    """A file system whose folders answer `number` when they are flushed, or opened."""

    def __init__(self, number: int, *, at: str) -> None:
        self.number, self.at, self.asked = number, at, 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fsync, open_file = os.fsync, os.open

        def refuse() -> None:
            self.asked += 1
            raise OSError(self.number, os.strerror(self.number))

        def no_fsync(fd: int) -> None:
            if self.at == "fsync" and stat.S_ISDIR(os.fstat(fd).st_mode):
                refuse()
            fsync(fd)

        def no_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if self.at == "open" and os.path.isdir(path):
                refuse()
            return open_file(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, "fsync", no_fsync)
        monkeypatch.setattr(os, "open", no_open)


NUMBERS = [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES]


@pytest.mark.parametrize("at", ["fsync", "open"])
@pytest.mark.parametrize("number", sorted(set(NUMBERS)), ids=errno.errorcode.get)
def test_a_file_system_without_folder_flush_is_passed_over_with_one_warning(
    number: int, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    system = NoFolderFlush(number, at=at)
    system.install(monkeypatch)
    with PrivacyLedger.open(tmp_path / "ledger.jsonl") as ledger:
        ledger.mark_not_private("a test")
    tensors = {"unet": {"weight": torch.ones(2)}}
    path = save_checkpoint(tmp_path / "checkpoints", step=1, tensors=tensors, facts={}, total_limit=1)
    save_text(tmp_path / "card.md", "text")
    assert load_checkpoint(path).step == 1 and (tmp_path / "card.md").read_text() == "text"
    with PrivacyLedger.open(tmp_path / "ledger.jsonl", create=False) as ledger:
        assert ledger.not_private_reasons == ("a test",)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert system.asked > 3 and len(warnings) == 1
    assert "cannot flush folders" in warnings[0] and str(tmp_path) in warnings[0]


def test_a_whole_run_is_trained_where_folders_cannot_be_flushed(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    NoFolderFlush(errno.EINVAL, at="fsync").install(monkeypatch)
    config = make_config(num_inference_steps=1, expected_batch_size=30)
    run_curriculum(config, digits_dataset().select(range(30)), output_dir=tmp_path / "run")
    assert sum("cannot flush folders" in record.getMessage() for record in caplog.records) == 1
    assert (tmp_path / "run" / "README.md").stat().st_size > 1000


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_folder_whose_disk_fails_is_an_error_that_names_it(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: what is passed over is that a file system cannot flush folders, not that it failed to."""
    NoFolderFlush(number, at="fsync").install(monkeypatch)
    for write in (fsync_directory, lambda folder: save_text(folder / "card.md", "text")):
        with pytest.raises(OSError, match=str(tmp_path)) as caught:
            write(tmp_path)
        assert caught.value.errno == number
    with pytest.raises(OSError, match=str(tmp_path)) as caught:
        PrivacyLedger.open(tmp_path / "ledger.jsonl")
    assert caught.value.errno == number


# --- whole or not there --------------------------------------------------------------------------------------------


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


WRITERS: dict[str, tuple[Callable[[Path], Any], tuple[Any, str]]] = {
    "a text": (lambda path: save_text(path / "card.md", "new"), (Path, "write_text")),
    "a text, flushed": (lambda path: save_text(path / "card.md", "new"), (os, "fsync")),
    "a text, renamed": (lambda path: save_text(path / "card.md", "new"), (os, "replace")),
    "a sheet": (lambda path: save_sheet(torch.ones(1, 1, 8, 8), path / "card.md", columns=1), (Image.Image, "save")),
    "a ledger": (lambda path: PrivacyLedger.open(path / "ledger.jsonl"), (os, "write")),
    "a ledger, flushed": (lambda path: PrivacyLedger.open(path / "ledger.jsonl"), (os, "fsync")),
    "a checkpoint, flushed": (
        lambda path: save_checkpoint(path, step=1, tensors={"unet": {}}, facts={}, total_limit=1),
        (os, "fsync"),
    ),
    "a checkpoint": (
        lambda path: save_checkpoint(path, step=1, tensors={"unet": {}}, facts={}, total_limit=1),
        (Path, "write_text"),
    ),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_leaves_what_was_there_and_names_a_path(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, (owner, name) = WRITERS[what]
    (tmp_path / "card.md").write_text("old")
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match=str(tmp_path)) as caught:
        write(tmp_path)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert (tmp_path / "card.md").read_text() == "old"
    assert not list(tmp_path.glob(".tmp-*")) and all(path.stat().st_size for path in tmp_path.glob("*.md"))


def test_tensors_that_cannot_be_written_are_an_error_that_names_a_path(tmp_path: Path) -> None:
    path = tmp_path / "released.safetensors"
    with pytest.raises(OSError, match=str(path)), appearing(path) as temporary:
        save_file({"weight": torch.ones(2)}, temporary / "missing" / "folder")


def test_a_text_that_cannot_be_encoded_leaves_no_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        save_text(tmp_path / "card.md", "caf\udce9")
    assert list(tmp_path.iterdir()) == []


def test_files_appear_in_a_folder_that_holds_others_and_those_at_the_top_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "mine.txt").write_text("mine")
    (tmp_path / "card.md").write_text("old")
    order, replace = [], os.replace

    def watched(source: Any, target: Any) -> None:
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with appearing_in(tmp_path) as temporary:
        (temporary / "unet").mkdir()
        (temporary / "unet" / "weights").write_text("new")
        (temporary / "card.md").write_text("new")
    assert order == ["weights", "card.md"]
    files = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"unet/mine.txt": "mine", "unet/weights": "new", "card.md": "new"}


def test_a_failure_on_the_way_moves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with appearing_in(tmp_path / "new") as temporary:
            (temporary / "card.md").write_text("new")
            full()

    with pytest.raises(OSError, match=str(tmp_path)):
        fail()
    assert list((tmp_path / "new").iterdir()) == []


# --- errors name their path ----------------------------------------------------------------------------------------


def test_an_error_that_names_a_file_keeps_it_and_a_lost_process_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), naming(tmp_path):
        Path("/elsewhere").read_text()
    with pytest.raises(OSError, match=f"encoder error: '{tmp_path}'"), naming(tmp_path):
        raise OSError("encoder error")
    with pytest.raises(PermissionError, match=str(tmp_path)) as caught, naming(tmp_path):
        raise OSError(errno.EACCES, "Permission denied")
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(ProcessLostError, match="^gone$"), naming(tmp_path):
        raise ProcessLostError("gone")


def test_the_command_names_the_path_of_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "write", full)
    args = ["--resolution", "8", "--block_out_channels", "8"]
    status = cli.main(["train", *args, "--stages", "mean", "--output_dir", str(tmp_path / "out")])
    monkeypatch.undo()
    assert status == cli.STORAGE_ERROR
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in line and str(tmp_path / "out") in line
