"""The last words of a stopped run. They need no library, because a run may be stopped while libraries are imported."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import TextIO


_LAUNCHER = os.getppid()
_FAREWELL_SECONDS = 60.0


def say_last(text: str, *, stream: TextIO | None = None, environment: Mapping[str, str] = os.environ) -> None:
    """
    Prints the last words of a stopped run, after those of its launcher.

    `accelerate launch` and `torchrun` print a traceback of their own when Ctrl-C ends them. Under them the words are
    left to a small process that waits until the launcher is gone, a minute at most.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in environment or "ACCELERATE_MIXED_PRECISION" in environment
    if is_launched and os.name == "posix" and os.getppid() == _LAUNCHER and _LAUNCHER > 1:
        with contextlib.suppress(OSError):
            _leave_to_another(text)
            return
    stream = stream or sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def _leave_to_another(text: str) -> None:
    program = (
        "import os, sys, time\n"
        "parent, until = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])\n"
        "def alive():\n"
        "    try: os.kill(parent, 0)\n"
        "    except ProcessLookupError: return False\n"
        "    except OSError: return True\n"
        "    return True\n"
        "while alive() and time.monotonic() < until: time.sleep(0.05)\n"
        "sys.stdout.reconfigure(errors='backslashreplace')\n"
        "sys.stdout.write('\\n' + sys.argv[3] + '\\n')\n"
    )
    sys.stdout.flush()
    sys.stderr.flush()
    subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", program, str(_LAUNCHER), str(_FAREWELL_SECONDS), text],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
