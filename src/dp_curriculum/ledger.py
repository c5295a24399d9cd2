# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
"""
What has been spent: an append-only ledger written ahead of every release, and the report computed from it alone.

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
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from dp_curriculum import accounting
from dp_curriculum.accounting import GaussianEvent


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
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if is_new:
            _fsync_directory(self.path.parent)
        whole, newline, torn = self.path.read_bytes().rpartition(b"\n")
        self._verify((whole + newline).split(b"\n")[:-1])
        self._size = len(whole + newline)
        if head is not None and (len(self.entries) <= head[0] or self.entries[head[0]]["sha256"] != head[1]):
            raise self.tampered("was cut short or replaced by an older copy")
        if head is None and len(self.entries) > 1:
            raise self.tampered(f"has lost {self._head_path.name!r}")
        if torn:  # never acknowledged: the sidecar knows whole lines only
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
            _write_all(self._fd, line)
            os.fsync(self._fd)
            self._write_head()
        except BaseException:
            self._undo_append(entry)
            raise
        self._size += len(line)
        return seq

    def close(self) -> None:
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
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _write_all(fd, json.dumps({"seq": seq, "sha256": sha256}).encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, self._head_path)
        _fsync_directory(self.path.parent)


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
    ...     line = ledger.reserve(GaussianEvent(5.0, sample_rate=0.1, num_steps=5), stage="central-images", clip_norm=1.0)
    ...     print(f"{ledger.epsilon(1e-5):.2f}")
    0.17
    ```
    """

    def __init__(self, chain: _HashChain) -> None:
        self._chain = chain
        self._session = uuid.uuid4().hex

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        run_id: str | None = None,
        facts: Mapping[str, Any] | None = None,
        expected_at_least: tuple[int, str] | None = None,
        create: bool = True,
    ) -> "PrivacyLedger":
        r"""
        Creates the ledger at `path`, or re-opens and verifies the one that is there.

        Args:
            path (`str` or `os.PathLike`): The ledger file, e.g. `privacy_ledger.jsonl`, outside the checkpoints.
            run_id (`str`, *optional*): Name of the run. A new ledger gets a random one without it; an existing ledger
                must bear it.
            facts (`Mapping`, *optional*): Public facts, of JSON types, for the header of a new ledger. Not compared
                with those of an existing one: read these from `.facts`.
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
                header = {"type": "header", "schema_version": SCHEMA_VERSION, "run_id": run_id or uuid.uuid4().hex}
                chain.append({**header, "facts": dict(facts or {})})
            ledger = cls(chain)
            ledger._check(run_id, expected_at_least)
        except BaseException:
            chain.close()
            raise
        return ledger

    def reserve(
        self,
        event: GaussianEvent,
        *,
        stage: str,
        clip_norm: float,
        mechanism: str | None = None,
        sampling: str | None = None,
    ) -> int:
        r"""
        Charges `event`, durably, before the release that it pays for: call this first, then release.

        Args:
            event ([`~accounting.GaussianEvent`]): The mechanism, and the number of steps about to be taken.
            stage (`str`): Name of the stage, e.g. `"dp-sgd"`; reservations of a stage with equal parameters add up.
            clip_norm (`float`): L2 bound on what one image adds to a released sum.
            mechanism (`str`, *optional*): Defaults to `"subsampled-gaussian"`, or `"gaussian"` at sample rate 1.
            sampling (`str`, *optional*): Defaults to `"poisson"`, or `"none"` at sample rate 1.

        Returns:
            `int`: Number of the ledger line.

        Raises:
            OSError: If the disk refuses the line. Then nothing may be released, and the ledger must be opened again; it
                is as it was before.
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
                "mechanism": mechanism or ("gaussian" if full else "subsampled-gaussian"),
                "sampling": sampling or ("none" if full else "poisson"),
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
    def run_id(self) -> str:
        return self._chain.entries[0]["run_id"]

    @property
    def facts(self) -> dict[str, Any]:
        """Public facts handed in when the ledger was created."""
        return json.loads(json.dumps(self._chain.entries[0]["facts"]))

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

    def epsilon(
        self, delta: float, *, adjacency: accounting.Adjacency = "add-or-remove-one", group_size: int = 1
    ) -> float:
        """Epsilon at `delta` of everything charged; infinite if the run is marked not private."""
        if self.not_private_reasons:
            return math.inf
        return accounting.compute_epsilon(self.events, delta, adjacency=adjacency, group_size=group_size)

    def _check(self, run_id: str | None, expected_at_least: tuple[int, str] | None) -> None:
        entries = self._chain.entries
        if entries[0].get("schema_version") != SCHEMA_VERSION:
            raise self._chain.tampered(f"does not follow schema {SCHEMA_VERSION}")
        try:
            _ = self.events
        except (ValueError, KeyError, TypeError):
            raise self._chain.tampered("does not add up") from None
        if run_id is not None and self.run_id != run_id:
            raise self._chain.tampered(f"belongs to run {self.run_id!r} instead of {run_id!r}")
        if expected_at_least is not None:
            seq, sha256 = expected_at_least
            if not 0 <= seq < len(entries) or entries[seq]["sha256"] != sha256:
                raise self._chain.tampered("lacks a line that a checkpoint has seen")


