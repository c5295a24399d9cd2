"""Ctrl-C: what is said at once, what is finished, what is cut short, and who has the last word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from accelerate import PartialState
from ranks import results_of

from dp_curriculum.runtime import progress, stopping
from dp_curriculum.runtime.last_words import say_last
from dp_curriculum.runtime.stopping import StopRequest, stop_on_signal


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_a_stop_and_the_second_interrupts(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with stop_on_signal() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signum)
        assert stop.agreed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) is before


def test_away_from_the_main_thread_no_signal_is_caught_and_nothing_fails() -> None:
    found: list[Any] = []

    def work() -> None:
        with stop_on_signal() as stop:
            found.extend([stop.agreed(), signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, signal.getsignal(signal.SIGINT)]


def test_a_launcher_that_passes_ctrl_c_on_does_not_make_two_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within three seconds the second signal is the same Ctrl-C; after that it is another."""
    now = [100.0]
    monkeypatch.setattr(stopping, "_IS_LAUNCHED", True)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    with stop_on_signal() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] += 2.9
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed()
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_all_processes_stop_where_one_is_asked_to() -> None:
    def work(rank: int) -> list[bool]:
        PartialState(cpu=True)
        return [StopRequest(requested=rank == 1).agreed(), StopRequest().agreed()]

    assert results_of(2, work) == [[True, False], [True, False]]


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (
            StopRequest(work="", saving_seconds=6.0),
            "Saving: about 6 seconds. Press Ctrl-C again to stop without saving.",
        ),
        (StopRequest(nothing_spent=True), "Stopping: nothing has been spent by this start."),
        (StopRequest(), "Finishing the step, then saving. Press Ctrl-C again to stop without saving."),
        (
            StopRequest(work="the noisy step", work_seconds=14.0, saving_seconds=6.0),
            "Finishing the noisy step, then saving: about 20 seconds. Press Ctrl-C again to stop without saving.",
        ),
        (
            StopRequest(work_seconds=None, saving_seconds=6.0),
            "Finishing the step, then saving. Press Ctrl-C again to stop without saving.",
        ),
    ],
)
def test_the_line_says_what_happens_and_how_long_it_takes(stop: StopRequest, words: str) -> None:
    assert stop.words({}) == words


def test_the_line_says_what_a_launcher_does_meanwhile() -> None:
    assert f"`kill {os.getpid()}` stops without saving" in StopRequest().words({"ACCELERATE_MIXED_PRECISION": "no"})
    assert "waits 30 seconds" in StopRequest().words({"TORCHELASTIC_RUN_ID": "x"})
    longer = {"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    assert "waits 600 seconds" in StopRequest().words(longer)


def test_the_line_is_said_once_and_by_one_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    stop.announce()
    stop.announce()
    assert capsys.readouterr().err.count("Finishing the step") == 1
    monkeypatch.setenv("RANK", "1")
    StopRequest().announce()
    assert capsys.readouterr().err == ""


def test_before_anything_is_spent_a_stop_ends_the_run_at_once() -> None:
    with pytest.raises(KeyboardInterrupt, match="before anything was spent"):
        with stop_on_signal(StopRequest(nothing_spent=True)):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_is_announced_during_a_call_that_holds_the_main_thread(capfd: pytest.CaptureFixture[str]) -> None:
    """The handler in Python runs when the call has returned: after a long computation, or here after the lock."""
    said: list[float] = []
    with stop_on_signal() as stop:
        announce = stop.announce
        stop.announce = lambda: (said.append(time.monotonic()), announce())[1]  # type: ignore[method-assign]
        size = 1500
        matrix = torch.rand(size, size, dtype=torch.float64)
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.monotonic()
        torch.linalg.matrix_power(matrix, 2**5)  # one call, which takes longer than the wait for the signal
        end = time.monotonic()
        timer.join()
    if end - begin > 0.5:
        assert said[0] < end
    assert said and stop.requested


# --- what is cut short -----------------------------------------------------------------------------------------------


def test_work_that_can_be_left_undone_is_cut_short_and_not_begun_again() -> None:
    done: list[int] = []

    def draw() -> str:
        for step in range(10):
            done.append(step)
            if step == 2:
                signal.raise_signal(signal.SIGINT)
        return "a sheet"

    with stop_on_signal() as stop:
        assert stop.unless_stopped(lambda: "another") == "another"
        assert stop.unless_stopped(draw) is None
        assert done == [0, 1, 2] and stop.requested
        assert stop.unless_stopped(draw) is None and len(done) == 3
        with pytest.raises(KeyboardInterrupt, match="without saving"):
            signal.raise_signal(signal.SIGINT)


def test_errors_of_such_work_are_not_taken_for_a_stop() -> None:
    def fail() -> None:
        raise ValueError("broken")

    with stop_on_signal() as stop:
        with pytest.raises(ValueError, match="broken"):
            stop.unless_stopped(fail)
        signal.raise_signal(signal.SIGINT)  # it is no longer cut: the request is noted, and nothing is raised
        assert stop.requested


def test_a_forked_process_does_not_announce_for_its_parent() -> None:
    with stop_on_signal() as stop:
        assert results_of(2, lambda rank: signal.set_wakeup_fd(-1)) == [-1, -1]
        assert not stop.requested


# --- who has the last word -------------------------------------------------------------------------------------------

_LAUNCHER = """
import subprocess, sys, time
subprocess.run([sys.executable, "-c", sys.argv[1]])
time.sleep(0.3)
print("Traceback of the launcher", flush=True)
"""
_CHILD = """
from dp_curriculum.runtime.last_words import say_last
say_last("the last words", environment={"ACCELERATE_MIXED_PRECISION": "no"})
"""


def test_the_run_has_the_last_word_after_its_launcher() -> None:
    output = subprocess.run([sys.executable, "-c", _LAUNCHER, _CHILD], capture_output=True, text=True, timeout=120)
    assert output.stdout.split("\n") == ["Traceback of the launcher", "", "the last words", ""], output


def test_without_a_launcher_the_words_are_printed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    say_last("the last words", environment={})
    assert capsys.readouterr().out == "the last words\n"


# --- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 seconds"), (1.2, "1 second"), (119, "119 seconds"), (7000, "116.7 minutes"), (86400 * 3, "3.0 days")],
)
def test_a_length_of_time_in_words(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words
