"""Report of an audit, as Markdown for people and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dp_curriculum.audit.findings import Finding, all_hold
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.runtime.checkpointing import save_text
from dp_curriculum.training.plan import BudgetPlan


SCHEMA_VERSION = "1.0"
_LIMITS = (
    "An audit looks for faults; it proves nothing. It ran the code of this version with a network of some ten "
    "thousand weights on made-up images, on one processor: not your images, not your weights, not your machine. It "
    "does not look at side channels, at arithmetic other than this machine's, or at what is done with a model later. "
    "Canary figures are lower bounds on what an adversary can learn, the reported epsilon is the upper one."
)


def report_fields(
    config: CurriculumConfig, plan: BudgetPlan, findings: Sequence[Finding], *, size: str, seconds: float
) -> dict[str, Any]:
    """The report as JSON types. It holds public constants and what was found."""
    return {
        "schema_version": SCHEMA_VERSION,
        "package": "dp_curriculum",
        "version": metadata.version("dp_curriculum"),
        "size": size,
        "seconds": round(seconds),
        "holds": all_hold(findings),
        "mechanisms": [
            {
                "name": mechanism.name,
                "sample_rate": mechanism.event.sample_rate,
                "noise_multiplier": mechanism.event.noise_multiplier,
                "clip_norm": mechanism.clip_norm,
                "num_steps": mechanism.event.num_steps,
            }
            for mechanism in plan.mechanisms
        ],
        "unit": config.data.unit,
        "noise_multiplicity": config.dp_sgd.noise_multiplicity,
        "secret_randomness": config.runtime.secret_randomness,
        "findings": [finding.to_dict() for finding in findings],
        "limits": _LIMITS,
    }


def write_report(fields: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes `audit.md` and `audit.json` into `folder`, and returns their paths."""
    paths = folder / "audit.md", folder / "audit.json"
    save_text(paths[0], to_markdown(fields))
    save_text(paths[1], json.dumps(fields, indent=1) + "\n")
    return paths


def to_markdown(fields: dict[str, Any]) -> str:
    """One page: the verdict, what was audited, each claim with what was measured, and what it does not show."""
    findings = fields["findings"]
    kept = sum(finding["holds"] for finding in findings)
    verdict = "All claims hold." if fields["holds"] else f"**{len(findings) - kept} CLAIMS DO NOT HOLD.**"
    mechanisms = "\n".join(
        f"| {row['name']} | {row['sample_rate']:.6g} | {row['noise_multiplier']:.5g} | {row['clip_norm']:.5g} "
        f"| {row['num_steps']} |"
        for row in fields["mechanisms"]
    )
    claims = "\n".join(
        f"| {'holds' if finding['holds'] else '**FAILS**'} | {finding['claim']} | {finding['measured']} "
        f"| {finding['allowed']} | {finding['power']} |"
        for finding in findings
    )
    return f"""# Privacy audit

{verdict} {kept} of {len(findings)} claims, {fields["size"]} audit, {fields["package"]} {fields["version"]}, \
{fields["seconds"]} seconds, secret randomness `{fields["secret_randomness"]}`, \
noise multiplicity {fields["noise_multiplicity"]}.

| mechanism | sample rate | noise multiplier | bound | steps |
| --- | --- | --- | --- | --- |
{mechanisms}

| | claim | measured | allowed | looked at |
| --- | --- | --- | --- | --- |
{claims}

{fields["limits"]}
"""
