"""Interrupts a short private run at random moments and at each of its writes, goes on with it, and checks the rest.

    python benchmarks/crash_sweep.py --output benchmarks/results/crash_sweep.json

Each attempt is a process of its own, forked from one that has imported everything. After each attempt, whatever ended
it: a valid checkpoint is there once there was one; the ledger covers every step that was taken and every lesson that
was released, and has the hash of whatever has a name; epsilon is at most the target; nothing half written is left of
the attempt before; a full disk was told with its path. Each run is then resumed until it is finished, its report is
verified, and nothing speaks against sharing it. Of runs on two connected processes one is killed; the other has to end
within a minute, as a lost process is told.
"""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import safetensors.torch
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.lessons.planned import plan_lessons
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy import accounting
from dp_curriculum.privacy.ledger import LedgerTamperedError, PrivacyLedger, PrivacyReport
from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.privacy.verification import verify_report
from dp_curriculum.runs.run_contents import check_contents
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime import checkpointing
from dp_curriculum.runtime.checkpointing import LITTER, latest_checkpoint
from dp_curriculum.runtime.processes import ProcessLostError
from dp_curriculum.sharing.export import not_private_reasons
from dp_curriculum.training import curriculum, teaching
from dp_curriculum.training.curriculum import run_curriculum


KILL, NO_SPACE = "kill", "no space"
FINISHED, STOPPED, STORAGE_ERROR, UNEXPECTED = 0, 130, 5, 70
TIMEOUT, SURVIVOR_TIMEOUT = 600, 60
_COARSE = 5e-3  # spacing of privacy losses: any is valid, and this one is fast; at the cost of some noise

CONFIG = CurriculumConfig().replace(
    stages=["mean", "dp_sgd"], lesson_noise_multiplier=20.0,
    resolution=8, num_channels=1, public_dataset_size=64, block_out_channels=[8], pretrain_steps=6,
    pretrain_batch_size=8, expected_batch_size=16, num_dp_steps=8, num_inference_steps=2,
    checkpointing_steps=2, checkpoints_total_limit=1, sample_steps=4, seed=0,
)  # fmt: skip


class InvariantBroken(AssertionError):
    """A run lost what it must keep."""


