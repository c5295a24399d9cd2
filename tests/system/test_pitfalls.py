"""The table of pitfalls in the documentation: each with a test that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.ledger import PrivacyLedger, PrivacyReport


HERE = Path(__file__).parents[1]
PAGE = HERE.parent / "docs" / "privacy.md"


def test_each_pitfall_names_a_test_that_exists() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\| `([\w/]+)::(\w+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 58
    for _, file, name in rows:
        tree = ast.parse((HERE / f"{file}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_the_report_says_that_it_is_of_one_run_and_without_tuning(tmp_path: Path) -> None:
    with PrivacyLedger.open(tmp_path / "ledger.jsonl") as ledger:
        ledger.reserve(GaussianEvent(5.0), stage="easy", clip_norm=1.0)
        fields = PrivacyReport.from_ledger(ledger, target_delta=1e-5).to_dict()
    assert fields["data_accesses"].startswith("one training run")
    assert fields["hyperparameter_tuning"]["covered"] is False
