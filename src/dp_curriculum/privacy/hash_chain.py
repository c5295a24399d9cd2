# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
"""An append-only file of JSON lines, each with the hash of the one before it; see [`~ledger.PrivacyLedger`]."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dp_curriculum.runtime.storage import fsync_directory, naming


_GENESIS = "0" * 64


class LedgerLockedError(RuntimeError):
    """Another process, or another handle of this one, holds the ledger."""


class LedgerTamperedError(RuntimeError):
    """The ledger is not the one that was written: edited, cut short, deleted, an older copy, or another run's."""


def lock_path(path: Path) -> Path:
    """The file whose lock is held for as long as the chain at `path` is open."""
    return path.with_name(path.name + ".lock")


class HashChain:
    """Lines of JSON on disk, each chained to the one before, with the last acknowledged one in a sidecar file."""

    def __init__(self, path: Path, *, wait: float = 0, cure: str = "Restore it, or start another run.") -> None:
        """Takes the lock, after at most `wait` seconds; `cure` ends the message of a chain that is not whole."""
        self.path = path
        self._cure = cure
        self.entries: list[dict[str, Any]] = []
        self._head_path = path.with_name(path.name + ".head")
        self._fd = -1
        self._size = 0
        self._pid = os.getpid()
        self._lock = FileLock(lock_path(path), timeout=wait, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise LedgerLockedError(
                f"Refusing to open {str(path)!r}: another process holds this privacy ledger. Let it end first."
            ) from None

    @property
    def head(self) -> tuple[int, str] | None:
        return (self.entries[-1]["seq"], self.entries[-1]["sha256"]) if self.entries else None

    def load(self, *, create: bool) -> None:
        """Reads and verifies both files, and repairs what a crash in the middle of an append may leave."""
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
        return LedgerTamperedError(f"Refusing to use {str(self.path)!r}: it {what}. {self._cure}")

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


def _digest(entry: Mapping[str, Any]) -> str:
    canonical = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
