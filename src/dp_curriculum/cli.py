"""The `dp-curriculum` command: finds the command, runs it, and turns errors into one line and an exit status."""

from __future__ import annotations

import difflib
import importlib.metadata
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType

from dp_curriculum.runtime.cores import wait_asleep
from dp_curriculum.runtime.last_words import say_last


COMMANDS = {
    "plan": "show budget, noise, steps, time and memory before any data is read",
    "inspect": "show which of your images contribute, and why others do not; for the owner only",
    "train": "train from easy to hard, and write pipeline, report and card",
    "tune": "try settings in private, and keep the best under one budget",
    "sample": "generate images",
    "synthesize": "write a labelled dataset of generated images, and share it",
    "evaluate": "measure how useful and how faithful the images are",
    "audit": "try to break the guarantee of a configuration, on a tiny network",
    "budget": "keep the budget of a dataset: what all runs spent, what was shared, what is left",
    "push": "share a model with its privacy report on the Hub",
    "verify": "recompute epsilon from a published report",
}
FAILED_CLAIM, USAGE_ERROR, BUDGET_ERROR, STORAGE_ERROR, INTERRUPTED = 1, 2, 4, 5, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Status: 0, 1 (a claim fails), 2 (usage), 3 (not checked), 4 (budget), 5 (storage), 130."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path may hold bytes that are no text. Standard error shows them escaped. The summary at the end of a
        # training must not fail because of them either.
        sys.stdout.reconfigure(errors="backslashreplace")
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        meant = f"did you mean {near[0]}? Else " if near else ""
        print(f"error: there is no command {argv[0]!a}: {meant}dp-curriculum --help lists them.", file=sys.stderr)
        return USAGE_ERROR
    if argv == ["--version"]:
        print(importlib.metadata.version("dp_curriculum"))
        return 0
    if not argv or argv[0] not in COMMANDS:
        print("usage: dp-curriculum COMMAND ...    (dp-curriculum COMMAND --help shows its options)\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<10} {purpose}")
        return 0 if argv[:1] in ([], ["--help"], ["-h"]) else USAGE_ERROR
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    wait_asleep()
    command = _import(argv[0])
    try:
        return int(command.main(argv[1:]))
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        status = _status(error)
        if status is None:
            raise
        return _fail(error, status)
    except KeyboardInterrupt as interrupt:
        return _interrupted(str(interrupt))


def _import(command: str) -> ModuleType:
    """Imports a command only when it is needed, because torch and diffusers take seconds."""
    with _leaving_at_once():
        return importlib.import_module(f"dp_curriculum.commands.{command}")


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """
    Ends the process at a Ctrl-C while libraries are imported: nothing has begun, and an exception there would be
    reported as a library that is broken.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nStopping: nothing has begun.\n")
            say_last("dp-curriculum: stopped before anything began.", stream=sys.stderr)
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _status(error: Exception) -> int | None:
    """The exit status that stands for an error; `None` for one that no command expects."""
    from dp_curriculum.privacy.accounting import PrivacyBudgetExceeded
    from dp_curriculum.privacy.ledger import LedgerLockedError, LedgerTamperedError

    if isinstance(error, (PrivacyBudgetExceeded, LedgerLockedError, LedgerTamperedError)):
        return BUDGET_ERROR
    if isinstance(error, ValueError):
        return USAGE_ERROR
    return STORAGE_ERROR if isinstance(error, (OSError, MemoryError)) else None


def _interrupted(what: str) -> int:
    if os.environ.get("RANK", "0") == "0":
        say_last(f"dp-curriculum: {what or 'interrupted'}", stream=sys.stderr)
    return INTERRUPTED


def _fail(error: BaseException | str, status: int) -> int:
    print(f"dp-curriculum: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
