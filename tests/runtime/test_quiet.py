"""What must not be heard is not, whichever way it takes; what comes later is."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from dp_curriculum.runtime.quiet import unheard


def _speak(word: str) -> None:
    print(word)
    print(word, file=sys.stderr)
    os.write(1, word.encode())
    os.write(2, word.encode())
    logging.getLogger("some.library").critical(word)
    subprocess.run([sys.executable, "-c", f"import sys; print('{word}'); sys.stderr.write('{word}')"], check=True)


def _fail_aloud(word: str) -> None:
    _speak(word)
    raise ValueError("in the middle")


def test_nothing_is_heard_inside_and_everything_after(capfd: Any, caplog: Any) -> None:
    """Printed, logged, written past Python, and written by a child."""
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with pytest.raises(ValueError, match="in the middle"), unheard():
            _fail_aloud("whisper")
        heard = "".join(capfd.readouterr())
        assert "whisper" not in heard and "whisper" not in caplog.text
        _speak("shout")
        sys.stdout.flush()
        out, err = capfd.readouterr()
        assert out.count("shout") == 3 and err.count("shout") == 4 and "shout" in caplog.text
    finally:
        logging.getLogger().removeHandler(handler)
