"""The ledger on disk: what it charges, what it refuses to be told, and what faults and crashes leave behind."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dp_curriculum.privacy.accounting import GaussianEvent, compute_epsilon
from dp_curriculum.privacy.execution import NOTHING_EXECUTED, Execution
from dp_curriculum.privacy.hash_chain import HashChain
from dp_curriculum.privacy.ledger import (
    LedgerLockedError,
    LedgerTamperedError,
    PrivacyLedger,
    PrivacyReport,
    ledger_held,
)


EASY = GaussianEvent(5.0, sample_rate=0.1, num_steps=5)
HARD = GaussianEvent(2.0, sample_rate=0.05, num_steps=100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a run, ünfinished" / "privacy_ledger.jsonl"


def head_of(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def spend(path: Path, *, blocks: int = 2) -> tuple[int, str]:
    """A ledger with an easy stage and some blocks of the hard one; returns its head."""
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(EASY, stage="central-images", clip_norm=3.5)
        for _ in range(blocks):
            ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        return ledger.head


def reopened(path: Path) -> tuple[GaussianEvent, ...]:
    with PrivacyLedger.open(path, create=False) as ledger:
        return ledger.events


def test_stages_are_listed_in_order_with_their_blocks_added_up(path: Path) -> None:
    spend(path)
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(GaussianEvent(3.0, 1.0, 2), stage="dp-sgd", clip_norm=1.0)
        assert ledger.mechanisms == [
            {
                "name": "central-images",
                "mechanism": "subsampled-gaussian",
                "sampling": "poisson",
                "sample_rate": 0.1,
                "noise_multiplier": 5.0,
                "clip_norm": 3.5,
                "num_steps": 5,
            },
            {
                "name": "dp-sgd",
                "mechanism": "subsampled-gaussian",
                "sampling": "poisson",
                "sample_rate": 0.05,
                "noise_multiplier": 2.0,
                "clip_norm": 1.0,
                "num_steps": 200,
            },
            {
                "name": "dp-sgd",
                "mechanism": "gaussian",
                "sampling": "none",
                "sample_rate": 1.0,
                "noise_multiplier": 3.0,
                "clip_norm": 1.0,
                "num_steps": 2,
            },
        ]


def test_epsilon_is_that_of_all_stages_together(path: Path) -> None:
    spend(path)
    both = compute_epsilon([EASY, HARD, HARD], 1e-5)
    with PrivacyLedger.open(path) as ledger:
        assert ledger.epsilon(1e-5) == both > compute_epsilon([HARD, HARD], 1e-5)
        assert ledger.epsilon(1e-5, adjacency="replace-one") > both


def test_a_new_ledger_has_spent_nothing(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        assert (ledger.epsilon(1e-5), ledger.events, ledger.not_private_reasons) == (0.0, (), ())
        assert ledger.path == path and ledger.head[0] == 0


def test_a_reservation_is_on_disk_in_both_files_before_the_release_it_pays_for(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        line = ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        last = json.loads(path.read_bytes().splitlines()[-1])
        assert (last["seq"], last["noise_multiplier"], last["num_steps"]) == (line, 2.0, 100)
        assert json.loads(head_of(path).read_bytes()) == {"seq": line, "sha256": last["sha256"]}
        assert ledger.head == (line, last["sha256"])


def test_a_reservation_is_synced_to_disk_line_first_and_head_last(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    with PrivacyLedger.open(path) as ledger:
        for name in ("write", "fsync", "replace"):
            monkeypatch.setattr(os, name, _recorded(name, calls))
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
    assert calls == ["write", "fsync", "write", "fsync", "replace", "fsync"]


def _recorded(name: str, calls: list[str]) -> Callable[..., Any]:
    function = getattr(os, name)

    def wrapper(*args: Any) -> Any:
        calls.append(name)
        return function(*args)

    return wrapper


def test_the_chain_can_be_verified_by_anybody(path: Path) -> None:
    """By hand, from what the documentation says: sorted keys, no spaces, the hash of the line before in each line."""
    spend(path)
    previous, lines = "0" * 64, [json.loads(line) for line in path.read_text().splitlines()]
    for number, entry in enumerate(lines):
        sha256 = entry.pop("sha256")
        canonical = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert sha256 == hashlib.sha256(canonical.encode()).hexdigest()
        assert (entry["seq"], entry["previous"]) == (number, previous)
        previous = sha256
    assert lines[0]["type"] == "header" and lines[0]["schema_version"] == "1.1" and len(lines[0]["run_id"]) == 32
    assert not path.stat().st_mode & 0o111


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to tell which file is flushed")
def test_a_new_ledger_is_on_disk_with_the_folder_that_names_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.path.realpath(f"/proc/self/fd/{fd}")))
    PrivacyLedger.open(path).close()
    folder = os.path.realpath(path.parent)
    assert synced.index(folder) < synced.index(os.path.realpath(path)) and synced[-1] == folder


def test_a_ledger_of_one_charge_without_its_head_is_refused(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(EASY, stage="central-images", clip_norm=1.0)
    head_of(path).unlink()
    with pytest.raises(LedgerTamperedError, match="has lost"):
        PrivacyLedger.open(path)


def test_the_ledger_can_be_opened_again_and_goes_on_where_it_was(path: Path) -> None:
    head = spend(path)
    with PrivacyLedger.open(path, expected_at_least=head) as ledger:
        assert ledger.head == head
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
    with PrivacyLedger.open(path, expected_at_least=head) as ledger:
        assert ledger.head[0] == head[0] + 1
        assert [event.num_steps for event in ledger.events] == [5, 300]


def test_a_symlink_to_the_folder_is_the_same_ledger(path: Path, tmp_path: Path) -> None:
    spend(path)
    (tmp_path / "link").symlink_to(path.parent, target_is_directory=True)
    assert reopened(tmp_path / "link" / path.name) == reopened(path)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.inf, math.nan])
def test_a_clip_norm_that_bounds_nothing_is_refused_and_not_charged(path: Path, clip_norm: float) -> None:
    with PrivacyLedger.open(path) as ledger:
        with pytest.raises(ValueError, match=f"Expected clip_norm={clip_norm} in"):
            ledger.reserve(HARD, stage="dp-sgd", clip_norm=clip_norm)
        assert ledger.events == ()


# What the run holds, and how its steps were executed


def test_hashes_are_recorded_once_each_and_change_no_number(path: Path) -> None:
    spend(path)
    with PrivacyLedger.open(path) as ledger:
        events, epsilon, head = ledger.events, ledger.epsilon(1e-5), ledger.head
        for name, digest in (("unet", "a1"), ("unet", "a1"), ("unet", "b2"), ("released", "a1"), ("unet", "a1")):
            ledger.record(name, digest)
        assert ledger.digests("unet") == ("a1", "b2") and ledger.digests("released") == ("a1",)
        assert ledger.digests("nothing") == () and ledger.head[0] == head[0] + 3
        assert (ledger.events, ledger.epsilon(1e-5)) == (events, epsilon) and ledger.has_hashes
    with PrivacyLedger.open(path, create=False) as again:
        assert again.digests("unet") == ("a1", "b2") and again.events == events


def test_a_hash_is_synced_to_disk_before_anything_else_happens(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    with PrivacyLedger.open(path) as ledger:
        for name in ("write", "fsync", "replace"):
            monkeypatch.setattr(os, name, _recorded(name, calls))
        ledger.record("released", "a1")
    assert calls == ["write", "fsync", "write", "fsync", "replace", "fsync"]


def test_a_hash_between_a_block_and_its_tail_changes_nothing(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        ledger.record("checkpoint", "a1")
        ledger.give_back(stage="dp-sgd", num_steps=40)
        assert [event.num_steps for event in ledger.events] == [60]


def execution(generator: str) -> Execution:
    randomness = {"generator": generator, "mask_generator": "chacha20", "secret": True}
    return Execution(randomness=randomness, device="cpu", precision="float32", gradients="checked")


def test_the_weakest_execution_is_told_and_splits_no_stage(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        assert ledger.execution == NOTHING_EXECUTED
        for generator in ("chacha20", "numpy-philox", "chacha20"):
            ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0, execution=execution(generator))
        assert ledger.execution == execution("numpy-philox")
        assert [row["num_steps"] for row in ledger.mechanisms] == [300]
        assert "execution" not in ledger.mechanisms[0]
    with PrivacyLedger.open(path, create=False) as again:
        assert again.execution == execution("numpy-philox")
        again.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        assert again.execution.randomness["generator"] == "unknown" and again.execution.gradients == "unchecked"


def test_a_block_that_was_given_back_was_not_executed(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0, execution=execution("chacha20"))
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0, execution=execution("numpy-philox"))
        ledger.give_back(stage="dp-sgd", num_steps=99)
        assert ledger.execution == execution("numpy-philox")
        ledger.give_back(stage="dp-sgd", num_steps=1)
        assert ledger.execution == execution("chacha20")


def chain_of(path: Path, *bodies: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chain = HashChain(path)
    chain.load(create=True)
    for body in bodies:
        chain.append(body)
    chain.close()


CHARGE = {"type": "reserve", "session": "s", "stage": "dp-sgd", "mechanism": "gaussian", "sampling": "none",
          "sample_rate": 1.0, "noise_multiplier": 5.0, "clip_norm": 1.0, "num_steps": 2}  # fmt: skip


def test_a_ledger_of_an_earlier_version_is_read_and_says_what_it_does_not_know(path: Path) -> None:
    chain_of(path, {"type": "header", "schema_version": "1.0", "run_id": "r"}, CHARGE)
    with PrivacyLedger.open(path) as ledger:
        assert not ledger.has_hashes and ledger.events == (GaussianEvent(5.0, 1.0, 2),)
        fields = PrivacyReport.from_ledger(ledger, target_delta=1e-5).to_dict()
    assert fields["private"] and fields["randomness"]["generator"] == "unknown"
    assert fields["implementation"]["device"] == fields["implementation"]["precision"] == "unknown"
    assert fields["implementation"]["verified_per_image_gradients"] is False


@pytest.mark.parametrize(
    "bodies",
    [
        [{"type": "header", "schema_version": "2.0", "run_id": "r"}],
        [{"type": "header", "run_id": "r"}],
        [{"type": "header", "schema_version": "1.1", "run_id": "r"}, {**CHARGE, "execution": {"device": "cpu"}}],
        [{"type": "header", "schema_version": "1.1", "run_id": "r"}, {**CHARGE, "execution": "secure"}],
    ],
    ids=["a later version", "no version", "half an execution", "no execution"],
)
def test_a_ledger_of_another_form_is_refused(bodies: list[dict[str, Any]], path: Path) -> None:
    chain_of(path, *bodies)
    with pytest.raises(LedgerTamperedError, match="does not (follow schema 1.1|add up)"):
        PrivacyLedger.open(path)


def test_a_ledger_is_held_without_being_read(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("nothing that is a ledger")
    with ledger_held(path), pytest.raises(LedgerLockedError):
        PrivacyLedger.open(path)
    with ledger_held(path):
        pass
    assert path.read_text() == "nothing that is a ledger"


def test_the_report_is_found_beside_the_ledger(path: Path) -> None:
    spend(path)
    with PrivacyLedger.open(path) as ledger:
        assert PrivacyReport.from_ledger(ledger, target_delta=1e-5).epsilon == ledger.epsilon(1e-5)


# Tampering


def _edit(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in change(path.read_bytes().splitlines())))


def _less_charged(lines: list[bytes], *, forge: bool) -> list[bytes]:
    """The first block of DP-SGD at ten times its noise, with its own hash made to fit if `forge`."""
    entry = json.loads(lines[2])
    entry["noise_multiplier"] *= 10
    if forge:
        del entry["sha256"]
        canonical = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        entry["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    return [*lines[:2], json.dumps(entry).encode(), *lines[3:]]


TAMPERING: dict[str, Callable[[Path], None]] = {
    "a line edited": lambda path: _edit(path, lambda lines: _less_charged(lines, forge=False)),
    "a line edited, its hash too": lambda path: _edit(path, lambda lines: _less_charged(lines, forge=True)),
    "last line edited, its hash too": lambda path: _edit(path, lambda lines: _less_charged(lines[:3], forge=True)),
    "a line removed": lambda path: _edit(path, lambda lines: [*lines[:2], *lines[3:]]),
    "two lines swapped": lambda path: _edit(path, lambda lines: [*lines[:2], lines[3], lines[2]]),
    "a line repeated": lambda path: _edit(path, lambda lines: [*lines, lines[-1]]),
    "header removed": lambda path: _edit(path, lambda lines: lines[1:]),
    "last line cut off": lambda path: _edit(path, lambda lines: lines[:-1]),
    "last line torn": lambda path: os.truncate(path, path.stat().st_size - 10),
    "emptied": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(b"\x00\xff\n[]\n"),
    "a line of another type": lambda path: _edit(path, lambda lines: [*lines, b"[1]"]),
    "deleted": lambda path: path.unlink(),
    "head deleted": lambda path: head_of(path).unlink(),
    "head emptied": lambda path: head_of(path).write_bytes(b""),
    "head of another type": lambda path: head_of(path).write_bytes(b"[3]"),
    "head of another line": lambda path: head_of(path).write_text(json.dumps({"seq": 1, "sha256": "0" * 64})),
}


@pytest.mark.parametrize("tamper", TAMPERING.values(), ids=TAMPERING)
def test_a_ledger_that_is_not_as_it_was_written_is_refused(path: Path, tamper: Callable[[Path], None]) -> None:
    spend(path)
    tamper(path)
    for _ in range(2):  # and the refusal mends nothing
        with pytest.raises(
            LedgerTamperedError, match="^Refusing to use .*: it .*. Restore it, or start another run.$"
        ) as caught:
            PrivacyLedger.open(path)
        assert "\n" not in str(caught.value)


def test_an_older_copy_is_refused_by_the_head_file(path: Path, tmp_path: Path) -> None:
    spend(path, blocks=1)
    shutil.copy(path, tmp_path / "older")
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
    shutil.copy(tmp_path / "older", path)
    with pytest.raises(LedgerTamperedError, match="cut short or replaced by an older copy"):
        PrivacyLedger.open(path)


def test_an_older_copy_of_both_files_is_refused_by_the_head_in_a_checkpoint(path: Path, tmp_path: Path) -> None:
    spend(path, blocks=1)
    shutil.copytree(path.parent, tmp_path / "older")
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        head = ledger.head
    shutil.copytree(tmp_path / "older", path.parent, dirs_exist_ok=True)
    with pytest.raises(LedgerTamperedError, match="lacks a line that a checkpoint has seen"):
        PrivacyLedger.open(path, expected_at_least=head)


@pytest.mark.parametrize("blocks", [1, 5])
def test_the_ledger_of_another_run_is_refused_by_the_head_in_a_checkpoint(
    path: Path, tmp_path: Path, blocks: int
) -> None:
    head = spend(path)
    other = tmp_path / "other" / path.name
    spend(other, blocks=blocks)
    with pytest.raises(LedgerTamperedError, match="lacks a line that a checkpoint has seen"):
        PrivacyLedger.open(other, expected_at_least=head)


def test_a_deleted_run_does_not_start_anew_where_a_checkpoint_remembers_it(path: Path) -> None:
    head = spend(path)
    shutil.rmtree(path.parent)
    with pytest.raises(LedgerTamperedError, match="is missing"):
        PrivacyLedger.open(path, expected_at_least=head)
    assert not path.exists()
    path.touch()
    with pytest.raises(LedgerTamperedError, match="is empty"):
        PrivacyLedger.open(path, expected_at_least=head)


def test_a_missing_ledger_is_not_created_on_request(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with pytest.raises(LedgerTamperedError, match="is missing"):
        PrivacyLedger.open(path, create=False)
    assert not path.exists()


def test_a_ledger_of_another_schema_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spend(path)
    monkeypatch.setattr("dp_curriculum.privacy.ledger.SCHEMA_VERSION", "9.9")
    with pytest.raises(LedgerTamperedError, match=r"does not follow schema 9\.9"):
        PrivacyLedger.open(path)


def _replaced(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        _replaced,
        lambda path: os.truncate(path, 10),
        lambda path: path.write_bytes(path.read_bytes() + b"{}\n"),
    ],
    ids=["deleted", "replaced", "cut", "appended to"],
)
def test_nothing_is_charged_to_a_file_that_changed_while_open(path: Path, change: Callable[[Path], None]) -> None:
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        change(path)
        with pytest.raises(LedgerTamperedError, match="changed or replaced while open"):
            ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)


# One process at a time


def in_child(work: Callable[[], object]) -> str:
    """Runs `work` in a forked process; the name of what it raised, or "returned"."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "returned"
        try:
            work()
        except BaseException as error:
            outcome = type(error).__name__
        os.write(writer, outcome.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read()


def test_a_ledger_is_held_by_one_handle_and_one_process(path: Path) -> None:
    with PrivacyLedger.open(path):
        with pytest.raises(LedgerLockedError, match="another process holds this privacy ledger"):
            PrivacyLedger.open(path)
        assert in_child(lambda: PrivacyLedger.open(path)) == "LedgerLockedError"
    assert in_child(lambda: PrivacyLedger.open(path)) == "returned"


def test_a_forked_process_can_neither_charge_nor_unlock_the_ledger_of_its_parent(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        assert in_child(lambda: ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)) == "RuntimeError"
        assert in_child(ledger.close) == "returned"
        assert in_child(lambda: PrivacyLedger.open(path)) == "LedgerLockedError"
        ledger.reserve(EASY, stage="central-images", clip_norm=1.0)
    assert reopened(path) == (EASY,)


def test_a_closed_ledger_takes_no_charge_but_still_tells_what_it_holds(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.reserve(EASY, stage="central-images", clip_norm=1.0)
    ledger.close()
    ledger.close()
    with pytest.raises(RuntimeError, match="to be open in this process"):
        ledger.reserve(EASY, stage="central-images", clip_norm=1.0)
    assert ledger.events == (EASY,)


def test_a_refused_ledger_is_not_left_locked(path: Path) -> None:
    spend(path)
    kept = path.read_bytes()
    path.write_bytes(b"garbage\n")
    with pytest.raises(LedgerTamperedError) as held:  # the error keeps its frames, and what they refer to, alive
        PrivacyLedger.open(path)
    path.write_bytes(kept)
    assert len(reopened(path)) == 2
    assert held.value


# Giving back


def test_the_unexecuted_tail_of_a_block_is_given_back_after_a_clean_stop(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        ledger.give_back(stage="dp-sgd", num_steps=30)
        ledger.give_back(stage="dp-sgd", num_steps=0)
        ledger.give_back(stage="dp-sgd", num_steps=20)
        assert [event.num_steps for event in ledger.events] == [150]
    assert [event.num_steps for event in reopened(path)] == [150]


def test_what_an_earlier_block_gave_back_is_not_taken_from_the_next(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        for num_steps in (30, 100):
            ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
            ledger.give_back(stage="dp-sgd", num_steps=num_steps)
        assert [event.num_steps for event in ledger.events] == [70]


def test_a_stage_that_gives_all_back_is_not_listed(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        ledger.give_back(stage="dp-sgd", num_steps=100)
        assert ledger.mechanisms == [] and ledger.epsilon(1e-5) == 0


@pytest.mark.parametrize(("stage", "steps"), [("dp-sgd", 101), ("dp-sgd", -1), ("central-images", 5)])
def test_no_more_is_given_back_than_the_last_block_holds(path: Path, stage: str, steps: int) -> None:
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(EASY, stage="central-images", clip_norm=1.0)
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        with pytest.raises(ValueError, match="Expected "):
            ledger.give_back(stage=stage, num_steps=steps)
        ledger.give_back(stage="dp-sgd", num_steps=60)
        with pytest.raises(ValueError, match=r"num_steps=41 in \[0, 40\]"):
            ledger.give_back(stage="dp-sgd", num_steps=41)


def test_a_block_from_before_a_restart_is_not_given_back(path: Path) -> None:
    spend(path)
    with PrivacyLedger.open(path) as ledger:
        with pytest.raises(ValueError, match="since the ledger was opened"):
            ledger.give_back(stage="dp-sgd", num_steps=1)


# Not private


def test_a_run_marked_not_private_stays_so(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(EASY, stage="central-images", clip_norm=1.0)
        ledger.mark_not_private("fixed test noise")
        ledger.mark_not_private("fixed test noise")
    with PrivacyLedger.open(path) as ledger:
        assert ledger.not_private_reasons == ("fixed test noise",)
        assert ledger.epsilon(1e-5) == math.inf


def test_a_stage_without_noise_is_not_private(path: Path) -> None:
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(GaussianEvent(0.0, 0.1, 3), stage="dp-sgd", clip_norm=1.0)
        assert ledger.not_private_reasons == ("stage 'dp-sgd' adds no noise",)
        assert ledger.epsilon(1e-5) == math.inf


# Faults and crashes


class Fault:
    """Makes the n-th call of an `os` function fail with "no space left on device", or all calls from it on."""

    def __init__(self, name: str, number: int, *, for_good: bool) -> None:
        self.calls, self.number, self.for_good, self.function = 0, number, for_good, getattr(os, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.number or (self.for_good and self.calls > self.number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.function(*args, **kwargs)


def _faults() -> Iterator[tuple[str, int]]:
    yield from itertools.chain(
        (("write", number) for number in (1, 2)), (("fsync", number) for number in (1, 2, 3)), [("replace", 1)]
    )


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize(("name", "number"), list(_faults()))
def test_a_full_disk_stops_the_step_and_leaves_a_ledger_that_opens(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, for_good: bool
) -> None:
    """Whatever fails, the caller is told, nothing acknowledged is lost, and no more than the one block is charged."""
    spend(path, blocks=1)
    ledger = PrivacyLedger.open(path)
    fault = Fault(name, number, for_good=for_good)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fault)
        with pytest.raises(OSError, match="No space left on device"):
            ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        assert fault.calls >= number
        with pytest.raises(RuntimeError, match="open the ledger again"):
            ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
        ledger.close()
    told = [event.num_steps for event in ledger.events]
    kept = [event.num_steps for event in reopened(path)]
    assert kept in ([5, 100], [5, 200])
    assert kept == told if not for_good else kept >= told
    if (name, number) != ("fsync", 3) and not for_good:  # all but the last: the head does not name the line yet
        assert kept == [5, 100]
    with PrivacyLedger.open(path) as again:  # and it goes on
        again.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
    assert reopened(path)[1].num_steps == kept[1] + 100


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
def test_a_full_disk_at_the_start_leaves_nothing_that_cannot_be_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for number in range(1, 5):
        fault = Fault(name, number, for_good=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fault)
            try:
                PrivacyLedger.open(path).close()
            except OSError:
                assert fault.calls >= number
        with PrivacyLedger.open(path) as ledger:
            assert ledger.events == ()
        shutil.rmtree(path.parent)


def test_short_writes_are_finished(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    spend(path)
    assert len(reopened(path)) == 2


def test_a_torn_line_was_never_acknowledged_and_is_dropped(path: Path) -> None:
    spend(path)
    with path.open("ab") as file:
        file.write(b'{"seq": 4, "type": "reserve", "noise_mult')
    assert [event.num_steps for event in reopened(path)] == [5, 200]
    assert path.read_bytes().endswith(b"}\n")


def test_a_whole_line_that_the_head_does_not_know_is_charged(path: Path) -> None:
    spend(path, blocks=1)
    older = head_of(path).read_bytes()
    with PrivacyLedger.open(path) as ledger:
        ledger.reserve(HARD, stage="dp-sgd", clip_norm=1.0)
    head_of(path).write_bytes(older)
    assert [event.num_steps for event in reopened(path)] == [5, 200]
    assert head_of(path).read_bytes() != older


def test_a_kill_at_any_moment_charges_what_was_acknowledged_and_at_most_one_block_more(path: Path) -> None:
    """Twelve processes or more reserve as fast as they can until they are killed; each acknowledges on a pipe."""
    rng, acknowledged, killed = random.Random(0), 0, 0
    while killed < 12 or (acknowledged == 0 and killed < 200):  # more where a busy machine starts none in time
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            ledger = PrivacyLedger.open(path)
            while True:
                ledger.reserve(GaussianEvent(2.0, 0.05), stage="dp-sgd", clip_norm=1.0)
                os.write(writer, b".")
        os.close(writer)
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        with os.fdopen(reader, "rb") as pipe:
            acknowledged += len(pipe.read())
        with PrivacyLedger.open(path) as ledger:
            charged = sum(event.num_steps for event in ledger.events)
            assert acknowledged <= charged <= acknowledged + 1
            acknowledged = charged
    assert acknowledged > 0
