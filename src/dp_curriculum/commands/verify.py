"""`dp-curriculum verify`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dp_curriculum.hub import fetch_published
from dp_curriculum.published import READ, check_dataset, check_model, check_report, read_report
from dp_curriculum.run_folder import RunFolder
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
        checks = _check_folder(path)
    elif path.exists() or path.suffix in (".json", ".md"):
        checks = _check_file(path)
    else:
        checks = _check_repository(given.model, given.repo_type, given.revision)
    print(_table(checks))
    return 0 if all(check.holds for check in checks) else 1


def _check_folder(folder: Path) -> list[Check]:
    files = {name: folder / name for name in READ if (folder / name).is_file()}
    if "model_index.json" not in files and (folder / "data").is_dir():
        return check_dataset(files)
    is_run = RunFolder(folder).holds_run
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    # What huggingface_hub writes beside a download is not of the repository.
    shared = [name for name in names if not name.startswith((".cache/", ".git/"))]
    return check_model(files, all_names=None if is_run else shared)


def _check_file(path: Path) -> list[Check]:
    if path.suffix == ".md":
        return check_report(read_report({"README.md": path}))
    try:
        return check_report(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected {path} to be a readable privacy report: {type(error).__name__}.") from None


def _check_repository(repo_id: str, repo_type: str, revision: str | None) -> list[Check]:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"Expected {repo_id} to be a folder, a file or a Hub id: there is no such thing.") from None
    names = READ if repo_type == "model" else ("README.md", "privacy.json")
    files, listed = fetch_published(repo_id, names, repo_type=repo_type, revision=revision)
    return check_model(files, all_names=listed) if repo_type == "model" else check_dataset(files)


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
