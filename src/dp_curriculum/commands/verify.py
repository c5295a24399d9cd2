"""`dp-curriculum verify`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dp_curriculum.privacy.verification import Check
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.sharing.published import check_card_file, check_folder, check_report, check_repository, read_report


NOT_CHECKED = 3  # exit status where nothing fails, and not everything could be checked


def main(args: Sequence[str]) -> int:
    """
    Recomputes epsilon from the published mechanisms, and compares it with the claim. Exit status: 0 if all claims
    hold, 1 if one does not, 3 if none fails but some could not be checked.
    """
    parser = argparse.ArgumentParser(prog="dp-curriculum verify", description=main.__doc__)
    parser.add_argument(
        "model", help="Folder of a run or of a copied repository, a privacy.json, a card, or a Hub id."
    )
    parser.add_argument(
        "--repo_type", choices=("model", "dataset"), default="model", help="Type of the Hub repository."
    )
    parser.add_argument("--revision", help="Commit, branch or tag of the Hub repository. Defaults to main.")
    parser.add_argument(
        "--local_run",
        action="store_true",
        help="The folder is your own run: other files may lie in it, and its ledger is checked too.",
    )
    given = parser.parse_args(args)
    path = Path(given.model)
    if given.local_run and not path.is_dir():
        raise ValueError(f"Expected --local_run to come with the folder of a run: {given.model} is none.")
    if path.is_dir():
        checks = check_folder(path, local_run=given.local_run)
    elif path.exists() or path.suffix in (".json", ".md"):
        checks = _check_file(path)
    else:
        checks = check_repository(given.model, repo_type=given.repo_type, revision=given.revision)
    print(_table(checks))
    if path.is_dir() and RunFolder(path).holds_run and not given.local_run:
        print(f"{given.model} also holds the files of a run: if it is your own run, add --local_run.")
    if any(check.fails for check in checks):
        return 1
    return 0 if all(check.holds for check in checks) else NOT_CHECKED


def _check_file(path: Path) -> list[Check]:
    if path.suffix == ".md":
        return check_card_file(path)
    report = read_report({"privacy.json": path})
    return [report] if isinstance(report, Check) else check_report(report)


def _table(checks: Sequence[Check]) -> str:
    """One row per check. Control characters that others wrote do not reach the terminal."""
    rows = [("", "claim", "claimed", "computed")]
    for check in checks:
        cells = (_printable(cell) for cell in (check.name, check.claimed, check.computed))
        rows.append((check.verdict, *cells))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, _summary(checks)])


def _summary(checks: Sequence[Check]) -> str:
    failed, unchecked = sum(check.fails for check in checks), sum(not check.checked for check in checks)
    left = f", {unchecked} {'was' if unchecked == 1 else 'were'} not checked" if unchecked else ""
    if failed:
        return f"{failed} of {len(checks)} claims do not hold{left}"
    return f"{len(checks) - unchecked} claims hold{left}" if unchecked else "all claims hold"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
