"""`dp-curriculum verify`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dp_curriculum.verification import Check, verify_report


def main(args: Sequence[str]) -> int:
    """Computes epsilon again from the published mechanisms, and compares. Exit status 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(prog="dp-curriculum verify", description=main.__doc__)
    parser.add_argument("model", help="Folder of a run, or a privacy.json.")
    path = Path(parser.parse_args(args).model)
    path = path / "privacy.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected {path} to be a readable privacy report: {type(error).__name__}.") from None
    checks = verify_report(report)
    print("\n".join(_format(check) for check in checks))
    return 0 if all(check.holds for check in checks) else 1


def _format(check: Check) -> str:
    verdict = "holds" if check.holds else "FAILS"
    return f"{verdict}  {check.name}: claimed {check.claimed}, computed {check.computed}"
