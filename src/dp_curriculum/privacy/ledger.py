# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
"""
Record of what has been spent: an append-only ledger, written ahead of every release.

The ledger is a JSON-lines file. Each line carries the sha256 of the line before it and of itself, so an edit, a
missing line or a reordering shows. A sidecar, `<ledger>.head`, holds the number and hash of the last acknowledged
line, so a ledger cut short after a whole line, or swapped for an older copy, shows too. Neither stops somebody who
rewrites both files: for that, checkpoints hold the head and hand it back as `expected_at_least`.

When `reserve` returns, its line is on disk in both files. A line in the ledger that the sidecar does not know was
never acknowledged, so nothing was released on it: it is charged if whole, and dropped if torn.

The ledger also knows what the run holds: before a release, taught weights, a checkpoint, final weights or the report
gets its name, `record` writes its hash. So a file without a line is not of this run, and a line without a file is of
one that a crash has lost.
"""

import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from dp_curriculum.privacy.accounting import Adjacency, GaussianEvent
from dp_curriculum.privacy.composition import Charge
from dp_curriculum.privacy.execution import UNKNOWN, Execution, weakest_execution
from dp_curriculum.privacy.hash_chain import HashChain, LedgerLockedError, LedgerTamperedError
from dp_curriculum.privacy.limits import check_mechanism
from dp_curriculum.privacy.privacy_report import PrivacyReport, ReportFacts


__all__ = ["LedgerLockedError", "LedgerTamperedError", "PrivacyLedger", "PrivacyReport", "ReportFacts", "ledger_held"]


SCHEMA_VERSION = "1.1"
_WITHOUT_HASHES = "1.0"  # neither hashes of what the run holds, nor how its steps were executed


