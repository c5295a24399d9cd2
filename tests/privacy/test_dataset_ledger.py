"""The ledger of a dataset: totals, refusals, places and copies, and processes that use it at once."""

from __future__ import annotations

import errno
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from dp_curriculum.privacy import dataset_ledger
from dp_curriculum.privacy.accounting import GaussianEvent, PrivacyBudgetExceeded, compute_epsilon
from dp_curriculum.privacy.composition import Charge, total_epsilon
from dp_curriculum.privacy.dataset_budget import DatasetBudget, release_facts
from dp_curriculum.privacy.dataset_ledger import DatasetLedger, create_dataset_ledger, key_path
from dp_curriculum.privacy.hash_chain import HashChain, LedgerLockedError, LedgerTamperedError
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.privacy.selection import Selection, Tries
from dp_curriculum.runtime import storage


pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*")
DELTA = 1e-5
ONE = Charge((GaussianEvent(2.0),))  # epsilon 1.8
BUDGET = DatasetBudget(epsilon=6.0, delta=DELTA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create_dataset_ledger(tmp_path / "ledger.jsonl", BUDGET)
    return tmp_path / "ledger.jsonl"


def own_of(path: Path, holder: str) -> PrivacyLedger:
    """The ledger of a run, which lies beside."""
    return PrivacyLedger.open(path.parent / holder / "privacy_ledger.jsonl")


def reserve(path: Path, holder: str, charge: Charge = ONE, data: str = "the data") -> None:
    with own_of(path, holder) as own, DatasetLedger.open(path) as ledger:
        ledger.reserve(own, charge, label=holder, data=data)


def settle(path: Path, holder: str, charge: Charge) -> None:
    with own_of(path, holder) as own, DatasetLedger.open(path) as ledger:
        ledger.settle(own, charge)


def spent(path: Path) -> float:
    with DatasetLedger.open(path) as ledger:
        return ledger.budget.spent(ledger.charges)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


# --- what it adds up -------------------------------------------------------------------------------------------------


def test_the_total_is_the_composition_of_all_events_of_all_runs(path: Path) -> None:
    charges = [Charge((GaussianEvent(9.0, 0.1, 20), GaussianEvent(7.0))), Charge((GaussianEvent(9.0, 0.1, 30),)), ONE]
    for number, charge in enumerate(charges):
        reserve(path, f"run {number}", charge)
    together = [GaussianEvent(9.0, 0.1, 50), GaussianEvent(7.0), GaussianEvent(2.0)]
    for adjacency in ("add-or-remove-one", "replace-one"):
        expected = compute_epsilon(together, DELTA, adjacency=adjacency)  # type: ignore[arg-type]
        with DatasetLedger.open(path) as ledger:
            found = ledger.budget.spent(ledger.charges, adjacency=adjacency)  # type: ignore[arg-type]
        assert found == pytest.approx(expected, rel=1e-9)
    assert spent(path) > max(charge.epsilon(DELTA, adjacency="add-or-remove-one") for charge in charges)


def test_selections_are_added_each_at_a_part_of_delta() -> None:
    choice = Selection(Tries(3.0), (ONE.events,))
    charges = [ONE, Charge((), choice), Charge((), choice)]
    expected = ONE.epsilon(DELTA / 3, adjacency="add-or-remove-one") + 2 * choice.epsilon(DELTA / 3)
    assert total_epsilon(charges, DELTA, adjacency="add-or-remove-one") == pytest.approx(expected)
    assert total_epsilon([Charge((), choice)], DELTA, adjacency="add-or-remove-one") == choice.epsilon(DELTA)


def test_what_does_not_fit_is_refused_with_what_is_left_and_nothing_is_written(path: Path) -> None:
    fitting = max(n for n in range(1, 20) if compute_epsilon([GaussianEvent(2.0, 1.0, n)], DELTA) <= BUDGET.epsilon)
    for number in range(fitting):
        reserve(path, f"run {number}")
    before = lines(path)
    with pytest.raises(
        PrivacyBudgetExceeded, match=r"About [\d.]+ is left for one run with --target_delta=1e-05: ask for less"
    ) as refused:
        reserve(path, "one more")
    said = float(str(refused.value).split("About ")[1].split(" ")[0])
    with DatasetLedger.open(path) as ledger:
        left = ledger.budget.left(ledger.charges)
    assert 0 < left < ONE.epsilon(DELTA, adjacency="add-or-remove-one") and said == math.floor(1000 * left) / 1000
    assert lines(path) == before


def test_what_is_said_to_be_left_fits_and_a_little_more_does_not(path: Path) -> None:
    from dp_curriculum.privacy.accounting import calibrate_noise_multiplier

    reserve(path, "first")
    with DatasetLedger.open(path) as ledger:
        left = ledger.budget.left(ledger.charges)
    assert left > BUDGET.epsilon - spent(path), "composition is more than a sum"
    for share in (1.0, 1.01):
        noise = calibrate_noise_multiplier(
            target_epsilon=share * left, target_delta=DELTA, sample_rate=1.0, num_steps=1
        )
        charge = Charge((GaussianEvent(noise),))
        if share == 1.0:
            reserve(path, "fits", charge)
            settle(path, "fits", Charge())
        else:
            with pytest.raises(PrivacyBudgetExceeded):
                reserve(path, "does not", charge)


def test_a_run_settles_for_what_it_spent_and_reserves_again_to_go_on(path: Path) -> None:
    many = Charge((GaussianEvent(4.0, 1.0, 8),))
    reserve(path, "a", many)
    settle(path, "a", Charge((GaussianEvent(4.0, 1.0, 3),)))
    assert spent(path) == compute_epsilon([GaussianEvent(4.0, 1.0, 3)], DELTA)
    reserve(path, "a", many)
    assert spent(path) == compute_epsilon([GaussianEvent(4.0, 1.0, 8)], DELTA)
    with DatasetLedger.open(path) as ledger:
        assert [(run.label, run.settled) for run in ledger.runs] == [("a", False)]


@pytest.mark.parametrize(
    "charge",
    [
        Charge((GaussianEvent(2.0, 1.0, 2),)),  # more steps
        Charge((GaussianEvent(1.9),)),  # less noise
        Charge((), Selection(Tries(2.0), ((GaussianEvent(2.0),),))),
    ],
)
def test_no_run_settles_for_what_it_did_not_reserve(path: Path, charge: Charge) -> None:
    reserve(path, "a")
    with pytest.raises(ValueError, match="spent no more than it reserved"):
        settle(path, "a", charge)
    settle(path, "a", ONE)
    for holder in ("a", "b"):
        with pytest.raises(ValueError, match="to have reserved"):
            settle(path, holder, Charge())


def test_a_selection_is_never_settled_away(path: Path) -> None:
    choice = Charge((), Selection(Tries(2.0), ((GaussianEvent(9.0),),)))
    reserve(path, "tuning", choice)
    with pytest.raises(ValueError, match="spent no more"):
        settle(path, "tuning", Charge())
    settle(path, "tuning", choice)
    assert spent(path) == choice.selection.epsilon(DELTA)  # type: ignore[union-attr]


def test_what_was_shared_is_noted_and_told(path: Path) -> None:
    for holder in ("a", "b"):
        reserve(path, holder, Charge((GaussianEvent(9.0),)))
    with DatasetLedger.open(path) as ledger:
        ledger.note_release(ledger.runs[0].holder, how="push", to="org/model")
        with pytest.raises(ValueError, match="it is not"):
            ledger.note_release("c", how="push", to="org/model")
        assert [run.shared for run in ledger.runs] == [("push to org/model",), ()]
        facts = release_facts(ledger.budget, ledger.runs)
    assert (facts["num_runs"], facts["num_shared"], facts["limit"]) == (2, 1, 6.0)
    assert facts["epsilon"] == compute_epsilon([GaussianEvent(9.0, 1.0, 2)], DELTA), "all runs, shared or not"
    assert facts["mechanisms"] == [{"noise_multiplier": 9.0, "sample_rate": 1.0, "num_steps": 2}]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"epsilon": math.inf}, "epsilon=inf"),
        ({"delta": 0.5}, "delta=0.5"),
        ({"unit": "family"}, "unit=family"),
        ({"adjacency": "near"}, "adjacency=near"),
        ({"group_size": 0}, "group_size=0"),
    ],
)
def test_a_budget_out_of_range_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DatasetBudget(**{"epsilon": 1.0, "delta": DELTA, **fields})


