"""A hook of mkdocs: pages that lie outside of docs/, and links to files that are not on the site.

The README is the first page. A link is written for readers of the repository, relative to the file that it is in. It
becomes a link to a page where the site has that page or picture; otherwise its text stays alone. A link to nothing at
all ends the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
# A file of the repository, and its page.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
PAGE_OF = {**OUTSIDE, **{f"docs/{page}": page for page in (path.name for path in (ROOT / "docs").glob("*.md"))}}
FILE_OF = {page: file for file, page in PAGE_OF.items()}
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the pages that lie outside of docs/."""
    from mkdocs.structure.files import File

    for file, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Leads the links of a page to where the site has their targets."""
    return relinked(markdown, FILE_OF[page.file.src_uri])


def relinked(markdown: str, file: str) -> str:
    """
    The text of a file of the repository, with the links of the site.

    Raises:
        FileNotFoundError: If a link leads to nothing in the repository.
    """
    parts = re.split(CODE, markdown)
    if "[" not in markdown:
        return markdown
    # A link may have code for its text, so code is taken out, and put back.
    kept = {f"\0{index}\0": part for index, part in enumerate(parts) if index % 2}
    text = "".join(part if index % 2 == 0 else f"\0{index}\0" for index, part in enumerate(parts))
    text = LINK.sub(lambda link: _link(link, file), text)
    return re.sub("\0\\d+\0", lambda code: kept[code.group()], text)


def _link(link: re.Match[str], file: str) -> str:
    target, anchor = link["target"], link["anchor"] or ""
    if target == "" or re.match(r"[a-z]+:", target):
        return link.group()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
    if path in PAGE_OF:
        return f"{link['mark']}[{link['text']}]({PAGE_OF[path]}{anchor})"
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"{file} links to {target}, which is not there")
    if path.startswith("docs/"):  # a picture
        return f"{link['mark']}[{link['text']}]({path.removeprefix('docs/')})"
    return link["text"] if link["mark"] == "" else f"*{link['text']}*"
