# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
"""
What has been spent: an append-only ledger, written ahead of every release.

The ledger is a JSON-lines file. Each line carries the sha256 of the line before it and of itself, so an edit, a
missing line or a reordering shows. A sidecar, `<ledger>.head`, holds the number and hash of the last acknowledged
line, so a ledger cut short after a whole line, or swapped for an older copy, shows too. Neither stops somebody who
rewrites both files: for that, checkpoints hold the head and hand it back as `expected_at_least`.

When `reserve` returns, its line is on disk in both files. A line in the ledger that the sidecar does not know was
never acknowledged, so nothing was released on it: it is charged if whole, and dropped if torn.
"""

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from dp_curriculum import accounting
from dp_curriculum.accounting import Adjacency, GaussianEvent
from dp_curriculum.privacy_report import PrivacyReport, ReportFacts
from dp_curriculum.storage import fsync_directory, naming


__all__ = ["LedgerLockedError", "LedgerTamperedError", "PrivacyLedger", "PrivacyReport", "ReportFacts"]


SCHEMA_VERSION = "1.0"
_GENESIS = "0" * 64


class LedgerLockedError(RuntimeError):
    """Another process, or another handle of this one, holds the ledger."""


class LedgerTamperedError(RuntimeError):
    """The ledger is not the one that was written: edited, cut short, deleted, an older copy, or another run's."""