def _no_space() -> None:
    raise OSError(28, "No space left on device")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Fault:
    """
    Counts the calls that write into a folder, and strikes at the one at `position`, half of which is done by then.

    A kill strikes once. A full disk stays full: each later call fails as well.
    """

    def __init__(self, folder: Path, position: int, kind: str) -> None:
        self.folder, self.position, self.kind = str(folder), position, kind
        self.names: list[str] = []
        self._write = os.write

    def install(self) -> None:
        os.write = self._wrap(os.write, "write", self._half_write)  # type: ignore[assignment]
        os.fsync = self._wrap(os.fsync, "fsync")  # type: ignore[assignment]
        os.replace = self._wrap(os.replace, "rename")  # type: ignore[assignment]
        Path.write_text = self._wrap(Path.write_text, "write", self._half_text)  # type: ignore[method-assign]
        Image.Image.save = self._wrap(Image.Image.save, "write")  # type: ignore[method-assign]
        shutil.copyfile = self._wrap(shutil.copyfile, "write")  # type: ignore[assignment]
        save_file = self._wrap(safetensors.torch.save_file, "write", self._half_tensors)
        for module in (safetensors.torch, checkpointing, teaching):
            module.save_file = save_file  # type: ignore[attr-defined]
        builtins.open = self._open(builtins.open)  # type: ignore[assignment]

    def _strikes(self, name: str) -> bool:
        self.names.append(name)
        number = len(self.names) - 1
        return number == self.position or (self.kind == NO_SPACE and 0 <= self.position <= number)

    def _strike(self) -> None:
        _no_space() if self.kind == NO_SPACE else _kill()

    def _wrap(self, function: Callable[..., Any], name: str, half: Callable[..., None] | None = None) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._strikes(name):
                if half is not None:
                    half(function, *args, **kwargs)
                self._strike()
            return function(*args, **kwargs)

        return watched

    def _half_write(self, function: Callable[..., Any], fd: int, data: bytes) -> None:
        function(fd, data[: len(data) // 2])

    def _half_text(self, function: Callable[..., Any], path: Path, text: str, *args: Any, **kwargs: Any) -> None:
        function(path, text[: len(text) // 2], *args, **kwargs)

    def _half_tensors(self, function: Callable[..., Any], tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        function(tensors, path, *args, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)

    def _open(self, function: Callable[..., Any]) -> Any:
        def watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            inside = isinstance(file, (str, os.PathLike)) and str(file).startswith(self.folder)
            if inside and set(mode) & set("wax") and self._strikes("write"):
                function(file, mode, *args, **kwargs).close()
                self._strike()
            return function(file, mode, *args, **kwargs)

        return watched


@dataclass
class Trial:
    """One run in one folder, through as many attempts as it takes."""

    folder: RunFolder
    rows: datasets.Dataset
    config: CurriculumConfig = CONFIG
    num_processes: int = 1
    had_checkpoint: bool = False
    litter: set[tuple[str, int, int]] = field(default_factory=set)
    largest_epsilon: float = 0.0
    survivors_told: int = 0
    max_litter: int = 0

    @property
    def witness(self) -> Path:
        """What the attempts did: C for a connected process, B for a beginning, L before a release, S before a step."""
        return self.folder.root.with_name(self.folder.root.name + ".witness")

    @property
    def log(self) -> Path:
        return self.folder.root.with_name(self.folder.root.name + ".log")

    def attempt(
        self, *, fault: Fault | None = None, delay: float | None = None, signum: int = signal.SIGKILL, rank: int = 0
    ) -> int:
        """
        Starts the run or goes on with it; after `delay` seconds, process `rank` gets a signal.

        Returns:
            `int`: The exit status of that process, or minus the signal that ended it.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        before, port = self._counts(), _free_port()
        children = []
        for index in range(self.num_processes):
            child = os.fork()
            if child == 0:
                self._work(fault, index, port)
            children.append(child)
        if delay is not None:
            time.sleep(delay)
            os.kill(children[rank], signum)
        status = _wait(children[rank], TIMEOUT)
        connected = self._counts()["C"] - before["C"] == self.num_processes
        for index, child in enumerate(children):
            if index != rank:
                self._check_survivor(child, lost=status != FINISHED, connected=connected)
        self._check(began=self._counts()["B"] > before["B"])
        return status

    def _check_survivor(self, child: int, *, lost: bool, connected: bool) -> None:
        """A process ends soon after another of its run is lost; before they have met, ending it is the launcher's."""
        if lost and not connected:
            os.kill(child, signal.SIGKILL)
        status = _wait(child, SURVIVOR_TIMEOUT)
        self.survivors_told += lost and connected
        if connected and status not in ((FINISHED, STORAGE_ERROR) if lost else (FINISHED,)):
            raise InvariantBroken(f"the other process ended with {status}\n{self.log.read_text()[-2000:]}")

    def _counts(self) -> Counter[str]:
        return Counter(self.witness.read_text() if self.witness.exists() else "")

    def _work(self, fault: Fault | None, rank: int, port: int) -> None:
        """The child: never returns."""
        code = UNEXPECTED
        try:
            if self.num_processes > 1:
                _join(rank, self.num_processes, port)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            self._watch(is_main=rank == 0)
            if fault is not None:
                fault.install()
            result = run_curriculum(
                self.config, self.rows, output_dir=self.folder.root, resume_from_checkpoint="latest"
            )
            code = FINISHED if result.finished else STOPPED
        except BaseException as error:  # noqa: BLE001 - told by the status
            os.write = fault._write if fault is not None else os.write  # type: ignore[assignment]
            lost = isinstance(error, ProcessLostError)
            if isinstance(error, KeyboardInterrupt):  # before anything was spent
                code = STOPPED
                return
            if lost or (isinstance(error, OSError) and str(self.folder.root) in str(error)):
                code = STORAGE_ERROR
            else:  # an error of the disk that does not name its path is one, too
                traceback.print_exc()
        finally:
            if fault is not None and fault.position < 0:
                self.log.with_suffix(".calls").write_text(json.dumps(fault.names))
            os._exit(code)

    def _watch(self, *, is_main: bool) -> None:
        fd, write = os.open(self.witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.write

        def before(owner: Any, name: str, mark: bytes, *, after: bool = False) -> None:
            function = getattr(owner, name)

            def watched(*args: Any, **kwargs: Any) -> Any:
                if not after:
                    write(fd, mark)
                result = function(*args, **kwargs)
                if after:
                    write(fd, mark)
                return result

            setattr(owner, name, watched)

        before(curriculum, "check_connected", b"C", after=True)
        before(RunFolder, "remove_litter", b"B", after=True)
        if is_main:  # a step of all processes is one release
            before(DPTrainer, "step", b"S")
        lesson = LESSONS["mean"]

        def release(*args: Any) -> Any:
            write(fd, b"L")
            return lesson.release(*args)

        LESSONS["mean"] = dataclasses.replace(lesson, release=release)

    def _check(self, *, began: bool) -> None:
        counts = self._counts()
        charged, epsilon = self._charged()
        for name, mark in (("central-images-mean", "L"), (DP_SGD, "S")):
            if charged[name] < counts[mark]:
                raise InvariantBroken(f"{name}: {counts[mark]} releases, {charged[name]} charged")
        if epsilon > self.config.privacy.target_epsilon:
            raise InvariantBroken(f"epsilon {epsilon} above the target")
        self.largest_epsilon = max(self.largest_epsilon, epsilon)
        checkpoint, _ = latest_checkpoint(self.folder.checkpoints)
        if self.had_checkpoint and checkpoint is None:
            raise InvariantBroken("no valid checkpoint, where there was one")
        self.had_checkpoint = checkpoint is not None
        litter = {(str(p), p.stat().st_ino, p.stat().st_mtime_ns) for p in self.folder.root.rglob(f"{LITTER}*")}
        if began and litter & self.litter:
            raise InvariantBroken(f"left of the attempt before: {sorted(litter & self.litter)}")
        self.litter, self.max_litter = litter, max(self.max_litter, len(litter))

    def _charged(self) -> tuple[Counter[str], float]:
        """What the ledger says, read from a copy: mending it is for the run that goes on."""
        charged: Counter[str] = Counter()
        if not self.folder.ledger.exists():
            return charged, 0.0
        with tempfile.TemporaryDirectory() as copies:
            for path in self.folder.ledger.parent.glob(f"{self.folder.ledger.name}*"):
                shutil.copy(path, copies)
            with PrivacyLedger.open(Path(copies) / self.folder.ledger.name) as ledger:
                try:
                    check_contents(self.folder, plan_lessons(self.config), ledger)
                except LedgerTamperedError as error:
                    raise InvariantBroken(f"a file without its hash or charge: {error}") from None
                for row in ledger.mechanisms:
                    charged[row["name"]] += row["num_steps"]
                return charged, ledger.epsilon(self.config.privacy.target_delta)

    def finish(self) -> None:
        """Goes on without interruption, and checks the result."""
        status = self.attempt()
        if status != FINISHED:
            raise InvariantBroken(f"the run did not go on: status {status}\n{self.log.read_text()[-2000:]}")
        report = json.loads(self.folder.privacy.read_text())
        if not all(check.holds for check in verify_report(report)):
            raise InvariantBroken("the report does not verify")
        if report["epsilon"] > self.config.privacy.target_epsilon or report["mechanisms"][-1]["name"] != DP_SGD:
            raise InvariantBroken("the report is not that of a finished run")
        if self.litter:
            raise InvariantBroken(f"a finished run leaves {sorted(self.litter)}")
        if reasons := not_private_reasons(self.folder, self.config, PrivacyReport.from_file(self.folder.privacy)):
            raise InvariantBroken(f"a finished run is not private: {reasons}")

    def remove(self) -> None:
        shutil.rmtree(self.folder.root, ignore_errors=True)
        for path in (self.witness, self.log):
            path.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _join(rank: int, num_processes: int, port: int) -> None:
    """Makes this process one of several, as a launcher does."""
    os.environ.update(
        ACCELERATE_USE_CPU="true", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes),
        LOCAL_WORLD_SIZE=str(num_processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def _wait(child: int, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise InvariantBroken(f"a process took more than {timeout} seconds to end")


def few_rows() -> datasets.Dataset:
    return digits_dataset().select(range(64))


@contextmanager
def coarse_accounting() -> Iterator[None]:
    """Accounting is most of the time of so short a run; a coarse one is no less an upper bound."""

    def forget() -> None:
        accounting._epsilon.cache_clear()
        accounting._compose.cache_clear()

    interval = accounting._interval
    accounting._interval = lambda *args: max(interval(*args), _COARSE)  # type: ignore[assignment]
    forget()
    try:
        yield
    finally:
        accounting._interval = interval
        forget()


def warm_up(folder: Path) -> None:
    """One run in this process: what it computes of its budget is remembered in those that are forked."""
    result = run_curriculum(CONFIG, few_rows(), output_dir=folder / "warm-up")
    verify_report(result.report.to_dict())
    shutil.rmtree(folder / "warm-up")


def sweep_signals(
    folder: Path, num_signals: int, *, seed: int, signum: int = signal.SIGKILL, num_processes: int = 1
) -> dict[str, Any]:
    """Sends `num_signals` signals at random moments of as many runs as that takes; each run is finished."""
    rng, rows = random.Random(seed), few_rows()
    trial = Trial(RunFolder(folder / "whole"), rows, num_processes=num_processes)
    start = time.monotonic()
    trial.finish()
    duration = time.monotonic() - start
    trial.remove()
    sent, runs, statuses = 0, 0, Counter()
    epsilons, litter, told = [], 0, 0
    while sent < num_signals:
        trial = Trial(RunFolder(folder / f"run-{runs}"), rows, num_processes=num_processes)
        runs += 1
        while sent < num_signals:
            status = trial.attempt(delay=rng.uniform(0, duration), signum=signum, rank=rng.randrange(num_processes))
            if status == FINISHED:
                break
            if status == UNEXPECTED or (status > 0 and status not in (STOPPED,)):
                raise InvariantBroken(f"status {status}\n{trial.log.read_text()[-2000:]}")
            sent += 1
            statuses[str(status)] += 1
        trial.finish()
        epsilons.append(trial.largest_epsilon)
        litter, told = max(litter, trial.max_litter), told + trial.survivors_told
        trial.remove()
    return {
        "signal": signal.Signals(signum).name, "processes": num_processes, "sent": sent, "runs": runs,
        "statuses": dict(statuses),
        "survivors_told": told, "largest_epsilon": max(epsilons), "most_temporary_files_after_an_attempt": litter,
    }  # fmt: skip


def count_calls(folder: Path) -> list[str]:
    """Names of the calls that write, in order, of an uninterrupted run."""
    trial = Trial(RunFolder(folder / "count"), few_rows())
    if trial.attempt(fault=Fault(trial.folder.root, -1, KILL)) != FINISHED:
        raise InvariantBroken(trial.log.read_text()[-2000:])
    names = json.loads(trial.log.with_suffix(".calls").read_text())
    trial.remove()
    return names


def sweep_calls(folder: Path, kind: str, positions: list[int]) -> dict[str, Any]:
    """A kill, or a full disk from then on, at each of `positions`; each run is then finished."""
    rows, statuses, epsilons = few_rows(), Counter(), [0.0]
    for position in positions:
        trial = Trial(RunFolder(folder / f"{kind.replace(' ', '-')}-{position}"), rows)
        status = trial.attempt(fault=Fault(trial.folder.root, position, kind))
        expected = -signal.SIGKILL if kind == KILL else STORAGE_ERROR
        # A run may do without what it could not write, such as a picture; a kill it cannot do without.
        if status != expected:
            raise InvariantBroken(f"call {position}: status {status}\n{trial.log.read_text()[-2000:]}")
        statuses[str(status)] += 1
        trial.finish()
        epsilons.append(trial.largest_epsilon)
        trial.remove()
    return {"fault": kind, "calls": len(positions), "statuses": dict(statuses), "largest_epsilon": max(epsilons)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/crash_sweep.json")
    parser.add_argument("--num_kills", type=int, default=200)
    parser.add_argument("--num_terms", type=int, default=20)
    parser.add_argument("--num_lost", type=int, default=50, help="Kills of one of two processes.")
    parser.add_argument("--every", type=int, default=1, help="Take each n-th call that writes.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with coarse_accounting(), tempfile.TemporaryDirectory(prefix="dp-curriculum-crash-") as name:
        folder = Path(name)
        warm_up(folder)
        names = count_calls(folder)
        positions = list(range(0, len(names), given.every))
        found: dict[str, Any] = {
            "steps_of_a_run": CONFIG.dp_sgd.num_dp_steps,
            "target_epsilon": CONFIG.privacy.target_epsilon,
            "calls_that_write_of_a_run": dict(Counter(names)),
            "calls": [sweep_calls(folder, kind, positions) for kind in (KILL, NO_SPACE)],
            "signals": [
                sweep_signals(folder, given.num_kills, seed=given.seed),
                sweep_signals(folder, given.num_terms, seed=given.seed, signum=signal.SIGTERM),
                sweep_signals(folder, given.num_lost, seed=given.seed, num_processes=2),
            ],
            "violations": 0,  # the first one ends the sweep
            "seconds": 0,
        }
    found["seconds"] = round(time.monotonic() - start)
    Path(given.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
