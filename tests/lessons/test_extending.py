"""The worked example of docs/extending.md: what the page says, runs, is charged, and passes the audits."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from planning import planned_lesson

from dp_curriculum.audit.lesson_replay import audit_lesson
from dp_curriculum.data import digits_dataset
from dp_curriculum.lessons import table as lessons
from dp_curriculum.training.curriculum import run_curriculum


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"


def read_page() -> tuple[str, str, str]:
    """The page's file, and the two lines that go into the table's file: the import and the entry."""
    file, lines = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    import_line, entry = lines.strip().split("\n\n")
    return file, import_line, entry


def read_example(changed: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """The names of the page's file, after one change of its text."""
    file = read_page()[0]
    assert changed[0] in file
    names: dict[str, Any] = {}
    exec(compile(file.replace(*changed) if changed[0] else file, str(PAGE), "exec"), names)  # noqa: S102 - our own page
    return names


@pytest.mark.parametrize("first", ["cli", "lessons.overall_mean"])
def test_the_example_works_in_a_copy_of_the_package(first: str, tmp_path: Path) -> None:
    """As the page says, literally, whichever module a new interpreter imports first."""
    package = tmp_path / "dp_curriculum"
    shutil.copytree(ROOT / "src" / "dp_curriculum", package, ignore=shutil.ignore_patterns("__pycache__"))
    file, import_line, entry = read_page()
    (package / "lessons" / "overall_mean.py").write_text(file, encoding="utf-8")
    table = package / "lessons" / "table.py"
    text = table.read_text(encoding="utf-8")
    last_import = text.rindex("\nfrom dp_curriculum.") + 1
    table.write_text(f"{text[:last_import]}{import_line}\n{text[last_import:]}\n{entry}\n", encoding="utf-8")
    arguments = ["plan", "--stages", "overall_mean", "dp_sgd", "--no_estimate"]
    code = f"import dp_curriculum.{first}, dp_curriculum.cli; raise SystemExit(dp_curriculum.cli.main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "overall-mean" in done.stdout


def test_the_example_trains_and_is_charged(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lessons.LESSONS, "overall_mean", read_example()["OVERALL_MEAN"])
    config = make_config(stages=["overall_mean", "mean", "dp_sgd"], num_inference_steps=2, sample_steps=0)
    result = run_curriculum(config, digits_dataset().select(range(60)), output_dir=tmp_path / "out")
    names = [row["name"] for row in result.report.fields["mechanisms"]]
    assert names == ["overall-mean", "central-images-mean", "dp-sgd"] and result.report.epsilon <= 10


HALF_THE_NOISE = "PlannedMechanism('overall-mean', mechanisms[0].clip_norm, GaussianEvent(10.0))"


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        (("", ""), []),
        (("mechanism=mechanisms[0]", f"mechanism={HALF_THE_NOISE}"), ["charged"]),
        (("torch.tensor([private.num_classes])", "torch.tensor([len(private)])"), ["is equal"]),
        (("lambda pixels, _: F", "lambda pixels, _: len(private) * F"), ["moves the sums"]),
    ],
)
def test_the_audit_passes_the_example_and_fails_its_broken_twins(
    changed: tuple[str, str], fails: list[str], make_config: Any
) -> None:
    lesson = read_example(changed)["OVERALL_MEAN"]
    planned = planned_lesson(lesson, make_config())
    findings = audit_lesson("twin", planned, make_config(), num_classes=3, dataset_size=20)
    failed = [finding.claim for finding in findings if not finding.holds]
    assert len(failed) >= len(fails) and all(any(part in claim for claim in failed) for part in fails)
    assert bool(failed) == bool(fails)