class _HashChain:
    """Lines of JSON on disk, each chained to the one before, with the last acknowledged one in a sidecar file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._head_path = path.with_name(path.name + ".head")
        self._fd = -1
        self._size = 0
        self._pid = os.getpid()
        self._lock = FileLock(path.with_name(path.name + ".lock"), timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise LedgerLockedError(
                f"Expected {str(path)!r} to be open once: another process holds this privacy ledger; let it end first."
            ) from None

    @property
    def head(self) -> tuple[int, str] | None:
        return (self.entries[-1]["seq"], self.entries[-1]["sha256"]) if self.entries else None

    def load(self, *, create: bool) -> None:
        """Reads and verifies both files, and mends what a crash in the middle of an append may leave."""
        head, is_new = self._read_head(), not self.path.exists()
        if is_new and (head is not None or not create):
            raise self.tampered("is missing")
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if is_new:
            fsync_directory(self.path.parent)
        whole, newline, torn = self.path.read_bytes().rpartition(b"\n")
        self._verify((whole + newline).split(b"\n")[:-1])
        self._size = len(whole + newline)
        if head is not None and (len(self.entries) <= head[0] or self.entries[head[0]]["sha256"] != head[1]):
            raise self.tampered("was cut short or replaced by an older copy")
        if head is None and len(self.entries) > 1:
            raise self.tampered(f"has lost {self._head_path.name!r}")
        if torn:  # never acknowledged: the sidecar knows whole lines only
            with naming(self.path):
                os.ftruncate(self._fd, self._size)
                os.fsync(self._fd)
        if self.entries and head != self.head:
            self._write_head()

    def append(self, body: dict[str, Any]) -> int:
        """Adds one line. When this returns the line is on disk; when it raises, it is not charged."""
        self._check_open()
        seq, previous = (self.entries[-1]["seq"] + 1, self.entries[-1]["sha256"]) if self.entries else (0, _GENESIS)
        entry = {"seq": seq, "previous": previous, **body}
        entry["sha256"] = _digest(entry)
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()
        self.entries.append(entry)
        try:
            with naming(self.path):
                _write_all(self._fd, line)
                os.fsync(self._fd)
            self._write_head()
        except BaseException:
            self._undo_append(entry)
            raise
        self._size += len(line)
        return seq

    def close(self) -> None:
        if os.getpid() != self._pid:  # a forked process shares the lock: letting go of it there would free it here
            return
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._lock.release()

    def tampered(self, what: str) -> LedgerTamperedError:
        return LedgerTamperedError(
            f"Expected {str(self.path)!r} as it was written, but it {what}: restore it, or start another run."
        )

    def _check_open(self) -> None:
        if self._fd < 0 or os.getpid() != self._pid:
            raise RuntimeError(f"Expected {str(self.path)!r} to be open in this process: open the ledger again.")
        mine = os.fstat(self._fd)
        there = os.stat(self.path) if self.path.exists() else None
        if mine.st_size != self._size or there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise self.tampered("was changed or replaced while open")

    def _undo_append(self, entry: dict[str, Any]) -> None:
        """Takes a line back, unless the sidecar names it already; either way the file must be opened again."""
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError, LedgerTamperedError):
            if self._read_head() == self.head:
                os.close(fd)
                return
        self.entries = [kept for kept in self.entries if kept is not entry]
        with contextlib.suppress(OSError):  # what cannot be cut now is torn, or charged, at the next opening
            os.ftruncate(fd, self._size)
            os.fsync(fd)
        os.close(fd)

    def _verify(self, lines: list[bytes]) -> None:
        previous = _GENESIS
        for seq, line in enumerate(lines):
            try:
                entry = json.loads(line)
                sha256 = entry.pop("sha256")
                intact = (sha256, seq, previous) == (_digest(entry), entry["seq"], entry["previous"])
            except (ValueError, KeyError, TypeError, AttributeError):
                intact = False
            if not intact:
                raise self.tampered(f"was edited at line {seq + 1}")
            previous = entry["sha256"] = sha256
            self.entries.append(entry)

    def _read_head(self) -> tuple[int, str] | None:
        try:
            head = json.loads(self._head_path.read_bytes())
            return int(head["seq"]), str(head["sha256"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise self.tampered(f"has an unreadable {self._head_path.name!r}") from None

    def _write_head(self) -> None:
        seq, sha256 = self.entries[-1]["seq"], self.entries[-1]["sha256"]
        temporary = self._head_path.with_name(self._head_path.name + ".tmp")
        with naming(self._head_path):
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                _write_all(fd, json.dumps({"seq": seq, "sha256": sha256}).encode())
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, self._head_path)
            fsync_directory(self.path.parent)


class PrivacyLedger:
    r"""
    The privacy spent by one run, on disk before it is spent. Open it with [`PrivacyLedger.open`].

    The file stays locked until [`~PrivacyLedger.close`], or the end of the `with` block.

    Privacy:
        The spent epsilon is a function of this file alone. A crash leaves the last reservation charged in full; only a
        clean stop, in the process that made the reservation, can return its unexecuted tail.

    Example:
    ```py
    >>> import tempfile
    >>> from dp_curriculum.accounting import GaussianEvent
    >>> from dp_curriculum.ledger import PrivacyLedger

    >>> path = tempfile.mkdtemp() + "/privacy_ledger.jsonl"
    >>> with PrivacyLedger.open(path) as ledger:
    ...     line = ledger.reserve(GaussianEvent(5.0, 0.1, num_steps=5), stage="central-images", clip_norm=1.0)
    ...     print(f"{ledger.epsilon(1e-5):.2f}")
    0.16
    ```
    """

    def __init__(self, chain: _HashChain) -> None:
        self._chain = chain
        self._session = uuid.uuid4().hex

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, expected_at_least: tuple[int, str] | None = None, create: bool = True
    ) -> "PrivacyLedger":
        r"""
        Creates the ledger at `path`, or re-opens and verifies the one that is there.

        Args:
            path (`str` or `os.PathLike`): The ledger file, e.g. `privacy_ledger.jsonl`, outside the checkpoints.
            expected_at_least (`tuple[int, str]`, *optional*): A head `(seq, sha256)` seen earlier, e.g. in a
                checkpoint. The ledger must contain that line.
            create (`bool`, *optional*, defaults to `True`): Whether a missing ledger is created.

        Raises:
            LedgerLockedError: If the ledger is open elsewhere.
            LedgerTamperedError: If it was edited, cut short, deleted, replaced by an older copy, or is another run's.
        """
        path = Path(path)
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        chain = _HashChain(path)
        try:
            chain.load(create=create and expected_at_least is None)
            if not chain.entries:
                if expected_at_least is not None:
                    raise chain.tampered("is empty")
                chain.append({"type": "header", "schema_version": SCHEMA_VERSION, "run_id": uuid.uuid4().hex})
            ledger = cls(chain)
            ledger._check(expected_at_least)
        except BaseException:
            chain.close()
            raise
        return ledger

    def reserve(self, event: GaussianEvent, *, stage: str, clip_norm: float) -> int:
        r"""
        Charges `event`, durably, before the release that it pays for: call this first, then release.

        Args:
            event ([`~accounting.GaussianEvent`]): The mechanism, and the number of steps about to be taken.
            stage (`str`): Name of the stage, e.g. `"dp-sgd"`; reservations of a stage with equal parameters add up.
            clip_norm (`float`): L2 bound on what one image adds to a released sum.

        Returns:
            `int`: Number of the ledger line.

        Raises:
            OSError: If the disk refuses the line. Then nothing may be released, and the ledger, which is as it was
                before, must be opened again.
            LedgerTamperedError: If the file was changed or replaced while open.
        """
        if not (math.isfinite(clip_norm) and clip_norm > 0):
            raise ValueError(f"Expected clip_norm={clip_norm} to be finite and above 0: it bounds one image's share.")
        full = event.sample_rate == 1
        return self._chain.append(
            {
                "type": "reserve",
                "session": self._session,
                "stage": str(stage),
                "mechanism": "gaussian" if full else "subsampled-gaussian",
                "sampling": "none" if full else "poisson",
                "sample_rate": event.sample_rate,
                "noise_multiplier": event.noise_multiplier,
                "clip_norm": float(clip_norm),
                "num_steps": event.num_steps,
            }
        )

    def give_back(self, *, stage: str, num_steps: int) -> None:
        r"""
        Returns the unexecuted tail of the last reservation, after a clean stop.

        Args:
            stage (`str`): Stage of the last reservation, as a check.
            num_steps (`int`): Steps that were reserved and not executed; 0 does nothing.

        Raises:
            ValueError: If the last reservation is another stage's, was made before the ledger was opened (a crash is
                charged), or has fewer steps left.
        """
        if num_steps == 0:
            return
        last = next((entry for entry in reversed(self._chain.entries) if entry["type"] == "reserve"), None)
        if last is None or last["session"] != self._session or last["stage"] != stage:
            raise ValueError(f"Expected stage={stage!r} to be the last one reserved since the ledger was opened.")
        later = self._chain.entries[last["seq"] + 1 :]
        left = last["num_steps"] - sum(entry["num_steps"] for entry in later if entry["type"] == "give-back")
        if not 1 <= num_steps <= left:
            raise ValueError(f"Expected num_steps={num_steps} in [0, {left}], what is left of the last reservation.")
        self._chain.append({"type": "give-back", "reservation": last["seq"], "num_steps": int(num_steps)})

    def mark_not_private(self, reason: str) -> None:
        """Records, for good, that what this run releases carries no guarantee, and why (e.g. fixed test noise)."""
        self._chain.append({"type": "not-private", "reason": str(reason)})

    def close(self) -> None:
        """Closes the file and lets go of its lock."""
        self._chain.close()

    def __enter__(self) -> "PrivacyLedger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        return self._chain.path

    @property
    def head(self) -> tuple[int, str]:
        """Number and sha256 of the last line, for checkpoints to hold."""
        last = self._chain.entries[-1]
        return last["seq"], last["sha256"]

    @property
    def mechanisms(self) -> list[dict[str, Any]]:
        """One entry a stage, in order; reservations of a stage with equal parameters are merged."""
        keys = ("mechanism", "sampling", "sample_rate", "noise_multiplier", "clip_norm")
        merged: dict[tuple[Any, ...], dict[str, Any]] = {}
        of_line: dict[int, dict[str, Any]] = {}
        for entry in self._chain.entries:
            if entry["type"] == "reserve":
                row = {"name": entry["stage"], **{key: entry[key] for key in keys}}
                row = of_line[entry["seq"]] = merged.setdefault(tuple(row.values()), {**row, "num_steps": 0})
                row["num_steps"] += entry["num_steps"]
            elif entry["type"] == "give-back":
                of_line[entry["reservation"]]["num_steps"] -= entry["num_steps"]
        return [dict(row) for row in merged.values() if row["num_steps"]]

    @property
    def events(self) -> tuple[GaussianEvent, ...]:
        """What `mechanisms` cost, in the same order."""
        return tuple(
            GaussianEvent(row["noise_multiplier"], row["sample_rate"], row["num_steps"]) for row in self.mechanisms
        )

    @property
    def not_private_reasons(self) -> tuple[str, ...]:
        """Why there is no guarantee; empty for a private run."""
        marked = [entry["reason"] for entry in self._chain.entries if entry["type"] == "not-private"]
        bare = [row["name"] for row in self.mechanisms if row["noise_multiplier"] == 0]
        return tuple(dict.fromkeys([*marked, *(f"stage {name!r} adds no noise" for name in bare)]))

    def epsilon(self, delta: float, *, adjacency: Adjacency = "add-or-remove-one", group_size: int = 1) -> float:
        """Epsilon at `delta` of everything charged; infinite if the run is marked not private."""
        if self.not_private_reasons:
            return math.inf
        return accounting.compute_epsilon(self.events, delta, adjacency=adjacency, group_size=group_size)

    def _check(self, expected_at_least: tuple[int, str] | None) -> None:
        entries = self._chain.entries
        if entries[0].get("schema_version") != SCHEMA_VERSION:
            raise self._chain.tampered(f"does not follow schema {SCHEMA_VERSION}")
        try:
            _ = self.events
        except (ValueError, KeyError, TypeError):
            raise self._chain.tampered("does not add up") from None
        if expected_at_least is not None:
            seq, sha256 = expected_at_least
            if not 0 <= seq < len(entries) or entries[seq]["sha256"] != sha256:
                raise self._chain.tampered("lacks a line that a checkpoint has seen")


def _digest(entry: Mapping[str, Any]) -> str:
    canonical = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
