"""The documentation and the code say things in plain English; CONTRIBUTING.md has the rules.

A rule is a pattern that has a plain alternative in every case. Each has a sentence that it must find and one that it
must leave alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dp_curriculum"
PAGES = sorted(
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
    if path.name != "experiments.md"  # a record of what was measured, in the words of its time
)
# Rooms whose docstrings are not held to the rules yet.
UNFINISHED_ROOMS = ("dp_sgd",)
# Its bytes are compared with those of releases, so its words cannot change.
FROZEN_FILES = ("pipeline_dp_curriculum.py",)
# Where the words of a rule are right: the file, a part of the text, and why.
ALLOWED: dict[tuple[str, str], str] = {}

_COUNTED = "bytes|classes|columns|copies|draws|folders|images|lines|pixels|rows|seconds|steps|trials|values|once|one"
_UNITS = (
    "batch|block|checkpoint|class|column|draw|field|file|folder|image|lesson|line|mechanism|message|module|parameter|"
    "person|process|query|release|row|run|second|section|side|stage|step|world"
)


@dataclass(frozen=True)
class Rule:
    """
    One rule.

    Args:
        pattern (`str`): What must not occur, at the head of a docstring if `head_only` is set.
        instead (`str`): What to write.
        found (`str`): A text that it must find.
        left (`str`): A text like it that it must leave alone.
    """

    pattern: str
    instead: str
    found: str
    left: str
    head_only: bool = False

    def find(self, text: str) -> str | None:
        """The words that break the rule, if any."""
        search = re.match if self.head_only else re.search
        match = search(self.pattern, text, 0 if self.head_only else re.IGNORECASE)
        return None if match is None else match.group(0)


RULES = {
    "per": Rule(
        rf"\b({_COUNTED}) an? ({_UNITS})\b",
        "'per': 'images per step'",
        "64 images a step.",
        "`factors` times a class sum, per step.",
    ),
    "head": Rule(
        r"(Of|What|Where|Whether|Why|How|With|To)\b",
        "a noun or a verb at the head of a docstring",
        "Of the privacy-loss grid.",
        "Spacing of the privacy-loss grid, of which any is valid.",
        head_only=True,
    ),
    "mend": Rule(r"\bmend(s|ed|ing)?\b", "'fix', 'repair' or 'remove'", "Mends the file.", "A commendable amendment."),
    "go on": Rule(
        r"\b(go|goes|going|gone|went) on (with|from|for|after)\b",
        "'continue' or 'resume'",
        "The run is gone on with.",
        "Numbers go on the card.",
    ),
    "let go of": Rule(r"\b(let|lets|letting) go of\b", "'release'", "Lets go of its lock.", "Let it go."),
    "all the same": Rule(r"\ball the same\b(?! \w)", "'anyway'", "It is shared all the same.", "all the same size"),
    "nobody": Rule(r"\bnobody\b", "'no one else', or who does not", "Heard by nobody.", "Its body is empty."),
    "alike": Rule(r"(?<!look-)\balike\b", "'equal', 'the same' or 'both'", "Both alike.", "A look-alike letter."),
    "whence": Rule(r"\bwhence\b", "'from which' or 'where ... from'", "Says whence it is.", "Hence it is."),
    "good order": Rule(r"\bin good order\b", "'normally'", "It ends in good order.", "They are in order."),
    "wished for": Rule(r"\bwished for\b", "'the target is'", "90 % is wished for.", "As you wish."),
    "tell": Rule(
        r"\b(which|that|it|run|page|report|message|card|command) (tells|told)\b(?! (people|apart))",
        "'says', 'shows' or 'reports'",
        "This page tells how to push a model.",
        "A card that tells people to run code, and what is told apart.",
    ),
    "own": Rule(
        r"\b(process|processes|noise|folders|request|check|one|bar|generator) of (its|their) own\b",
        "'its own' before the noun, or 'separate'",
        "Decoded in processes of their own.",
        "Each has its own process.",
    ),
}
HEADS = {name: rule for name, rule in RULES.items() if rule.head_only}
WORDS = {name: rule for name, rule in RULES.items() if not rule.head_only}


def prose(page: Path) -> str:
    """The text of a page without its code, in one line: a phrase may be broken over two."""
    text = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(text.split())


def documented(file: Path) -> Iterator[tuple[int, str]]:
    """Docstrings of a file, each with its line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, " ".join(text.split())


def help_strings(file: Path) -> Iterator[tuple[int, str]]:
    """Help of the options that a file defines, each with its line: `help=` or the second argument of `_option`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            texts = [word.value for word in node.keywords if word.arg == "help"]
            if isinstance(node.func, ast.Name) and node.func.id == "_option":
                texts += node.args[1:2]
            for text in texts:
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    yield text.lineno, text.value


def sources() -> list[Path]:
    """Files whose words are held to the rules."""
    files = sorted(SOURCE.rglob("*.py"))
    rooms = [SOURCE / room for room in UNFINISHED_ROOMS]
    return [file for file in files if file.name not in FROZEN_FILES and not set(rooms) & set(file.parents)]


def broken(name: str, text: str, rules: dict[str, Rule]) -> list[str]:
    """One line for each rule that a text breaks."""
    lines = []
    for rule in rules.values():
        words = rule.find(text)
        if words is not None and not any(file == name.partition(":")[0] and part in text for file, part in ALLOWED):
            lines.append(f"{name}: {words!r} in {text[:100]!r}; write {rule.instead}")
    return lines


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_finds_what_it_is_for_and_leaves_the_rest(rule: Rule) -> None:
    assert rule.find(rule.found) is not None
    assert rule.find(rule.left) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_is_in_plain_english(page: Path) -> None:
    text = prose(page)
    found = [f"{rule.find(text)!r}: write {rule.instead}" for rule in WORDS.values() if rule.find(text) is not None]
    assert not found, found


def test_docstrings_are_in_plain_english() -> None:
    found: list[str] = []
    for file in sources():
        for line, text in documented(file):
            found += broken(f"{file.relative_to(SOURCE).as_posix()}:{line}", text, RULES)
    assert not found, "\n".join(found)


def test_help_is_in_plain_english() -> None:
    found: list[str] = []
    seen = 0
    for file in sources():
        for line, text in help_strings(file):
            seen += 1
            found += broken(f"{file.relative_to(SOURCE).as_posix()}:{line}", text, WORDS)
    assert seen > 80 and not found, "\n".join(found)


def test_an_instance_in_a_file_is_found(tmp_path: Path) -> None:
    """The negative control of the readers: what they must see, in each place where it may stand."""
    file = tmp_path / "seeded.py"
    file.write_text(
        '"""Whether it is."""\n\n\ndef f():\n    """Adds\n    64 images a\n    step."""\n', encoding="utf-8"
    )
    found = [line for number, text in documented(file) for line in broken(f"seeded.py:{number}", text, RULES)]
    assert len(found) == 2 and "'Whether'" in found[0] and "'images a step'" in found[1]
    file.write_text('x = _option(1, "Images a step.")\np.add_argument("--y", help="Both alike.")\n', encoding="utf-8")
    found = [line for number, text in help_strings(file) for line in broken(f"seeded.py:{number}", text, WORDS)]
    assert len(found) == 2 and "'Images a step'" in found[0] and "'alike'" in found[1]
    page = tmp_path / "page.md"
    page.write_text("It ends in good\norder.\n\n```\nimages a step\n```\n", encoding="utf-8")
    assert RULES["good order"].find(prose(page)) is not None and RULES["per"].find(prose(page)) is None
