"""The documentation says what the program does. `python tests/system/test_docs.py` rewrites the table of options."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from dp_curriculum.cli import COMMANDS, main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.lessons.table import LESSONS


ROOT = Path(__file__).parents[2]
CLI = ROOT / "docs" / "cli.md"
START = "<!-- options: rewritten by `python tests/system/test_docs.py` -->\n"
END = "<!-- end of options -->\n"
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])


def option_tables() -> str:
    """One table a section of the configuration: option, default, meaning."""
    lines = []
    for name, section in CurriculumConfig.sections().items():
        lines += [f"### `{name}`", "", (section.__doc__ or "").strip(), "", "| option | default | meaning |"]
        lines.append("|---|---|---|")
        for field in dataclasses.fields(section):
            value = getattr(section(), field.name)
            default = " ".join(map(str, value)) if isinstance(value, list) else value
            shown = (
                "" if default in (None, "") else f"`{default:.4g}`" if isinstance(default, float) else f"`{default}`"
            )
            lines.append(f"| `--{field.name}` | {shown} | {field.metadata['help']} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def test_every_option_is_documented_with_its_default() -> None:
    text = CLI.read_text(encoding="utf-8")
    assert text[text.index(START) + len(START) : text.index(END)] == option_tables()


def test_every_command_is_documented() -> None:
    text = CLI.read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"| `{command}` |" in text and f"\n## {command}\n" in text, command


def test_every_lesson_is_documented() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for lesson in LESSONS:
        assert re.search(rf"^### `{lesson}`", text, re.MULTILINE), lesson


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith(("http://", "https://", "mailto:")) or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "examples/next_steps.txt"])
def test_the_plan_that_a_new_user_types_says_what_was_understood(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"dp-curriculum plan +(.*)", (ROOT / page).read_text(encoding="utf-8"))
    assert main(["plan", *command.split(), "--no_estimate"]) == 0
    said = capsys.readouterr().out
    assert "colour" in said and "cat, dog" in said and "18,000 images to train on" in said


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_configurations_that_a_page_names_exist(page: Path) -> None:
    for target in re.findall(r"examples/[\w./-]+\.(?:yaml|py)", page.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


if __name__ == "__main__":
    page = CLI.read_text(encoding="utf-8")
    start, end = page.index(START) + len(START), page.index(END)
    CLI.write_text(page[:start] + option_tables() + page[end:], encoding="utf-8")
