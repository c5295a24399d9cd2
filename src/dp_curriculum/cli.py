"""The `dp-curriculum` command: finds the command, runs it, and turns errors into one line and an exit status."""

from __future__ import annotations

import importlib
import io
import logging
import sys
from collections.abc import Sequence

from dp_curriculum.privacy.accounting import PrivacyBudgetExceeded
from dp_curriculum.privacy.ledger import LedgerLockedError, LedgerTamperedError
from dp_curriculum.runtime.cores import wait_asleep


COMMANDS = {
    "plan": "show budget, noise, steps, time and memory before any data is read",
    "inspect": "show which of your images contribute, and why others do not; for the owner only",
    "train": "train from easy to hard, and write pipeline, report and card",
    "sample": "generate images",
    "synthesize": "write a labelled dataset of generated images, and share it",
    "evaluate": "measure how useful and how faithful the images are",
    "audit": "try to break the guarantee of a configuration, on a tiny network",
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
    if not argv or argv[0] not in COMMANDS:
        print("usage: dp-curriculum COMMAND ...    (dp-curriculum COMMAND --help shows its options)\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<10} {purpose}")
        return 0 if argv[:1] in ([], ["--help"], ["-h"]) else USAGE_ERROR
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    wait_asleep()
    try:
        # Imported only when needed, because torch and diffusers take seconds.
        return importlib.import_module(f"dp_curriculum.commands.{argv[0]}").main(argv[1:])
    except (PrivacyBudgetExceeded, LedgerLockedError, LedgerTamperedError) as error:
        return _fail(error, BUDGET_ERROR)
    except ValueError as error:
        return _fail(error, USAGE_ERROR)
    except (OSError, MemoryError) as error:
        return _fail(error, STORAGE_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def _fail(error: BaseException | str, status: int) -> int:
    print(f"dp-curriculum: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