def test_a_ledger_is_made_once_and_for_its_owner_alone(path: Path) -> None:
    for file in (path, key_path(path)):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="A dataset has one ledger"):
        create_dataset_ledger(path, BUDGET)
    path.unlink()
    with pytest.raises(ValueError, match="A dataset has one ledger"):  # its key is there
        create_dataset_ledger(path, BUDGET)


def test_a_ledger_that_is_not_there_is_not_made_in_passing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to exist: its owner makes it once"), DatasetLedger.open(tmp_path / "none"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_edited_or_shortened_ledger_is_refused(path: Path) -> None:
    reserve(path, "a")
    text = path.read_text(encoding="utf-8")
    for broken in (text.replace('"num_steps": 1', '"num_steps": 2'), "".join(text.splitlines(True)[:1])):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(LedgerTamperedError, match="ask the owner of the data"):
            spent(path)
    path.unlink()
    with pytest.raises(LedgerTamperedError, match="is missing"):
        spent(path)


def test_the_key_belongs_to_the_ledger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_path(path).read_bytes()
    for other, said in ((bytes(32), "is the key of another ledger"), (key[:-1], "is no key")):
        key_path(path).write_bytes(other)
        with pytest.raises(ValueError, match=said):
            spent(path)
    key_path(path).unlink()
    with pytest.raises(ValueError, match="is missing. Restore it"):
        spent(path)

    def denied(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ValueError, match="belongs to another user, who owns this ledger"):
        spent(path)


