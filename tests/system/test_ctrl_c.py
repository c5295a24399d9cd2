"""Ctrl-C on a real terminal: a sample of the moments and launchers that `benchmarks/ctrl_c.py` goes through."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script


pytest.importorskip("termios")


@pytest.fixture(scope="module")
def ctrl_c() -> ModuleType:
    return load_script("benchmarks/ctrl_c.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "moment"),
    [
        ("train", "imports"),
        ("accelerate launch", "noisy step"),
        ("torchrun", "pretraining"),
    ],
)
def test_ctrl_c_is_answered_and_leaves_a_card(launcher: str, moment: str, ctrl_c: ModuleType, tmp_path: Path) -> None:
    assert ctrl_c.stop_at(moment, launcher, tmp_path).faults == []


def test_what_is_wrong_is_noticed(ctrl_c: ModuleType) -> None:
    """The negative control: each thing that must not be, alone."""
    fine = {
        "launcher": "train", "moment": "card", "first_line_seconds": 0.1, "first_line": "Saving.", "status": 130,
        "saved_after_seconds": 1.0, "has_card": True, "card_holds": True, "charged_steps": 3,
        "last_line": "interrupted: ...",
    }  # fmt: skip
    assert ctrl_c.Stopped(**fine).faults == []
    for wrong in ({"first_line_seconds": 1.1}, {"status": 1}, {"card_holds": False}, {"has_card": False},
                  {"last_line": "KeyboardInterrupt"}):  # fmt: skip
        assert ctrl_c.Stopped(**{**fine, **wrong}).faults
    assert ctrl_c.Stopped(**{**fine, "launcher": "torchrun", "status": 1}).faults == []