@dataclass(frozen=True, kw_only=True)
class ReportFacts:
    r"""
    What a privacy report says beside its numbers. All of it is published, and of JSON types.

    Args:
        max_images_per_person (`int`, *optional*): Known bound on them; reported as `"unknown"` if unset.
        release (`str`, *optional*, defaults to `"all-iterates"`): What the guarantee covers of a run.
        dataset_id (`str`, *optional*): Public id of the protected dataset; leave a private name out.
        num_records (`int`, *optional*): Number of rows. Only if it is public, or disclosed: then name `"num_records"`
            in `unprotected_quantities`.
        num_records_is_public (`bool`, *optional*, defaults to `False`): Whether `num_records` was declared public.
        unprotected_quantities (`tuple[str, ...]`): Facts on the data that are published exactly.
        not_covered (`tuple[str, ...]`): Releases and choices that the guarantee leaves out.
        tuning_covered (`bool`, *optional*, defaults to `False`): Whether the ledger holds the tuning as well.
        tuning_note (`str`): How the hyper-parameters were chosen.
        public_data (`tuple[Mapping, ...]`): Public datasets used, e.g. `{"name": "org/data", "role": "pretraining"}`.
        randomness (`Mapping`): `SecretGenerator.describe()`.
        implementation (`Mapping`): More on the code, e.g. `{"commit": "..."}`; package and version are filled in.

    Raises:
        ValueError: If `num_records` is neither public nor disclosed.
    """

    max_images_per_person: int | None = None
    release: str = "all-iterates"
    dataset_id: str | None = None
    num_records: int | None = None
    num_records_is_public: bool = False
    unprotected_quantities: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()
    tuning_covered: bool = False
    tuning_note: str = "the choice of hyper-parameters is not accounted for"
    public_data: tuple[Mapping[str, Any], ...] = ()
    randomness: Mapping[str, Any] = field(default_factory=dict)
    implementation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        disclosed = self.num_records_is_public or "num_records" in self.unprotected_quantities
        if self.num_records is not None and not disclosed:
            raise ValueError(
                'Expected num_records to be public, or listed as "num_records" in unprotected_quantities: leave it out.'
            )

    def to_dict(self) -> dict[str, Any]:
        records = {} if self.num_records is None else {"num_records": self.num_records}
        return {
            "deployment_model": "central",
            "privacy_unit": {
                "unit": "image",
                "description": "one training image with its label",
                "max_records_per_person": self.max_images_per_person or "unknown",
            },
            "release": self.release,
            "protected_dataset": {"name": self.dataset_id, "role": "training", **records},
            "unprotected_quantities": list(self.unprotected_quantities),
            "not_covered": list(self.not_covered),
            "hyperparameter_tuning": {"covered": self.tuning_covered, "note": self.tuning_note},
            "public_data": [dict(data) for data in self.public_data],
            "randomness": dict(self.randomness),
            "implementation": {
                "package": "dp_curriculum",
                "version": _version("dp_curriculum"),
                **self.implementation,
            },
        }