def test_a_moved_or_copied_ledger_is_refused_until_its_owner_adopts_it(path: Path, tmp_path: Path) -> None:
    reserve(path, "a")
    (tmp_path / "copy").mkdir()
    for file in [path, key_path(path), path.with_name(path.name + ".head")]:
        shutil.copy2(file, tmp_path / "copy" / file.name)
    copy = tmp_path / "copy" / path.name
    with pytest.raises(LedgerTamperedError, match="was moved, copied or restored"):
        spent(copy)
    assert spent(path) > 0, "the first one is as it was"
    with DatasetLedger.open(copy, adopt=True) as ledger:
        assert len(ledger.charges) == 1
    assert spent(copy) == spent(path)


def test_an_older_copy_in_its_place_is_refused(path: Path, tmp_path: Path) -> None:
    """As another file; and, where a file system gives it the number of the first, by each run that saw more."""
    head = path.with_name(path.name + ".head")
    older = path.read_bytes(), head.read_bytes()
    reserve(path, "a")
    path.rename(tmp_path / "kept")
    path.write_bytes(older[0])
    head.write_bytes(older[1])
    with pytest.raises(LedgerTamperedError, match="restored from a copy"):
        spent(path)
    path.unlink()
    (tmp_path / "kept").rename(path)
    path.write_bytes(older[0])
    assert spent(path) == 0
    for _ in range(2):
        with pytest.raises(LedgerTamperedError, match="older than a run that it is to hold"):
            reserve(path, "a")
        reserve(path, "b")  # as many lines, and others


def test_a_run_stays_with_its_ledger(path: Path, tmp_path: Path) -> None:
    create_dataset_ledger(tmp_path / "other" / "ledger.jsonl", BUDGET)
    reserve(path, "a")
    with own_of(path, "a") as own, DatasetLedger.open(tmp_path / "other" / "ledger.jsonl") as other:
        with pytest.raises(LedgerTamperedError, match="charged to another ledger"):
            other.reserve(own, ONE, label="a", data="the data")
        assert other.charges == []


def test_a_run_whose_own_ledger_is_older_than_its_charge_is_refused(path: Path) -> None:
    """It would spend again what was spent after it was copied."""
    reserve(path, "a")
    run = path.parent / "a"
    files = [run / "privacy_ledger.jsonl", run / "privacy_ledger.jsonl.head"]
    older = [file.read_bytes() for file in files]
    settle(path, "a", ONE)  # notes the last line of the run's ledger, too
    reserve(path, "a")
    for file, content in zip(files, older):
        file.write_bytes(content)  # the same file
    with pytest.raises(LedgerTamperedError, match="is older than what was charged for it"):
        reserve(path, "a")


def test_a_copied_run_is_charged_for_itself(path: Path) -> None:
    reserve(path, "a", Charge((GaussianEvent(9.0),)))
    shutil.copytree(path.parent / "a", path.parent / "b")
    reserve(path, "b", Charge((GaussianEvent(9.0),)))
    assert spent(path) == compute_epsilon([GaussianEvent(9.0, 1.0, 2)], DELTA)


