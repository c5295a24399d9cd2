"""What a forgery is, and what a careful forger needs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dp_curriculum.sharing.model_card import privacy_section


FAILS, NOT_CHECKED, REFUSED = "FAILS", "not checked", "refused"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
STRONGER = "This model is (0.1, 1e-09)-differentially private."
PICKLE = b"\x80\x02}q\x00."


@dataclass(frozen=True)
class Forgery:
    """What somebody did, and how `verify` has to end."""

    name: str
    edit: Callable[[Path], None]
    check: str
    verdict: str
    of: str
    careless: bool
    known: bool


FORGERIES: list[Forgery] = []


def forgery(
    check: str, *, verdict: str = FAILS, of: str = "model", careless: bool = False, known: bool = False
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Adds a forgery to the corpus."""

    def add(edit: Callable[[Path], None]) -> Callable[[Path], None]:
        FORGERIES.append(Forgery(edit.__name__, edit, check, verdict, of, careless, known))
        return edit

    return add


def read_card(folder: Path) -> tuple[str, str]:
    """Metadata and text."""
    _, front, body = (folder / "README.md").read_bytes().decode().split("---\n", 2)
    return front, body


def write_card(folder: Path, front: str, body: str) -> None:
    (folder / "README.md").write_bytes(f"---\n{front}---\n{body}".encode())


def edit_text(folder: Path, old: str, new: str) -> None:
    """Edits the text of the card, below its metadata."""
    front, body = read_card(folder)
    assert old in body, old
    write_card(folder, front, body.replace(old, new, 1))


def edit_front(folder: Path, old: str, new: str) -> None:
    """Edits the metadata of the card as text."""
    front, body = read_card(folder)
    assert old in front, old
    write_card(folder, front.replace(old, new, 1), body)


def edit_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    """Edits the values of the metadata, and writes them as this package does."""
    front, body = read_card(folder)
    values = yaml.safe_load(front)
    change(values)
    write_card(folder, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100), body)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


def edit_report(folder: Path, change: Callable[[Any], Any]) -> None:
    """Edits all copies of the report alike, and writes the section of the card that follows from it anew."""
    before = json.loads((folder / "privacy.json").read_text())
    edit_json(folder / "privacy.json", change)
    after = json.loads((folder / "privacy.json").read_text())
    if (folder / "model_index.json").exists():
        edit_json(folder / "model_index.json", lambda index: index.update(privacy=after))
    edit_metadata(folder, lambda metadata: metadata.update(differential_privacy=after))
    front, body = read_card(folder)
    write_card(folder, front, body.replace(privacy_section(before), privacy_section(after), 1))


def section(folder: Path) -> str:
    """The true section on privacy."""
    return privacy_section(json.loads((folder / "privacy.json").read_text()))


def relist(folder: Path) -> None:
    """Writes the hashes on the card anew, where it is text."""
    card = folder / "README.md"
    if card.is_symlink() or not card.is_file():
        return

    def digest(row: re.Match[bytes]) -> bytes:
        path = folder / row[1].decode()
        return (
            b"- `%s`: `%s`" % (row[1], hashlib.sha256(path.read_bytes()).hexdigest().encode())
            if path.is_file()
            else row[0]
        )

    card.write_bytes(re.sub(rb"- `([\w./-]+)`: `[0-9a-f]{64}`", digest, card.read_bytes()))


def add_owners_part(folder: Path, text: str) -> None:
    front, body = read_card(folder)
    write_card(folder, front, f"{body}\n## Added by the owner\n\n{text}\n")


def edit_report_text(folder: Path, old: str, new: str) -> None:
    text = (folder / "privacy.json").read_text()
    assert old in text, old
    (folder / "privacy.json").write_text(text.replace(old, new, 1))
