"""`dp-curriculum audit`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dp_curriculum.audit import FULL, QUICK, run_audit
from dp_curriculum.audit.findings import Finding, all_hold, failed
from dp_curriculum.audit.report import report_fields, write_report
from dp_curriculum.commands.arguments import config_parser, parse_config
from dp_curriculum.commands.plan import public_shape, settled_autoencoder
from dp_curriculum.training.plan import plan_budget


def main(args: Sequence[str]) -> int:
    """Tries to break the guarantee of a configuration, on a tiny network. It reads no data and spends nothing."""
    parser = config_parser("audit", main.__doc__)
    parser.add_argument("--output_dir", required=True, help="Folder for audit.md and audit.json.")
    parser.add_argument(
        "--full",
        action="store_true",
        help="Run many more trials, which find smaller faults. Takes ten minutes instead of two.",
    )
    given, config = parse_config(parser, args)
    if config.privacy.non_private:
        raise ValueError("Refusing to audit --non_private: without noise there is no guarantee. Leave the option out.")
    config, _ = settled_autoencoder(config, has_weights=True)  # it encodes the images of whole runs
    dataset_size, num_classes = public_shape(config)
    plan = plan_budget(config, dataset_size=dataset_size, num_classes=num_classes)
    started, findings = time.monotonic(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings
    try:
        for finding in run_audit(config, plan, FULL if given.full else QUICK):
            findings.append(finding)
            tqdm.write(_format(finding))
    finally:
        torch.set_num_threads(threads)
    fields = report_fields(
        config, plan, findings, size="full" if given.full else "quick", seconds=time.monotonic() - started
    )
    paths = write_report(fields, Path(given.output_dir))
    print(f"{len(findings) - len(failed(findings))} of {len(findings)} claims hold; report: {paths[0]}, {paths[1]}")
    return 0 if all_hold(findings) else 1


def _format(finding: Finding) -> str:
    return f"{'holds' if finding.holds else 'FAILS'}  {finding.claim}: {finding.measured} (allowed: {finding.allowed})"
