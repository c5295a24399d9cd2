"""A sample of `benchmarks/crash_sweep.py`: kills, full disks and terminations leave a run that ends in its budget."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.training import stages, teaching


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fork.*")]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    module = load_script("benchmarks/crash_sweep.py")
    with module.coarse_accounting():
        module.warm_up(tmp_path_factory.mktemp("warm-up"))
        yield module
    del sys.modules["crash_sweep"]


@pytest.fixture(scope="module")
def calls(sweep: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return sweep.count_calls(tmp_path_factory.mktemp("count"))


def test_a_run_writes_flushes_and_renames_at_many_places(calls: list[str]) -> None:
    assert {"write", "fsync", "rename"} == set(calls) and len(calls) > 100


@pytest.mark.parametrize("kind", ["kill", "no space"])
def test_a_run_survives_a_fault_at_a_write(kind: str, sweep: ModuleType, calls: list[str], tmp_path: Path) -> None:
    """Three places over the whole run, others for the two kinds. The full sweep takes all of them."""
    positions = list(range(7 if kind == "kill" else 16, len(calls), len(calls) // 3))
    found = sweep.sweep_calls(tmp_path, kind, positions)
    assert sum(found["statuses"].values()) == len(positions) >= 3
    assert 0 < found["largest_epsilon"] <= 10


@pytest.mark.parametrize(("signum", "number"), [(signal.SIGKILL, 3), (signal.SIGTERM, 1)])
def test_a_run_survives_signals_at_random_moments(
    signum: signal.Signals, number: int, sweep: ModuleType, tmp_path: Path
) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    found = sweep.sweep_signals(tmp_path, number, seed=seed, signum=signum)
    assert found["sent"] == number and found["largest_epsilon"] <= 10, f"seed {seed}"


def test_a_run_on_two_processes_survives_the_loss_of_either(sweep: ModuleType, tmp_path: Path) -> None:
    """The other one ends in good time, and the run goes on."""
    seed, told = int.from_bytes(os.urandom(4), "little"), 0
    for number in range(10):  # until one was killed that had met the other
        folder = tmp_path / str(number)
        folder.mkdir()
        found = sweep.sweep_signals(folder, 1, seed=seed + number, num_processes=2)
        told += found["survivors_told"]
        assert found["sent"] == 1 and found["largest_epsilon"] <= 10, f"seed {seed + number}"
        if told:
            break
    assert told


# --- the sweep notices what it is for ------------------------------------------------------------------------------


def late(trial: Any, sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charges after the release, not before it."""
    monkeypatch.setattr("dp_curriculum.training.run.Run.reserve", lambda self, planned, num_steps: None)


def forgotten(trial: Any, sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run begins its hard stage again."""
    position = 0
    while not trial._counts()["S"] > 1:  # until a kill falls among the steps
        position += 15
        assert trial.attempt(fault=sweep.Fault(trial.folder.root, position, sweep.KILL)) < 0
    monkeypatch.setattr(stages, "charged_steps", lambda ledger, name: 0)


def unrecorded(trial: Any, sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without their hashes: a resumed run could not tell them from another's."""
    monkeypatch.setattr("dp_curriculum.training.run.Run.record", lambda self, path, digest: None)


def recorded_late(trial: Any, sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash after the name: a kill between the two leaves a file that the run itself refuses."""
    save = teaching._save_tensors

    def killed_between(run: Any, tensors: Any, path: Path) -> None:
        monkeypatch.setattr("dp_curriculum.training.run.Run.record", lambda self, path, digest: None)
        save(run, tensors, path)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(teaching, "_save_tensors", killed_between)


@pytest.mark.parametrize("mistake", [late, forgotten, unrecorded, recorded_late])
def test_the_sweep_notices_a_mistake(
    mistake: Any, sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = sweep.Trial(RunFolder(tmp_path / "run"), sweep.few_rows())
    mistake(trial, sweep, monkeypatch)
    with pytest.raises(sweep.InvariantBroken, match="hash" if "record" in mistake.__name__ else None):
        trial.finish()
