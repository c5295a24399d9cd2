"""A sign that a task is running: on terminals, and without a number."""

from __future__ import annotations

import io
import re

import pytest

from dp_curriculum.runtime import alive
from dp_curriculum.runtime.alive import shown_alive


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_turning_bar_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "_SECONDS", 0.001)
    terminal = Terminal()
    with pytest.raises(KeyError), shown_alive("reading images", terminal):
        raise KeyError
    shown = terminal.getvalue()
    assert shown.startswith("\rreading images |") and shown.split("\r")[-2].isspace()
    assert not re.search(r"\d", shown)


def test_a_file_gets_nothing() -> None:
    file = io.StringIO()
    with shown_alive("reading images", file):
        pass
    assert not file.getvalue()
