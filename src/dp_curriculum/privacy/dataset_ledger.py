# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
"""
One budget for a dataset: a ledger in which every run on it reserves before it spends.

A run reserves all that it may spend before its first charge. When it ends in order, it settles for what its own ledger
charged; a run that crashed stays charged with all that it reserved, until it is resumed and ends. So what is held here
is never less than what was released.

The file is a hash chain, as that of a run is. It is opened for one line at a time, and locked while the total is
composed and the line is written, so that runs at the same time wait for each other. It is for its owner alone: beside
it lies a secret key, with which a keyed fingerprint of the data is taken. Both are readable by their owner only.

Copies. The first line has the place of the file, path and inode: what was moved, copied or restored as another file is
refused until its owner adopts it. Each run has in its own ledger the last line that it saw here, and is refused by a
ledger without it; and this one has the last line of the run's. A copied folder of a run is charged for itself.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dp_curriculum.privacy.accounting import PrivacyBudgetExceeded, round_up
from dp_curriculum.privacy.composition import Charge
from dp_curriculum.privacy.dataset_budget import DatasetBudget, HeldRun
from dp_curriculum.privacy.hash_chain import HashChain, LedgerTamperedError
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.runtime.storage import check_local_disk, fsync_directory, naming


SCHEMA_VERSION = "1.0"
KEY_BYTES = 32
_WAIT_SECONDS = 600.0  # for another run that composes the total, which takes seconds
_CURE = "Restore it from where the last run used it, or ask the owner of the data."
_LESS = "ask for less"
_KEY_CHECK = b"dp-curriculum dataset ledger"


def holder_of(own: PrivacyLedger) -> str:
    """Name of a run in the ledger of its dataset: a copy of its folder, which is another file, has another one."""
    return f"{own.run_id}-{own.path.stat().st_ino}"


def key_path(path: str | os.PathLike[str]) -> Path:
    """Secret key of the ledger at `path`."""
    return Path(path).with_name(Path(path).name + ".key")


def create_dataset_ledger(path: str | os.PathLike[str], budget: DatasetBudget) -> None:
    r"""
    Makes the ledger of a dataset, and its key. Once, by the owner of the data.

    Args:
        path (`str` or `os.PathLike`): A new file, in a folder of a local disk.
        budget ([`DatasetBudget`]): What may be spent in all.

    Raises:
        ValueError: If there is a ledger or a key, or the disk is a network share.
        OSError: If the disk refuses.
    """
    path = Path(path).resolve()
    for there in (path, key_path(path)):
        if there.exists():
            raise ValueError(
                f"Refusing to create {path}: {there} is there. A dataset has one ledger: use it, or name another file."
            )
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_local_disk(path.parent)
        key = os.urandom(KEY_BYTES)
        handle = os.open(key_path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, key)
            os.fsync(handle)
        finally:
            os.close(handle)
        fsync_directory(path.parent)
    chain = HashChain(path, cure=_CURE)
    try:
        chain.load(create=True)
        path.chmod(0o600)
        chain.append(
            {
                "type": "create",
                "schema_version": SCHEMA_VERSION,
                "ledger_id": uuid.uuid4().hex,
                "budget": asdict(budget),
                "key_check": _keyed(key, _KEY_CHECK),
                "place": _place(path),
            }
        )
    finally:
        chain.close()


class DatasetLedger:
    """
    The ledger of a dataset, while it is locked. Open it with [`DatasetLedger.open`], for a moment.

    Privacy:
        It holds public constants of runs, places of this machine, and a keyed fingerprint of the data, which says
        nothing without the key. It is its owner's, and is not shared.
    """

    def __init__(self, chain: HashChain, key: bytes) -> None:
        self._chain = chain
        self.key = key

    @classmethod
    @contextmanager
    def open(cls, path: str | os.PathLike[str], *, adopt: bool = False) -> Iterator[DatasetLedger]:
        r"""
        Opens and verifies the ledger, after other processes are done with it, and closes it at the end of the block.

        Args:
            path (`str` or `os.PathLike`): The ledger.
            adopt (`bool`, *optional*, defaults to `False`): Whether a ledger that was moved is taken for the only one.

        Raises:
            ValueError: If there is none, its disk is a network share, or its key is missing or another's.
            LedgerLockedError: If it is in use for minutes.
            LedgerTamperedError: If it was edited, cut short, copied, or replaced by another file.
        """
        path = Path(path).resolve()
        if not path.exists() and not path.with_name(path.name + ".head").exists():
            raise ValueError(
                f"Expected --dataset_ledger={path} to exist: its owner makes it once, with `dp-curriculum budget "
                "create`."
            )
        check_local_disk(path.parent)
        key = _read_key(path)
        chain = HashChain(path, wait=_WAIT_SECONDS, cure=_CURE)
        try:
            chain.load(create=False)
            ledger = cls(chain, key)
            ledger._check(adopt)
            yield ledger
        finally:
            chain.close()

    @property
    def path(self) -> Path:
        return self._chain.path

    @property
    def ledger_id(self) -> str:
        return str(self._chain.entries[0]["ledger_id"])

    @property
    def head(self) -> tuple[int, str]:
        """Number and sha256 of the last line."""
        last = self._chain.entries[-1]
        return last["seq"], last["sha256"]

    @property
    def budget(self) -> DatasetBudget:
        return DatasetBudget(**self._chain.entries[0]["budget"])

    @property
    def runs(self) -> list[HeldRun]:
        """All runs that ever reserved, in order."""
        last: dict[str, dict[str, Any]] = {}
        shared: dict[str, list[str]] = {}
        for entry in self._chain.entries:
            if entry["type"] in ("reserve", "settle"):
                last[entry["holder"]] = entry
            elif entry["type"] == "release":
                shared.setdefault(entry["holder"], []).append(f"{entry['how']} to {entry['to']}")
        return [
            HeldRun(
                holder,
                entry["label"],
                Charge.from_dict(entry["charge"]),
                entry["type"] == "settle",
                tuple(shared.get(holder, ())),
            )
            for holder, entry in last.items()
        ]

    @property
    def charges(self) -> list[Charge]:
        """Present charges, of every run."""
        return [run.charge for run in self.runs]

    def check_data(self, fingerprint: str) -> None:
        """
        Refuses other data than that of the first run.

        Raises:
            ValueError: If they differ. It says no more, and can only happen if the data changed between two runs.
        """
        known = next((entry["data"] for entry in self._chain.entries if entry["type"] == "reserve"), fingerprint)
        if not hmac.compare_digest(known, fingerprint):
            raise ValueError(
                f"Refusing to charge {self.path}: it is the ledger of other images. Name the images that it was made "
                "for, or create a ledger for these."
            )

    def check_seen(self, own: PrivacyLedger) -> None:
        """
        Refuses to be another ledger, or an older copy, than a run has seen.

        Args:
            own ([`~ledger.PrivacyLedger`]): That of the run; open or closed.

        Raises:
            LedgerTamperedError: If this one lacks a line that the run saw, or the run is charged to another ledger.
        """
        for note in own.dataset_notes:
            if note["ledger_id"] != self.ledger_id:
                raise LedgerTamperedError(
                    f"Refusing to use {str(self.path)!r}: the run of {str(own.path)!r} is charged to another ledger. "
                    "Name that one."
                )
            if note["line"] > self.head[0] or self._chain.entries[note["line"]]["sha256"] != note["line_sha256"]:
                raise self._chain.tampered("is older than a run that it is to hold, or a copy that went its own way")

    def check_fits(self, charge: Charge, *, cure: str, without: str | None = None) -> None:
        """
        Refuses a charge that the budget has no room for.

        Args:
            charge ([`Charge`]): All that a run may spend.
            cure (`str`): What to do if there is none.
            without (`str`, *optional*): Holder whose present charge it replaces.

        Raises:
            PrivacyBudgetExceeded: With what is left.
        """
        others = [run.charge for run in self.runs if run.holder != without]
        budget, total = self.budget, self.budget.spent([*others, charge])
        if total <= budget.epsilon:
            return
        left = math.floor(1000 * budget.left(others)) / 1000
        raise PrivacyBudgetExceeded(
            f"Refusing to charge {self.path}: with this run, epsilon of the dataset would be {round_up(total):g}, "
            f"above its budget of {budget.epsilon:g} at delta {budget.delta:g}. About {left:g} is left for one "
            f"run with --target_delta={budget.delta:g}: {cure}.",
            spent_epsilon=total,
            smallest_target_epsilon=round_up(total),
        )

    def reserve(self, own: PrivacyLedger, charge: Charge, *, label: str, data: str, cure: str = _LESS) -> None:
        """
        Charges a run with all that it may spend, in place of what it was charged with, before it spends any of it.

        Args:
            own ([`~ledger.PrivacyLedger`]): That of the run, open. It notes this ledger, and the line.
            charge ([`Charge`]): What its own ledger charges, and what it plans to spend beside that.
            label (`str`): Name of its folder, for people.
            data (`str`): Keyed fingerprint of the data.
            cure (`str`, *optional*): What to do if the budget has no room.

        Raises:
            PrivacyBudgetExceeded: If the budget has no room for it; nothing is charged.
            ValueError: If the data are others.
            LedgerTamperedError: If one of the two ledgers is older than the other has seen.
        """
        self.check_seen(own)
        self.check_data(data)
        holder = holder_of(own)
        self._last(own)
        self.check_fits(charge, cure=cure, without=holder)
        # A line of this session first: an older state of the run's ledger, or a copy, does not have it.
        own.note_dataset_ledger(self.ledger_id, holder, self.head)
        self._append("reserve", own, charge, label=label, data=data)
        own.note_dataset_ledger(self.ledger_id, holder, self.head)

    def settle(self, own: PrivacyLedger, charge: Charge) -> None:
        """
        Charges a run that ended in order with what it spent, in place of what it reserved.

        Args:
            own ([`~ledger.PrivacyLedger`]): That of the run, open since it reserved.
            charge ([`Charge`]): All that its own ledger charges. The run must not spend more until it reserves again.

        Raises:
            ValueError: If the run did not reserve, or it spent more than it reserved.
            LedgerTamperedError: If its own ledger is older than what was charged for it.
        """
        last = self._last(own)
        if last is None or last["type"] != "reserve":
            raise ValueError(f"Expected the run of {own.path} to have reserved in {self.path} before it settles.")
        reserved = Charge.from_dict(last["charge"])
        if not reserved.covers(charge.events) or charge.selection != reserved.selection:
            raise ValueError(f"Expected the run of {own.path} to have spent no more than it reserved in {self.path}.")
        self._append("settle", own, charge, label=last["label"])

    def _last(self, own: PrivacyLedger) -> dict[str, Any] | None:
        """The last charge of a run; the line of its own ledger that was the last one then has to be there."""
        holder = holder_of(own)
        charges = [entry for entry in self._chain.entries if entry.get("holder") == holder and "charge" in entry]
        if charges and not own.contains(*charges[-1]["own_head"]):
            raise LedgerTamperedError(
                f"Refusing to charge {self.path}: {own.path} is older than what was charged for it. Restore it, or "
                "start another run."
            )
        return charges[-1] if charges else None

    def _append(self, kind: str, own: PrivacyLedger, charge: Charge, **fields: str) -> None:
        held = {"holder": holder_of(own), "own_head": list(own.head), "charge": charge.to_dict()}
        self._chain.append({"type": kind, **held, **fields})

    def note_release(self, holder: str, *, how: str, to: str) -> None:
        """
        Writes down, durably, that something of a run is about to be shared.

        Args:
            holder (`str`): Name of the run and its folder.
            how (`str`): `"push"`, `"export"` or `"synthesize"`.
            to (`str`): Repository or folder.

        Raises:
            ValueError: If the run did not reserve here.
        """
        if holder not in {run.holder for run in self.runs}:
            raise ValueError(f"Expected run {holder} to be charged to {self.path}: it is not.")
        self._chain.append({"type": "release", "holder": holder, "how": how, "to": to})

    def _check(self, adopt: bool) -> None:
        entries = self._chain.entries
        if not entries or entries[0].get("type") != "create" or entries[0].get("schema_version") != SCHEMA_VERSION:
            raise self._chain.tampered(f"is no ledger of a dataset of schema {SCHEMA_VERSION}")
        try:
            _ = self.budget, self.charges
        except (ValueError, KeyError, TypeError):
            raise self._chain.tampered("does not add up") from None
        if not hmac.compare_digest(_keyed(self.key, _KEY_CHECK), entries[0]["key_check"]):
            raise ValueError(f"Refusing to use {self.path}: {key_path(self.path)} is the key of another ledger.")
        here, place = _place(self.path), [entry["place"] for entry in entries if "place" in entry][-1]
        if here == place:
            return
        if not adopt:
            raise LedgerTamperedError(
                f"Refusing to use {str(self.path)!r}: it was moved, copied or restored from a copy; the last place "
                f"was {place['path']!r}. If no other copy is in use and none is newer, its owner says so with "
                "`dp-curriculum budget adopt`."
            )
        self._chain.append({"type": "adopt", "place": here})


def _read_key(path: Path) -> bytes:
    try:
        key = key_path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"Refusing to use {path}: {key_path(path)} is missing. Restore it.") from None
    except PermissionError:
        raise ValueError(
            f"Refusing to use {path}: {key_path(path)} belongs to another user, who owns this ledger. Ask the owner."
        ) from None
    if len(key) != KEY_BYTES:
        raise ValueError(f"Refusing to use {path}: {key_path(path)} is no key. Restore it.")
    return key


def _keyed(key: bytes, message: bytes) -> str:
    return hmac.new(key, message, hashlib.sha256).hexdigest()


def _place(path: Path) -> dict[str, Any]:
    return {"path": str(path), "inode": path.stat().st_ino}
