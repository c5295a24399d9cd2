"""`dp-curriculum verify`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dp_curriculum.published import check_folder, check_report, check_repository, read_report
from dp_curriculum.verification import Check


def main(args: Sequence[str]) -> int:
    """Computes epsilon again from the published mechanisms, and compares. Exit status 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(prog="dp-curriculum verify", description=main.__doc__)
    parser.add_argument(
        "model", help="Folder of a run or a copy of a repository, a privacy.json, a card, or a Hub id."
    )
    parser.add_argument("--repo_type", choices=("model", "dataset"), default="model", help="Kind of a Hub id.")
    parser.add_argument("--revision", help="Commit, branch or tag of a Hub id; main if unset.")
    given = parser.parse_args(args)
    path = Path(given.model)
    if path.is_dir():
        checks = check_folder(path)
    elif path.exists() or path.suffix in (".json", ".md"):
        checks = _check_file(path)
    else:
        checks = check_repository(given.model, repo_type=given.repo_type, revision=given.revision)
    print(_table(checks))
    return 0 if all(check.holds for check in checks) else 1


def _check_file(path: Path) -> list[Check]:
    if path.suffix == ".md":
        return check_report(read_report({"README.md": path}))
    try:
        return check_report(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected {path} to be a readable privacy report: {type(error).__name__}.") from None


def _table(checks: Sequence[Check]) -> str:
    """One row a check; control characters of what others wrote do not reach the terminal."""
    rows = [("", "claim", "claimed", "computed")]
    for check in checks:
        verdict = "holds" if check.holds else "FAILS"
        cells = (_printable(cell) for cell in (check.name, check.claimed, check.computed))
        rows.append((verdict, *cells))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    failed = sum(not check.holds for check in checks)
    return "\n".join([*lines, "all claims hold" if not failed else f"{failed} of {len(checks)} claims do not hold"])


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