@dataclass(frozen=True)
class PrivacyReport:
    r"""
    The guarantee of a run: what `privacy.json` and the `differential_privacy` block of its card hold.

    Build it with [`PrivacyReport.from_ledger`]; its numbers have no other source.

    Args:
        epsilon (`float`): Of everything charged, unrounded; infinite if the run is not private.
        delta (`float`): The delta that it holds at.
        fields (`Mapping`): All of the report, as [`~PrivacyReport.to_dict`] returns it.
    """

    epsilon: float
    delta: float
    fields: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_ledger(
        cls,
        ledger: PrivacyLedger,
        *,
        target_delta: float,
        target_epsilon: float | None = None,
        adjacency: accounting.Adjacency = "add-or-remove-one",
        group_size: int = 1,
        facts: ReportFacts | None = None,
    ) -> "PrivacyReport":
        r"""
        Computes the report from the ledger.

        Args:
            ledger ([`PrivacyLedger`]): What was charged; closed or open.
            target_delta (`float`): Delta of the report.
            target_epsilon (`float`, *optional*): The epsilon that was asked for, to stand beside the one spent.
            adjacency (`str`, *optional*, defaults to `"add-or-remove-one"`): Neighbouring relation of `epsilon`.
            group_size (`int`, *optional*, defaults to 1): Images of one person that change together.
            facts ([`ReportFacts`], *optional*): What the report says beside the numbers.
        """
        epsilon = ledger.epsilon(target_delta, adjacency=adjacency, group_size=group_size)
        replaced = ledger.epsilon(target_delta, adjacency="replace-one", group_size=group_size)
        private = not ledger.not_private_reasons
        mu = accounting.compute_gdp_mu(ledger.events, adjacency=adjacency, group_size=group_size) if private else None
        fields = {
            "schema_version": SCHEMA_VERSION,
            "private": private,
            "statement": _statement(ledger, epsilon, target_delta, adjacency, group_size),
            "flavor": "approximate-dp",
            "epsilon": epsilon if private else None,
            "delta": float(target_delta),
            "adjacency": adjacency,
            "group_size": int(group_size),
            "epsilon_replace_one": replaced if private else None,
            "gdp_mu": mu,
            "target_epsilon": None if target_epsilon is None else float(target_epsilon),
            "not_private_reasons": list(ledger.not_private_reasons),
            "mechanisms": ledger.mechanisms,
            "accounting": _accounting(ledger.events, adjacency, group_size),
            **(facts or ReportFacts()).to_dict(),
        }
        return cls(epsilon, float(target_delta), json.loads(json.dumps(fields, allow_nan=False)))

    def statement(self) -> str:
        """The guarantee in a formal sentence, then in plain words; or that there is none, and why."""
        return self.fields["statement"]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON and YAML; a copy."""
        return json.loads(json.dumps(dict(self.fields)))


def _accounting(events: tuple[GaussianEvent, ...], adjacency: accounting.Adjacency, group_size: int) -> dict[str, Any]:
    return {
        "accountant": "pld",
        "library": "dp-accounting",
        "version": _version("dp-accounting"),
        "discretization": accounting.choose_discretization(events, adjacency=adjacency, group_size=group_size),
        "assumptions": ["poisson-sampling", "secret-randomness", "idealised-arithmetic"],
    }


def _statement(
    ledger: PrivacyLedger, epsilon: float, delta: float, adjacency: accounting.Adjacency, group_size: int
) -> str:
    if ledger.not_private_reasons:
        reasons = "; ".join(ledger.not_private_reasons)
        return f"NOT PRIVATE: {reasons}. What was released carries no privacy guarantee."
    unit = "one image with its label" if group_size == 1 else f"{group_size} images of one person with their labels"
    change = "replacing" if adjacency == "replace-one" else "adding or removing"
    # An even guess between two datasets is right with probability (1 + total variation distance) / 2.
    distance = accounting.compute_delta(ledger.events, 0.0, adjacency=adjacency, group_size=group_size)
    percent = math.ceil(500 * (1 + distance)) / 10
    was = "which of two versions was used" if adjacency == "replace-one" else "whether it was used"
    subject = "one image" if group_size == 1 else f"the set of {group_size} images of one person"
    return (
        f"The training is ({accounting.round_up(epsilon):g}, {delta:g})-differentially private with respect to "
        f"{change} {unit} ({adjacency} adjacency); all that it releases is covered, unless listed as not covered. "
        f"In plain words: somebody who sees all of that and knows every other training image guesses, for {subject}, "
        f"{was}, a coin toss having decided it: they are right at most {percent:g} % of the time, against 50 % for "
        "guessing blindly."
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _digest(entry: Mapping[str, Any]) -> str:
    canonical = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _fsync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
