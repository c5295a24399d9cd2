"""Work of which nothing may be heard, because what it prints or how often it begins is not covered."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unheard() -> Iterator[None]:
    """
    Discards everything that this process and its children write to standard output and error, or log.

    Descriptors for what writes past Python, the streams of `sys` for notebooks, and records for handlers that hold
    another stream.
    """
    disabled = logging.root.manager.disable
    with open(os.devnull, "w", encoding="utf-8") as null, _descriptors(null.fileno()):
        logging.disable(logging.CRITICAL)
        try:
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                yield
        finally:
            logging.disable(disabled)


@contextmanager
def _descriptors(null: int) -> Iterator[None]:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        for descriptor in (1, 2):
            os.dup2(null, descriptor)
        yield
    finally:
        for descriptor, saved in zip((1, 2), kept):
            os.dup2(saved, descriptor)
            os.close(saved)
