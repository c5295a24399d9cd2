"""What was found, on one page for people and as JSON for programs; the command that writes it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_curriculum.audit import FULL, QUICK, AuditSize, run_audit
from dp_curriculum.audit.findings import Finding
from dp_curriculum.audit.report import report_fields, to_markdown, write_report
from dp_curriculum.cli import main
from dp_curriculum.commands import audit as command
from dp_curriculum.training.plan import plan_budget


DEMO = Path(__file__).parents[2] / "examples" / "configs" / "digits-demo.yaml"
GOOD = Finding("noise is right", True, "1.00", "1", "n = 5")
BAD = Finding("masks are right", False, "2.00", "1", "n = 6")


def fields(make_config: Any, *findings: Finding) -> dict[str, Any]:
    config = make_config()
    plan = plan_budget(config, dataset_size=100, num_classes=10)
    return report_fields(config, plan, findings, size="quick", seconds=12.4)


def test_both_forms_say_the_same(make_config: Any, tmp_path: Path) -> None:
    markdown, data = write_report(fields(make_config, GOOD, BAD), tmp_path / "new" / "folder")
    report = json.loads(data.read_text())
    assert markdown.read_text() == to_markdown(report)
    assert report["holds"] is False and report["seconds"] == 12
    assert [row["name"] for row in report["mechanisms"]] == ["central-images-mean", "dp-sgd"]
    assert [finding["holds"] for finding in report["findings"]] == [True, False]


def test_a_page_begins_with_the_verdict_and_ends_with_the_limits(make_config: Any) -> None:
    page = to_markdown(fields(make_config, GOOD, BAD))
    assert "**1 CLAIMS DO NOT HOLD.** 1 of 2 claims" in page and "| **FAILS** | masks are right | 2.00 | 1 |" in page
    assert "All claims hold. 1 of 1 claims" in to_markdown(fields(make_config, GOOD))
    assert page.rstrip().endswith("the reported epsilon is the upper one.")
    assert not fields(make_config)["holds"]  # nothing looked at, nothing shown


def test_the_command_fails_where_a_claim_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []

    def found(config: Any, plan: Any, size: AuditSize) -> Any:
        sizes.append(size)
        yield from (GOOD, BAD)

    monkeypatch.setattr(command, "run_audit", found)
    threads = torch.get_num_threads()
    for flags in ([], ["--full"]):
        assert main(["audit", "--config", str(DEMO), "--output_dir", str(tmp_path), *flags]) == 1
    assert sizes == [QUICK, FULL] and torch.get_num_threads() == threads
    output = capsys.readouterr().out
    assert "1 of 2 claims hold" in output and "FAILS  masks are right: 2.00 (allowed: 1)" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--non_private", "True"], "Refusing to audit --non_private"),
        (["--quick"], "--quick was removed: a quick audit is the default"),
        (["--target_epsilon", "0"], "--target_epsilon=0.0 in"),
    ],
)
def test_what_cannot_be_audited_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["audit", "--config", str(DEMO), "--output_dir", str(tmp_path / "new"), *arguments])
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_every_lesson_of_a_configuration_is_audited(make_config: Any) -> None:
    """Tiny samples: that each part is there, and holds."""
    config = make_config(stages=["mode", "moments"], public_dataset_size=50)
    plan = plan_budget(config, dataset_size=50, num_classes=3)
    findings = list(run_audit(config, plan, AuditSize(10_000, 10_000, 100, 20, 20)))
    assert [finding.claim for finding in findings if not finding.holds] == []
    for name, count in (("Lesson mode", 10), ("Lesson moments", 11)):  # moments have a canary, too
        assert sum(finding.claim.startswith(name) for finding in findings) == count
    assert not any("DP-SGD" in finding.claim for finding in findings)


@pytest.mark.slow
def test_the_quick_audit_of_the_demo_holds_in_minutes(tmp_path: Path) -> None:
    started = time.process_time()
    assert main(["audit", "--config", str(DEMO), "--output_dir", str(tmp_path)]) == 0
    assert time.process_time() - started < 300
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["holds"] and len(report["findings"]) == 34 and report["size"] == "quick"
    assert len((tmp_path / "audit.md").read_text().splitlines()) < 60
    subjects = {finding["claim"].split(":")[0] for finding in report["findings"]}
    assert {"Lesson moments", "DP-SGD", "Masks"} < subjects
