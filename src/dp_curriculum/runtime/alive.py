"""A sign on the terminal that a long task is running, which says neither how much is done nor how much is left."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


_TURN = "|/-\\"
_SECONDS = 0.5


@contextmanager
def shown_alive(task: str, stream: TextIO | None = None) -> Iterator[None]:
    """
    Turns a bar behind `task` on a terminal, and removes it at the end. A file or a pipe gets nothing.

    It turns with the clock alone, because a count of rows, or a speed, may be private.

    Args:
        task (`str`): Words for what is under way.
        stream (`TextIO`, *optional*): The terminal; standard error if unset.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        yield
        return
    ended = threading.Event()

    def turn() -> None:
        for sign in itertools.cycle(_TURN):
            stream.write(f"\r{task} {sign}")
            stream.flush()
            if ended.wait(_SECONDS):
                return

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        stream.write(f"\r{' ' * (len(task) + 2)}\r")
        stream.flush()
