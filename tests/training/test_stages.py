"""The loop of noisy steps: what is charged before what, and what a stop or a crash leaves."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.mechanism import DP_SGD, PlannedMechanism
from dp_curriculum.runtime.stopping import StopRequest
from dp_curriculum.runtime.threads import Threads
from dp_curriculum.training import stages


MECHANISM = PlannedMechanism(DP_SGD, 1.0, GaussianEvent(1.0, 0.5, 9))


class Recorder:
    """Run and trainer in one: notes what the loop asks of them, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        self.log: list[str] = []
        self.stop, self.is_main, self.threads = StopRequest(), False, Threads(1)
        self.num_steps_taken, self.stop_after = 0, stop_after
        for name, line in (("_save_samples", "sheet"), ("_log", "log"), ("_save_checkpoint", "save")):
            monkeypatch.setattr(stages, name, lambda *given, line=line: self.log.append(line))

    def reserve(self, mechanism: PlannedMechanism, num_steps: int) -> None:
        assert mechanism is MECHANISM
        self.log.append(f"reserve {num_steps}")

    def refund(self, mechanism: PlannedMechanism, num_steps: int) -> None:
        assert mechanism is MECHANISM
        self.log.append(f"refund {num_steps}")

    def step(self) -> None:
        self.num_steps_taken += 1
        self.log.append("step")
        self.stop.requested = self.num_steps_taken == self.stop_after

    def attached(self) -> Any:
        return contextlib.nullcontext()

    def try_images(self, count: int) -> None:
        self.log.append(f"try {count}")

    def take(self, num_steps: int, block: int, expected_batch_size: int = 1, images_at_once: int = 1) -> int:
        self.config = SimpleNamespace(
            runtime=SimpleNamespace(checkpointing_steps=block),
            dp_sgd=SimpleNamespace(expected_batch_size=expected_batch_size),
        )
        self.images_at_once = images_at_once
        both: Any = self
        stages.take_noisy_steps(both, both, MECHANISM, num_steps)
        return self.num_steps_taken


def test_each_block_is_reserved_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    assert recorder.take(5, block=2) == 5
    two = ["reserve 2", "step", "sheet", "step", "sheet", "log", "save"]
    assert recorder.log == [*two, *two, "reserve 1", "step", "sheet", "log", "save"]


def test_a_stop_refunds_what_was_not_taken_and_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, stop_after=4)
    assert recorder.take(9, block=3) == 4
    assert recorder.log[-6:] == ["reserve 3", "step", "sheet", "refund 2", "log", "save"]


def test_a_stop_at_the_end_of_a_block_refunds_nothing_and_reserves_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder(monkeypatch, stop_after=3)
    assert recorder.take(9, block=3) == 3
    assert recorder.log.count("reserve 3") == recorder.log.count("save") == 1
    assert not [line for line in recorder.log if line.startswith("refund")]


@pytest.mark.parametrize(("num_steps", "requested"), [(0, False), (-2, False), (5, True)])
def test_nothing_is_reserved_for_no_steps_or_after_a_stop(
    num_steps: int, requested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    recorder.stop.requested = requested
    assert recorder.take(num_steps, block=3) == 0
    assert recorder.log == []


def test_a_crash_in_a_block_refunds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)

    def crash() -> None:
        raise RuntimeError("power cut")

    recorder.step = crash  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power cut"):
        recorder.take(5, block=2)
    assert recorder.log == ["reserve 2"]


def test_threads_are_tried_again_after_many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 passes of a physical batch: 25 steps of 20 passes each."""
    settled: list[int] = []
    monkeypatch.setattr(Threads, "settle", lambda self, compute: settled.append(trainer.num_steps_taken))
    trainer = Recorder(monkeypatch)
    trainer.threads = Threads(4)
    trainer.take(60, block=10, expected_batch_size=40, images_at_once=2)
    assert settled == [0, 30]
    assert trainer.log.index("reserve 10") == 0
