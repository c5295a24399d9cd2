"""Looks through files before they are shared, and at files that somebody shared before they are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from dp_curriculum.sharing.strict import read_json


MAX_HEADER_BYTES = 10 * 2**20
_SECRETS = {
    "a Hub token": r"\bhf_[A-Za-z0-9]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an access token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|xox[abprs]-[\w-]{10,}|sk-[\w-]{20,})",
    "a local path": r"(?<![\w:/.~-])(?:/(?:home|Users|root|mnt|media|tmp|var|scratch|data|srv|opt|work)/[\w.-]+|"
    r"[A-Za-z]:\\\\?[\w.-]+\\|file:/|~/[\w.-]+)",
}


class UnsafeFile(ValueError):
    """A file is not what its name says, or holds what must not be shared."""


def scan_folder(
    folder: Path, allowed: Iterable[str], *, local_names: Mapping[str, str] = MappingProxyType({})
) -> None:
    """
    Refuses a folder that does not hold exactly the allowed files, or in which one holds what must not be shared.

    Args:
        folder (`Path`): What is to be shared.
        allowed (`Iterable[str]`): Paths in the folder.
        local_names (`Mapping[str, str]`, *optional*): Strings of this machine that must not be in a file, with what
            they are.

    Raises:
        UnsafeFile: It names the file and what was found; never the secret itself.
    """
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if found != set(allowed):
        odd = sorted(found ^ set(allowed))[0]
        raise UnsafeFile(f"Refusing to share {folder}: its files are not those of the allow-list. See {odd}.")
    scan_files(folder, found, local_names=local_names)


def scan_files(folder: Path, names: Iterable[str], *, local_names: Mapping[str, str] = MappingProxyType({})) -> None:
    """
    Refuses a file that holds what must not be shared, as [`scan_folder`] does; other files may lie beside.

    Raises:
        UnsafeFile: It names the file and what was found; never the secret itself.
    """
    for name in sorted(names):
        if (folder / name).is_symlink():
            raise UnsafeFile(f"Refusing to share {name}: it is a link. Put the file in its place.")
        for what in _findings(folder / name, local_names):
            raise UnsafeFile(f"Refusing to share {name}: it contains {what}. Remove it and try again.")


def _findings(path: Path, local_names: Mapping[str, str]) -> Iterator[str]:
    if path.suffix == ".safetensors":
        text = _safetensors_header(path)
    elif path.suffix == ".png":
        text = _image_text(path)
    elif path.suffix == ".parquet":  # written by us from pixels and labels
        text = ""
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            yield "what is no text"
            return
    for name, what in local_names.items():
        if name in text:
            yield what
    for what, pattern in _SECRETS.items():
        if re.search(pattern, text):
            yield what


def _safetensors_header(path: Path) -> str:
    header = read_safetensors_header(path)
    metadata = header.pop("__metadata__", {})
    if metadata not in ({}, {"format": "pt"}):
        raise UnsafeFile(f"Refusing to share {path.name}: it holds metadata beside its tensors. Save the model again.")
    return " ".join(header)


def _image_text(path: Path) -> str:
    with Image.open(path) as image:
        if image.format != "PNG" or image.info:
            raise UnsafeFile(f"Refusing to share {path.name}: it is no PNG of pixels alone. Save it again.")
    return ""


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """
    The header of a safetensors file, read with care: the file may be anybody's.

    Raises:
        UnsafeFile: If it is another kind of file, such as a pickle, its header is larger than 10 MiB, or a tensor
            does not lie where the header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UnsafeFile(f"Expected {path.name} to be a safetensors file with a header of at most 10 MiB.")
        raw = file.read(length)
    try:
        header = read_json(raw)
        spans = [row["data_offsets"] for name, row in header.items() if name != "__metadata__"]
        fits = all(0 <= start <= end <= size - 8 - length for start, end in spans)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise UnsafeFile(f"Expected {path.name} to be a safetensors file: its header cannot be read.")
    return header
