"""How steps were executed: of several ways, the weakest is told."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from dp_curriculum.privacy.execution import NOTHING_EXECUTED, UNKNOWN, Execution, weakest_execution
from dp_curriculum.privacy.randomness import SecretGenerator


SECURE = Execution(
    randomness=SecretGenerator("secure").describe(), device="cpu", precision="float32", gradients="checked",
    max_gradient_error=1e-6,
)  # fmt: skip
FAST = dataclasses.replace(SECURE, randomness=SecretGenerator("fast").describe())
ON_GPU = dataclasses.replace(FAST, device="cuda", randomness={**FAST.randomness, "generator": "torch-philox"})
OPEN = dataclasses.replace(SECURE, randomness={**SECURE.randomness, "secret": False})
LESSON = dataclasses.replace(SECURE, precision="float64", gradients="not taken", max_gradient_error=None)
STRANGE = dataclasses.replace(SECURE, randomness={**SECURE.randomness, "generator": "xorshift"})


@pytest.mark.parametrize(
    ("executions", "generator"),
    [
        ([SECURE], "chacha20"),
        ([SECURE, FAST], "numpy-philox"),
        ([SECURE, FAST, ON_GPU], "torch-philox"),
        ([STRANGE, ON_GPU, SECURE], "xorshift"),
        ([UNKNOWN, STRANGE, SECURE], "unknown"),
        ([NOTHING_EXECUTED, SECURE], "chacha20"),
    ],
)
def test_the_weakest_randomness_is_told_in_any_order(executions: list[Execution], generator: str) -> None:
    for order in itertools.permutations(executions):
        assert weakest_execution(order).randomness["generator"] == generator


def test_noise_that_is_no_secret_is_weaker_than_any_that_is() -> None:
    assert weakest_execution([ON_GPU, OPEN, SECURE]).randomness["secret"] is False
    assert weakest_execution([SECURE, UNKNOWN]).randomness.get("secret") is not True
    masks = dataclasses.replace(SECURE, randomness={**SECURE.randomness, "mask_generator": "numpy-philox"})
    assert weakest_execution([SECURE, masks]).randomness["mask_generator"] == "numpy-philox"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"precision": "bfloat16"}, {"precision": "bfloat16"}),
        ({"precision": "float64"}, {"precision": "float32"}),
        ({"precision": "float8"}, {"precision": "float8"}),
        ({"gradients": "unchecked"}, {"gradients": "unchecked"}),
        ({"gradients": "not taken"}, {"gradients": "checked"}),
        ({"max_gradient_error": 3e-5}, {"max_gradient_error": 3e-5}),
        ({"max_gradient_error": None}, {"max_gradient_error": 1e-6}),
        ({"device": "cuda"}, {"device": "cpu, cuda"}),
    ],
    ids=str,
)
def test_each_part_is_that_of_the_weakest(changes: dict[str, Any], told: dict[str, Any]) -> None:
    other = dataclasses.replace(SECURE, **changes)
    for order in ([SECURE, other], [other, SECURE]):
        assert weakest_execution(order) == dataclasses.replace(SECURE, **told)


def test_a_lesson_and_dp_sgd_are_told_as_dp_sgd() -> None:
    assert weakest_execution([LESSON, SECURE]) == SECURE
    assert weakest_execution([LESSON]) == LESSON and weakest_execution([]) == NOTHING_EXECUTED


def test_what_is_written_down_is_read_back() -> None:
    for execution in (SECURE, LESSON, UNKNOWN, NOTHING_EXECUTED):
        assert Execution.from_dict(execution.to_dict()) == execution
    with pytest.raises(KeyError):
        Execution.from_dict({"device": "cpu"})
