"""Runs on neighbours leave the same but for noise; what a run tells of its images, in any file or line, is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dp_curriculum.audit import whole_run
from dp_curriculum.audit.whole_run import audit_whole_run
from dp_curriculum.training import curriculum
from dp_curriculum.training.run import Run


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"stages": ["moments", "dp_sgd"], "moment_components": 2}])
def test_a_run_passes(fields: dict[str, Any], make_config: Any) -> None:
    finding = audit_whole_run(make_config(**fields))
    assert finding.holds, finding.measured
    assert int(finding.power.split()[0]) > 20  # files and logs


def test_each_trace_of_the_images_is_found(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log line, a file name, a file and a number in a table."""
    finish = curriculum._finish

    def leak(run: Run) -> Any:
        present = sorted(set(run.private.labels.tolist()))
        curriculum.logger.info(f"classes {present}")
        (run.folder.root / f"classes-{len(present)}.txt").touch()
        (run.folder.root / "counts.json").write_text(str(present))
        result = finish(run)
        card = run.folder.root / "README.md"
        card.write_text(card.read_text() + f"| images | {len(run.private)} |")
        return result

    monkeypatch.setattr(curriculum, "_finish", leak)
    compared = {}
    traces = whole_run._traces

    def keep(config: Any, labels: list[int], folder: Path) -> dict[str, Any]:
        compared[len(labels), len(set(labels))] = traces(config, labels, folder)
        return compared[len(labels), len(set(labels))]

    monkeypatch.setattr(whole_run, "_traces", keep)
    finding = audit_whole_run(make_config(stages=["mean"]))
    assert not finding.holds
    first, one_class = compared[12, 2], compared[11, 1]
    different = {name for name in first.keys() | one_class.keys() if first.get(name) != one_class.get(name)}
    assert different == {"log lines", "classes-2.txt", "classes-1.txt", "counts.json", "README.md"}
    assert {name for name in first if first[name] != compared[11, 2].get(name)} == {"README.md"}


def test_hashes_of_noised_weights_are_noise_and_any_other_hash_is_not(tmp_path: Path) -> None:
    card, digest = tmp_path / "card.md", "ab" * 32
    card.write_text(f"weights {digest}, data {'cd' * 32}")
    assert whole_run._form(card, {digest: "w.safetensors"}) == f"weights sha256 of w.safetensors, data {'cd' * 32}"
