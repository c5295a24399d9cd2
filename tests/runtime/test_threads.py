"""On how many threads a process computes: as it is told, or as many as a trial finds fastest."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from dp_curriculum.runtime import threads
from dp_curriculum.runtime.threads import Threads, computing_threads


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "share_of_cores", lambda: 4)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def takes(**seconds: float) -> None:
    time.sleep(seconds[f"on_{torch.get_num_threads()}"])


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"on_4": 0.001, "on_2": 0.02, "on_1": 0.03}, 4),
        ({"on_4": 0.03, "on_2": 0.001, "on_1": 0.02}, 2),
        ({"on_4": 0.03, "on_2": 0.02, "on_1": 0.001}, 1),
    ],
)
def test_the_fastest_number_of_threads_is_left_set(seconds: dict[str, float], expected: int) -> None:
    with computing_threads(CPU) as chosen:
        chosen.settle(lambda: takes(**seconds))
        assert torch.get_num_threads() == expected
        words = chosen.describe()
    assert words == {4: "computing on 4 threads"}.get(
        expected, f"computing on {expected} thread{'s' * (expected > 1)} of 4: more are slower here"
    )


def test_more_threads_come_back_when_they_are_faster_again() -> None:
    with computing_threads(CPU) as chosen:
        chosen.settle(lambda: takes(on_4=0.03, on_2=0.02, on_1=0.001))
        chosen.settle(lambda: takes(on_4=0.001, on_2=0.02, on_1=0.03))
        assert torch.get_num_threads() == 4


def never() -> None:
    raise AssertionError("a trial was made")


def test_the_option_goes_before_the_variable_and_the_variable_before_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with computing_threads(CPU, 3) as chosen:
        chosen.settle(never)
        assert torch.get_num_threads() == 3
        assert chosen.describe() == "computing on 3 threads, as --cpu_threads says"
    with computing_threads(CPU) as chosen:
        chosen.settle(never)
        assert torch.get_num_threads() == 2
        assert chosen.describe() == "computing on 2 threads, as OMP_NUM_THREADS says"
    assert torch.get_num_threads() == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    with computing_threads(torch.device("meta")) as chosen:
        chosen.settle(never)
        assert torch.get_num_threads() == 4


def test_more_processes_than_cores_compute_on_one_thread_each_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "share_of_cores", lambda: 1)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "processes_here", lambda: 5)
    with computing_threads(CPU) as chosen:
        chosen.settle(never)
        assert chosen.describe() == "computing on 1 thread for each of 5 processes, which share fewer cores (2)"


def test_what_computes_once_has_nothing_to_try() -> None:
    Threads(1).settle(never)
