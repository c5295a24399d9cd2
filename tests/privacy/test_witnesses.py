"""Second opinions: they agree with an honest epsilon, and contradict one that is not."""

from __future__ import annotations

import pytest

from dp_curriculum.privacy import witnesses
from dp_curriculum.privacy.accounting import GaussianEvent, compute_epsilon
from dp_curriculum.privacy.witnesses import ask_witnesses


EVENTS = (GaussianEvent(4.0), GaussianEvent(1.2, 0.1, 50))


@pytest.mark.parametrize("events", [EVENTS, EVENTS[:1], EVENTS[1:], ()], ids=["both", "easy", "hard", "none"])
def test_witnesses_agree_with_an_honest_epsilon(events: tuple[GaussianEvent, ...]) -> None:
    checks = ask_witnesses(events, 1e-5, compute_epsilon(events, 1e-5))
    assert len(checks) == 2 and all(check.holds for check in checks)
    assert not any(check.computed == "not computable" for check in checks)


def test_prv_contradicts_an_epsilon_that_is_too_low_or_too_high_and_rdp_one_above_its_bound() -> None:
    epsilon = compute_epsilon(EVENTS, 1e-5)
    assert [check.holds for check in ask_witnesses(EVENTS, 1e-5, 0.95 * epsilon)] == [False, True]
    assert [check.holds for check in ask_witnesses(EVENTS, 1e-5, 2 * epsilon)] == [False, False]


def test_events_that_were_edited_are_contradicted() -> None:
    epsilon = compute_epsilon(EVENTS, 1e-5)
    for events in (EVENTS[:1], (EVENTS[0], GaussianEvent(1.5, 0.1, 50)), (EVENTS[0], GaussianEvent(1.2, 0.1, 40))):
        assert not all(check.holds for check in ask_witnesses(events, 1e-5, epsilon))


def test_a_witness_that_fails_says_that_it_saw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(witnesses.PRVAccountant):
        def get_epsilon(self, delta: float, **options: float) -> float:
            raise RuntimeError("Discrete mean differs significantly from continuous mean.")

    monkeypatch.setattr(witnesses, "PRVAccountant", Failing)
    prv, rdp = ask_witnesses(EVENTS, 1e-5, compute_epsilon(EVENTS, 1e-5))
    assert prv.verdict == "not checked" and prv.computed == "not computable" and rdp.computed != "not computable"
