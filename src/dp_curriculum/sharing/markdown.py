"""Text that others chose, such as names of classes and datasets, as Markdown that shows it and nothing else."""

from __future__ import annotations

import re


_PLAIN_NAME = re.compile(r"(?!www\.)[^\W_]+(?:[-_./][^\W_]+)*")
_MAX_PLAIN = 60  # characters of a name that stands without quotes
# Characters that mean something inside a line; an underscore inside a word does not.
_INLINE = re.compile(r"[\\`*\[\]<>|#~$&@]|(?<![^\W_])_|_(?![^\W_])|(?<=\w):(?=//)|(?<=\bwww)\.")
_BLOCK = re.compile(r"[-+=]|\d{1,9}(?=[.)])")  # at the start of one: a list, a heading


def printable(text: str) -> str:
    """Text on one line: line breaks, invisible characters and those that turn its direction show as escapes."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def escape(text: str, *, opens: bool = False) -> str:
    """
    A sentence, in a paragraph or a table, that shows as it is written: no markup, no line break, no new cell. One that
    opens a paragraph opens no list or heading either.
    """
    text = printable(text).strip()
    escaped = _INLINE.sub(r"\\\g<0>", text)
    block = _BLOCK.match(escaped) if opens else None
    if block is None:
        return escaped
    return f"{block[0]}\\{escaped[block.end() :]}" if block[0].isdigit() else f"\\{escaped}"


def name_text(name: str, *, in_table: bool = False) -> str:
    """
    A name. One of letters, digits and `- _ . /` between them stands as it is; any other is quoted as code, in which
    nothing has a meaning.
    """
    if len(name) <= _MAX_PLAIN and _PLAIN_NAME.fullmatch(name):
        return name
    quoted = printable(name) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", quoted)), default=0))
    pad = " " if quoted[0] in " `" or quoted[-1] in " `" else ""
    quoted = f"{fence}{pad}{quoted}{pad}{fence}"
    return quoted.replace("|", "\\|") if in_table else quoted
