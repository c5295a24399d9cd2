"""Things shown to a person who waits: a length of time in words, and a sign of life that only the clock drives."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import notebook_tqdm, tqdm
from tqdm.std import tqdm as plain_tqdm


_TICK_SECONDS = 1.0


def duration(seconds: float) -> str:
    """A length of time in words."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return "1 second" if round(seconds) == 1 else f"{seconds:.0f} seconds"


def is_watched() -> bool:
    """True if a person sees what is written now and erased later: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or notebook_tqdm is not plain_tqdm


@contextmanager
def sign_of_life(description: str) -> Iterator[None]:
    """
    Shows for how long something has gone on, on a terminal or in a notebook, and erases it at the end.

    It is driven by the clock, so that nothing that is read shows in it: no row can make it pause, or count. A log file
    gets none of it.
    """
    if not is_watched():
        yield
        return
    ended = threading.Event()
    bar = tqdm(desc=description, bar_format="{desc}: {elapsed}", leave=False)

    def tick() -> None:
        while not ended.wait(_TICK_SECONDS):
            bar.refresh()

    clock = threading.Thread(target=tick, daemon=True)
    clock.start()
    try:
        yield
    finally:
        ended.set()
        clock.join()
        bar.close()