def test_a_run_that_was_killed_between_the_two_ledgers_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each of its lines: what is held then is what was reserved, or nothing."""
    for kept in range(1, 4):
        with pytest.MonkeyPatch.context() as patch:
            append, left = HashChain.append, [kept]

            def until(self: HashChain, body: dict[str, Any], left: list[int] = left, append: Any = append) -> int:
                left[0] -= body["type"] in ("dataset-ledger", "reserve")
                if left[0] < 0:
                    raise KeyboardInterrupt
                return append(self, body)

            patch.setattr(HashChain, "append", until)
            if kept < 3:
                with pytest.raises(KeyboardInterrupt):
                    reserve(path, f"run {kept}", Charge((GaussianEvent(20.0),)))
        with DatasetLedger.open(path) as ledger:
            held = [run.label for run in ledger.runs]
        assert (f"run {kept}" in held) == (kept == 2)
        reserve(path, f"run {kept}", Charge((GaussianEvent(20.0),)))
    assert spent(path) == compute_epsilon([GaussianEvent(20.0, 1.0, 3)], DELTA)


def test_other_images_are_told(path: Path) -> None:
    reserve(path, "a")
    with pytest.raises(ValueError, match="it is the ledger of other images"):
        reserve(path, "b", data="other data")
    reserve(path, "b")


def test_network_and_read_only_disks_are_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:5 / {str(tmp_path)} rw shared:1 - nfs4 host:/x rw\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(storage, "_MOUNTS", mounts)
    with pytest.raises(ValueError, match=r"network file system \(nfs4\)"):
        create_dataset_ledger(tmp_path / "other.jsonl", BUDGET)
    with pytest.raises(ValueError, match=r"network file system \(nfs4\)"):
        spent(path)
    assert storage.file_system(Path("/")) == "ext4"
    monkeypatch.setattr(storage, "_MOUNTS", tmp_path / "none")
    assert storage.file_system(tmp_path) == ""
    opened = os.open

    def read_only(file: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, "Read-only file system", str(file))
        return opened(file, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match="Read-only file system"):
        spent(path)


# --- several at once -------------------------------------------------------------------------------------------------


def _reserve_until_refused(path: Path, name: str) -> None:
    for number in itertools.count():
        try:
            reserve(path, f"{name}-{number}", Charge((GaussianEvent(8.0),)))
        except PrivacyBudgetExceeded:
            os._exit(0)


def test_processes_at_once_and_kills_at_any_moment_never_pass_the_budget(path: Path) -> None:
    """Two reserve until they are refused; a third is killed again and again meanwhile."""
    fork = multiprocessing.get_context("fork")
    steady = [fork.Process(target=_reserve_until_refused, args=(path, f"p{number}")) for number in range(2)]
    for process in steady:
        process.start()
    for number in range(5):
        victim = fork.Process(target=_reserve_until_refused, args=(path, f"v{number}"))
        victim.start()
        time.sleep(0.02 * number)
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    for process in steady:
        process.join(120)
        assert process.exitcode == 0
    with DatasetLedger.open(path) as ledger:
        holders, total = [run.holder for run in ledger.runs], ledger.budget.spent(ledger.charges)
    assert len(set(holders)) == len(holders) > 4
    assert total == pytest.approx(compute_epsilon([GaussianEvent(8.0, 1.0, len(holders))], DELTA), rel=1e-9)
    one_more = compute_epsilon([GaussianEvent(8.0, 1.0, len(holders) + 1)], DELTA)
    assert total <= BUDGET.epsilon < one_more


def test_a_ledger_in_use_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_ledger, "_WAIT_SECONDS", 0.2)
    with DatasetLedger.open(path):
        start = time.monotonic()
        with pytest.raises(LedgerLockedError):
            spent(path)
        assert time.monotonic() - start > 0.1
    assert spent(path) == 0


def test_a_charge_reads_back_as_it_was_written() -> None:
    charge = Charge((GaussianEvent(2.0, 0.5, 3),), Selection(Tries(4.0, "poisson"), ((GaussianEvent(2.0),),)))
    assert Charge.from_dict(json.loads(json.dumps(charge.to_dict()))) == charge
    for broken in ({}, {"mechanisms": [{}], "selection": None}, {"mechanisms": [], "selection": {}}):
        with pytest.raises(ValueError, match="Expected"):
            Charge.from_dict(broken)