@contextmanager
def ledger_held(path: Path) -> Iterator[None]:
    """
    Holds the lock of a ledger without reading it, whatever it holds, e.g. while its run is removed.

    Raises:
        LedgerLockedError: If the ledger is open elsewhere.
    """
    chain = HashChain(path)
    try:
        yield
    finally:
        chain.close()


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
    >>> from dp_curriculum.privacy.accounting import GaussianEvent
    >>> from dp_curriculum.privacy.ledger import PrivacyLedger

    >>> path = tempfile.mkdtemp() + "/privacy_ledger.jsonl"
    >>> with PrivacyLedger.open(path) as ledger:
    ...     line = ledger.reserve(GaussianEvent(5.0, 0.1, num_steps=5), stage="central-images", clip_norm=1.0)
    ...     print(f"{ledger.epsilon(1e-5):.2f}")
    0.16
    ```
    """

    def __init__(self, chain: HashChain) -> None:
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
        chain = HashChain(path)
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

    def reserve(
        self, event: GaussianEvent, *, stage: str, clip_norm: float, execution: Execution | None = None
    ) -> int:
        r"""
        Charges `event`, durably, before the release that it pays for: call this first, then release.

        Args:
            event ([`~accounting.GaussianEvent`]): The mechanism, and the number of steps about to be taken.
            stage (`str`): Name of the stage, e.g. `"dp-sgd"`; reservations of a stage with equal parameters add up.
            clip_norm (`float`): L2 bound on what one unit adds to a released sum.
            execution ([`~execution.Execution`], *optional*): How the steps will be computed; unknown if unset.

        Returns:
            `int`: Number of the ledger line.

        Raises:
            ValueError: If a constant is out of the range (`privacy/limits.py`) in which its bound was tested.
            OSError: If the disk refuses the line. Then nothing may be released, and the ledger, which is as it was
                before, must be opened again.
            LedgerTamperedError: If the file was changed or replaced while open.
        """
        check_mechanism(
            clip_norm=clip_norm,
            noise_multiplier=event.noise_multiplier,
            sample_rate=event.sample_rate,
            num_steps=event.num_steps,
        )
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
                "execution": None if execution is None else execution.to_dict(),
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

    def record(self, name: str, digest: str) -> None:
        r"""
        Writes down, durably, what a file or folder of the run is, before it gets its name. A second time does nothing.

        Args:
            name (`str`): Its path in the folder of the run.
            digest (`str`): Its sha256. A name that is written several times has several.
        """
        if digest not in self.digests(name):
            self._chain.append({"type": "hash", "name": name, "digest": digest})

    def digests(self, name: str) -> tuple[str, ...]:
        """Hashes recorded under a name, in order; each is of this run, and paid for."""
        entries = (entry for entry in self._chain.entries if entry["type"] == "hash" and entry["name"] == name)
        return tuple(entry["digest"] for entry in entries)

    def note_dataset_ledger(self, ledger_id: str, holder: str, head: tuple[int, str]) -> None:
        """
        Writes down, durably, that this run is charged to the ledger of its dataset, and a line that is in it.

        Args:
            ledger_id (`str`): Of the ledger of the dataset.
            holder (`str`): Name of this run in it.
            head (`tuple[int, str]`): Number and sha256 of its last line.
        """
        self._chain.append(
            {
                "type": "dataset-ledger",
                "session": self._session,
                "ledger_id": ledger_id,
                "holder": holder,
                "line": head[0],
                "line_sha256": head[1],
            }
        )

    @property
    def dataset_notes(self) -> list[dict[str, Any]]:
        """Lines of [`~PrivacyLedger.note_dataset_ledger`], in order; empty for a run that no such ledger holds."""
        return [entry for entry in self._chain.entries if entry["type"] == "dataset-ledger"]

    def note_tuning(self, charge: Charge) -> None:
        """
        Writes down, durably and for good, that this run is one of several tries, and what they spend in all.

        Raises:
            ValueError: If what this run charges is not what a try spends, or it was written down already.
        """
        if self.tuning is not None or not charge.holds(self.events):
            raise ValueError(f"Expected the charges of {str(self.path)!r} to be those of one try.")
        self._chain.append({"type": "tuning", "charge": charge.to_dict()})

    def mark_not_private(self, reason: str) -> None:
        """Records, for good, that what this run releases carries no guarantee, and why (e.g. fixed test noise)."""
        self._chain.append({"type": "not-private", "reason": str(reason)})

    def close(self) -> None:
        """Closes the file and releases its lock."""
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
    def run_id(self) -> str:
        """Name of the run, drawn when its ledger was made. A copy of the folder has the same."""
        return str(self._chain.entries[0]["run_id"])

    def contains(self, seq: int, sha256: str) -> bool:
        """True if it has that line."""
        entries = self._chain.entries
        return 0 <= seq < len(entries) and bool(entries[seq]["sha256"] == sha256)

    @property
    def head(self) -> tuple[int, str]:
        """Number and sha256 of the last line, for checkpoints to hold."""
        last = self._chain.entries[-1]
        return last["seq"], last["sha256"]

    @property
    def has_hashes(self) -> bool:
        """True if it records what the run holds, and how its steps were executed: earlier versions did not."""
        return self._chain.entries[0]["schema_version"] != _WITHOUT_HASHES

    @property
    def execution(self) -> Execution:
        """The weakest way in which steps that are charged were executed."""
        left = self._steps_left()
        kept = [entry for entry in self._chain.entries if left.get(entry["seq"])]
        found = [entry.get("execution") for entry in kept]
        return weakest_execution(UNKNOWN if one is None else Execution.from_dict(one) for one in found)

    @property
    def mechanisms(self) -> list[dict[str, Any]]:
        """One entry per stage, in order; reservations of a stage with equal parameters are merged."""
        keys = ("mechanism", "sampling", "sample_rate", "noise_multiplier", "clip_norm")
        merged: dict[tuple[Any, ...], dict[str, Any]] = {}
        for seq, num_steps in self._steps_left().items():
            entry = self._chain.entries[seq]
            row = {"name": entry["stage"], **{key: entry[key] for key in keys}}
            merged.setdefault(tuple(row.values()), {**row, "num_steps": 0})["num_steps"] += num_steps
        return [row for row in merged.values() if row["num_steps"]]

    @property
    def events(self) -> tuple[GaussianEvent, ...]:
        """Events of `mechanisms`, in the same order."""
        return tuple(
            GaussianEvent(row["noise_multiplier"], row["sample_rate"], row["num_steps"]) for row in self.mechanisms
        )

    @property
    def tuning(self) -> Charge | None:
        """Everything that all tries spend, of a run that was chosen among them; its own mechanisms are in it."""
        found = [entry["charge"] for entry in self._chain.entries if entry["type"] == "tuning"]
        return Charge.from_dict(found[-1]) if found else None

    @property
    def not_private_reasons(self) -> tuple[str, ...]:
        """Reasons why there is no guarantee; empty for a private run."""
        marked = [entry["reason"] for entry in self._chain.entries if entry["type"] == "not-private"]
        bare = [row["name"] for row in self.mechanisms if row["noise_multiplier"] == 0]
        return tuple(dict.fromkeys([*marked, *(f"stage {name!r} adds no noise" for name in bare)]))

    def epsilon(self, delta: float, *, adjacency: Adjacency = "add-or-remove-one", group_size: int = 1) -> float:
        """Epsilon at `delta` of everything charged, tries before included; infinite if it is marked not private."""
        if self.not_private_reasons:
            return math.inf
        return (self.tuning or Charge(self.events)).epsilon(delta, adjacency=adjacency, group_size=group_size)

    def _steps_left(self) -> Mapping[int, int]:
        """Steps of each reservation that were not given back, by its line."""
        left: dict[int, int] = {}
        for entry in self._chain.entries:
            if entry["type"] == "reserve":
                left[entry["seq"]] = entry["num_steps"]
            elif entry["type"] == "give-back":
                left[entry["reservation"]] -= entry["num_steps"]
        return left

    def _check(self, expected_at_least: tuple[int, str] | None) -> None:
        entries = self._chain.entries
        if entries[0].get("schema_version") not in (SCHEMA_VERSION, _WITHOUT_HASHES):
            raise self._chain.tampered(f"does not follow schema {SCHEMA_VERSION}")
        try:
            _ = self.events, self.execution, self.tuning
        except (ValueError, KeyError, TypeError):
            raise self._chain.tampered("does not add up") from None
        if expected_at_least is not None and not self.contains(*expected_at_least):
            raise self._chain.tampered("lacks a line that a checkpoint has seen")
