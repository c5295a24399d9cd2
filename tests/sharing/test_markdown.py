"""Names and sentences of others show as they are, whatever is in them. What shows is asked of a Markdown renderer."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dp_curriculum.sharing.markdown import escape, name_text, printable


RENDERER = MarkdownIt("gfm-like", {"linkify": False, "html": True})
LINE, TABLE = "The classes are {} and no other.", "| a | b |\n|---|---|\n| {} | c |"
PLAIN = re.compile(r"</?(?:p|code|table|thead|tbody|tr|th|td)>")
ELEMENT = re.compile(r"<[^>]*>")
TRICKY = [
    "<!--", "--> <b>x</b>", "<script>", "&lt;b&gt;", "**bold**", "_x_", "~~x~~", "`x`", "``", "a`", "`a", "[a](b)",
    "![a](b)", "a|b", "a\\|b", "\\", "\\`", "a\n\n# h", "a\r| b |", "\u2028# h", "a\u202eb", "\u200b", "$x$", "@me",
    "www.evil.example", "https://evil.example", "a  b", "#", "Ankle boot", "0.1",
]  # fmt: skip


def shown(text: str) -> str:
    """What a reader sees of it, with a mark for each element that is no paragraph, table or code."""
    rendered = ELEMENT.sub("\N{REPLACEMENT CHARACTER}", PLAIN.sub("", RENDERER.render(text)))
    return re.sub(r"\s+", " ", html.unescape(rendered)).strip()


def shows_as_it_is(text: str) -> None:
    """As a name and as a sentence, inside a line and in a cell of a table."""
    wanted = re.sub(r"\s+", " ", printable(text)).strip()
    for written in (name_text(text), escape(text)):
        assert shown(LINE.format(written)) == re.sub(r"\s+", " ", f"The classes are {wanted} and no other.")
    for written in (name_text(text, in_table=True), escape(text)):
        rendered = RENDERER.render(TABLE.format(written))
        assert rendered.count("<td>") == 2 and rendered.count("<tr>") == 2
        assert shown(TABLE.format(written)) == re.sub(r"\s+", " ", f"a b {wanted} c")


@pytest.mark.parametrize("text", TRICKY)
def test_what_has_a_meaning_in_markdown_shows_as_it_is(text: str) -> None:
    shows_as_it_is(text)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="`*_[]()<>|#~$&@\\!:/.-+= \n\r\t\u200baZ1", min_size=1, max_size=12))
def test_any_text_shows_as_it_is(text: str) -> None:
    if text.strip():
        shows_as_it_is(text)


@pytest.mark.parametrize("text", ["- a", "+ a", "1. a", "1) a", "=", "---", "# a", "> a", "```", "    a", "| a |"])
def test_a_sentence_opens_no_block(text: str) -> None:
    assert shown(f"First.\n\n{escape(text, opens=True)}\n\nLast.") == f"First. {text.strip()} Last."


@pytest.mark.parametrize("text", ["<b>x</b>", "[a](b)", "a|b", "**a**"])
def test_the_renderer_notices_what_is_not_escaped(text: str) -> None:
    """Negative control."""
    assert shown(TABLE.format(text)) != f"a b {text} c"


def test_plain_names_stand_without_quotes() -> None:
    for name in ("0", "cat", "fünf", "猫", "T-shirt/top", "org/digits-2.0", "a_b"):
        assert name_text(name) == name == escape(name)
    assert name_text("Ankle boot") == "`Ankle boot`" and name_text("a" * 61).startswith("`")
