"""Checkpoints: whole or not there, whatever interrupts the save and whatever befalls the files afterwards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_curriculum.runtime import checkpointing
from dp_curriculum.runtime.checkpointing import (
    MANIFEST,
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_litter,
    save_checkpoint,
)


FACTS = {"ledger_head": [7, "ab" * 32]}


def tensors(seed: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    return {
        # A transposed view: what is saved is the values, not the memory.
        "unet": {"conv.weight": weight, "conv.weight_t": weight.transpose(0, 1), "scale": torch.tensor(2.5)},
        "optimizer": {"conv.weight.exp_avg": torch.randn(4, 3, 3, 3, generator=generator), "step": torch.tensor(3.0)},
    }


def save(folder: Path, step: int, *, total_limit: int = 10) -> Path:
    return save_checkpoint(folder, step=step, tensors=tensors(step), facts=FACTS, total_limit=total_limit)


def assert_is(checkpoint: Checkpoint | None, step: int) -> None:
    """It is the one that was saved at that step, to the bit."""
    assert checkpoint is not None and checkpoint.step == step and checkpoint.facts == FACTS
    expected = tensors(step)
    assert checkpoint.tensors.keys() == expected.keys()
    for group, named in expected.items():
        assert checkpoint.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(checkpoint.tensors[group][name], tensor), name


def litter(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-"))


# --- saved and loaded ----------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "checkpoints", 12)
    assert path.name == "checkpoint-00000012"
    assert_is(load_checkpoint(path), 12)
    newest, passed_over = latest_checkpoint(path.parent)
    assert_is(newest, 12)
    assert passed_over == []


def test_only_tensors_and_json_are_written(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert {file.name for file in path.iterdir()} == {MANIFEST, "unet.safetensors", "optimizer.safetensors"}
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["step"] == 1 and manifest["facts"] == FACTS


def test_no_checkpoint_is_none_and_no_complaint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") == (None, [])
    assert latest_checkpoint(tmp_path) == (None, [])
    (tmp_path / "checkpoint-notes.txt").write_text("not one")
    (tmp_path / "checkpoint-00000003").write_text("a file, not a folder")
    assert list_checkpoints(tmp_path) == []


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (5, 100_000_000, 20_000_000):
        save(tmp_path, step)
    assert [load_checkpoint(path).step for path in list_checkpoints(tmp_path)] == [100_000_000, 20_000_000, 5]
    assert_is(latest_checkpoint(tmp_path)[0], 100_000_000)


@pytest.mark.parametrize("total_limit", [1, 2, 3])
def test_the_oldest_beyond_the_limit_go_after_the_new_one_is_whole(
    total_limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, removed = shutil.rmtree, []

    def watched(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith("checkpoint-"):
            assert_is(latest_checkpoint(tmp_path)[0], current)
            removed.append(Path(path).name)
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    for current in range(1, 6):
        save(tmp_path, current, total_limit=total_limit)
        kept = [load_checkpoint(path).step for path in list_checkpoints(tmp_path)]
        assert kept == list(range(current, max(0, current - total_limit), -1))
    assert removed == [f"checkpoint-{step:08d}" for step in range(1, 6 - total_limit)]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save_checkpoint(tmp_path, step=3, tensors=tensors(4), facts=FACTS, total_limit=2)
    (path,) = list_checkpoints(tmp_path)
    assert torch.equal(load_checkpoint(path).tensors["unet"]["conv.weight"], tensors(4)["unet"]["conv.weight"])
    assert litter(tmp_path) == []


# --- interrupted ---------------------------------------------------------------------------------------------------


class Fault:
    """Lets the calls that write pass, but for the one at `position`, where `strike` happens instead."""

    def __init__(self, position: int, strike: Callable[[], None]) -> None:
        self.position, self.strike, self.calls = position, strike, 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for owner, name in ((os, "replace"), (os, "fsync"), (checkpointing, "save_file"), (Path, "write_text")):
            monkeypatch.setattr(owner, name, self._watch(getattr(owner, name)))

    def _watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.position:
                self.strike()
            return function(*args, **kwargs)

        return watched


def no_space() -> None:
    raise OSError(28, "No space left on device")


def interrupt() -> None:
    raise KeyboardInterrupt


def count_writes(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(-1, no_space)
        fault.install(patch)
        save(folder / "count", 2)
    shutil.rmtree(folder / "count")
    return fault.calls


@pytest.mark.parametrize("strike", [no_space, interrupt])
@pytest.mark.parametrize("step", [2, 1], ids=["another step", "the same step"])
def test_a_failed_save_leaves_the_old_checkpoint_and_no_litter(
    step: int, strike: Callable[[], None], tmp_path: Path
) -> None:
    """At each write, flush and rename in turn. Then the same save goes through."""
    writes = count_writes(tmp_path)
    assert writes >= 8, "two tensor files, a manifest, four flushes of them and their folder, a rename, a flush"
    # The last flush is left out for another step: then the new checkpoint is there, and whole.
    for position in range(1, writes + 2 * (step == 1)):
        folder = tmp_path / f"{position}"
        save(folder, 1)
        with pytest.MonkeyPatch.context() as patch:
            Fault(position, strike).install(patch)
            with pytest.raises((OSError, KeyboardInterrupt)):
                save(folder, step, total_limit=1)
        assert_is(latest_checkpoint(folder)[0], 1)
        assert litter(folder) == []
        save(folder, step, total_limit=1)
        assert_is(latest_checkpoint(folder)[0], step)
        assert len(list_checkpoints(folder)) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    """A real process that dies on the spot, nothing cleaned up; the next save removes what it left."""
    seen = set()
    for position in range(1, count_writes(tmp_path) + 1):
        folder = tmp_path / f"{position}"
        save(folder, 1)
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                Fault(position, lambda: os._exit(9)).install(patch)
                save(folder, 2, total_limit=1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        newest, passed_over = latest_checkpoint(folder)
        assert newest is not None and passed_over == []
        assert_is(newest, newest.step)
        seen.add(newest.step)
        save(folder, 3, total_limit=1)
        assert_is(latest_checkpoint(folder)[0], 3)
        assert litter(folder) == []
    assert seen == {1, 2}


def test_litter_is_removed_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".tmp-old").mkdir()
    (tmp_path / ".tmp-old" / "unet.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    remove_litter(tmp_path)
    assert litter(tmp_path) == ["notes.txt"]
    assert_is(latest_checkpoint(tmp_path)[0], 1)


# --- damaged -------------------------------------------------------------------------------------------------------


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def list_file(path: Path, name: str, content: bytes) -> None:
    """A file with the right hash in an otherwise consistent manifest."""
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = checkpointing.hash_file(path / name)
    manifest.pop("sha256")
    manifest["sha256"] = checkpointing._manifest_sha256(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated tensors": (lambda p: truncate(p / "unet.safetensors"), r"unet.safetensors is damaged"),
    "emptied tensors": (lambda p: (p / "unet.safetensors").write_bytes(b""), r"unet.safetensors is damaged"),
    "swapped tensors": (
        lambda p: shutil.copy(p / "optimizer.safetensors", p / "unet.safetensors"),
        r"unet.safetensors is damaged",
    ),
    "missing tensors": (lambda p: (p / "unet.safetensors").unlink(), r"is not a whole checkpoint: FileNotFoundError"),
    "missing manifest": (lambda p: (p / MANIFEST).unlink(), r"is not a whole checkpoint: FileNotFoundError"),
    "truncated manifest": (lambda p: truncate(p / MANIFEST), r"is not a whole checkpoint: JSONDecodeError"),
    "empty manifest": (lambda p: (p / MANIFEST).write_text(""), r"is not a whole checkpoint"),
    "manifest of another kind": (lambda p: (p / MANIFEST).write_text("[1, 2]"), r"is not a whole checkpoint"),
    "newer format": (lambda p: edit_manifest(p, format=2), r"has format 2; this version reads 1"),
    "another step": (lambda p: edit_manifest(p, step=200), r"manifest.json is damaged"),
    "other facts": (lambda p: edit_manifest(p, facts={"ledger_head": [0, "00"]}), r"manifest.json is damaged"),
    "no hashes": (lambda p: edit_manifest(p, files={}), r"manifest.json is damaged"),
    "empty folder": (lambda p: [file.unlink() for file in p.iterdir()], r"is not a whole checkpoint"),
    "pickle": (lambda p: list_file(p, "model.bin", b"\x80\x04."), r"model.bin is foreign"),
    "file elsewhere": (lambda p: list_file(p, "../model.safetensors", b""), r"../model.safetensors is foreign"),
    "no tensors inside": (lambda p: list_file(p, "more.safetensors", b"not tensors"), r"is not a whole checkpoint"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(kind: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[kind]
    for step in (5, 10, 20):
        save(tmp_path, step)
    newest = list_checkpoints(tmp_path)[0]
    damage(newest)
    with pytest.raises(ValueError, match=rf"^checkpoint-00000020.*{message}"):
        load_checkpoint(newest)
    found, passed_over = latest_checkpoint(tmp_path)
    assert_is(found, 10)
    assert len(passed_over) == 1 and passed_over[0].startswith("passed over: checkpoint-00000020")
    assert str(tmp_path) not in passed_over[0] and "\n" not in passed_over[0]


def test_where_all_are_damaged_there_is_none_and_each_is_named(tmp_path: Path) -> None:
    for step in (5, 10):
        (save(tmp_path, step) / MANIFEST).unlink()
    found, passed_over = latest_checkpoint(tmp_path)
    assert found is None
    assert [line.split()[2] for line in passed_over] == ["checkpoint-00000010", "checkpoint-00000005"]


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """One bit at each of many places of every file: refused, or what is read is what was saved."""
    path = save(tmp_path, 8)
    harmless = 0
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        stride = 1 if file.name == MANIFEST else 37
        for place in range(0, len(whole), stride):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            file.write_bytes(flipped)
            try:
                assert_is(load_checkpoint(path), 8)
                harmless += 1
            except ValueError:
                pass
        file.write_bytes(whole)
    assert harmless <= 5, "some white space of the manifest"
    assert_is(load_checkpoint(path), 8)


def test_a_file_that_the_manifest_does_not_list_is_never_read(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    (path / "model.pkl").write_bytes(b"\x80\x04.")
    (path / "more.safetensors").write_bytes(b"not tensors")
    assert_is(load_checkpoint(path), 4)
