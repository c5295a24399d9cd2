"""Atomic checkpoints: safetensors and JSON, a manifest with hashes, one rename.

A folder `checkpoint-<step>` either holds a manifest whose hashes fit its files, or is not a checkpoint. It holds
noised weights and what was computed from them; never generator state, sampled rows, counts or paths.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dp_curriculum.runtime.hashing import hash_file
from dp_curriculum.runtime.storage import LITTER, fsync_directory, naming, settle


MANIFEST = "manifest.json"
_PREFIX = "checkpoint-"
_FORMAT = 1
_UNREADABLE = (
    OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """
    A verified checkpoint.

    Args:
        step (`int`): Noisy steps that its weights have taken.
        tensors (`dict[str, dict[str, torch.Tensor]]`): Tensors by group (`unet`, `ema`, `optimizer`) and name.
        facts (`dict`): What was saved beside them, JSON types.
        sha256 (`str`): Of its manifest, which holds the hashes of its files.
    """

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    facts: dict[str, Any]
    sha256: str


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """
    A temporary name beside `path`; the file or folder that is written there takes its place, whole and flushed.

    Raises:
        OSError: If the disk refuses; it names a path. What was at `path` is intact.
    """
    temporary = path.with_name(f"{LITTER}{path.name}")
    with _written_to(path), _removed_afterwards(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        settle(temporary)
        os.replace(temporary, path)
        fsync_directory(path.parent)


@contextmanager
def appearing_in(folder: Path) -> Iterator[Path]:
    """
    A temporary folder inside `folder`; each file that is written there takes its place in it, whole and flushed. Those
    at the top come last.

    Raises:
        OSError: If the disk refuses; it names a path. No file is half written.
    """
    temporary = folder / f"{LITTER}files"
    with _written_to(folder), _removed_afterwards(temporary):
        temporary.mkdir(parents=True)
        yield temporary
        settle(temporary)
        files = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: (-len(file.parts), file)):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / file, folder / file)
        for path in {(folder / file).parent for file in files}:
            fsync_directory(path)


@contextmanager
def _written_to(path: Path) -> Iterator[None]:
    """Turns any failure inside into an error of the operating system that names a path."""
    try:
        with naming(path):
            yield
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from None


@contextmanager
def _removed_afterwards(path: Path) -> Iterator[None]:
    try:
        _remove(path)
        yield
    finally:
        _remove(path)


def save_text(path: Path, text: str) -> None:
    """Writes a text that is there whole, or not at all."""
    with appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    facts: Mapping[str, Any],
    total_limit: int,
    record: Callable[[Path, str], None] | None = None,
) -> Path:
    """
    Writes `folder/checkpoint-<step>`, then removes older ones beyond `total_limit`.

    The files are written and flushed under a temporary name. `record` gets the path that they will have and the
    sha256 of their manifest. The rename makes them a checkpoint. Older ones go last. Checkpoints
    from later steps, left by an abandoned attempt, do not count towards `total_limit`.

    Raises:
        OSError: If the disk refuses. The checkpoints that were there are intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_litter(folder)
    temporary, replaced = (folder / f"{LITTER}{uuid.uuid4().hex}" for _ in range(2))
    target = checkpoint_path(folder, step)
    try:
        with _written_to(target):
            temporary.mkdir()
            for group, named in tensors.items():
                contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
                save_file(contiguous, temporary / f"{group}.safetensors")
            files = {path.name: hash_file(path) for path in sorted(temporary.iterdir())}
            manifest: dict[str, Any] = {"format": _FORMAT, "step": step, "files": files, "facts": dict(facts)}
            manifest["sha256"] = _manifest_sha256(manifest)
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
            settle(temporary)
            if record is not None:
                record(target, manifest["sha256"])
            if target.exists():
                os.replace(target, replaced)
            os.replace(temporary, target)
            fsync_directory(folder)
    except BaseException:
        if replaced.exists() and not target.exists():
            os.replace(replaced, target)
        remove_litter(folder)
        raise
    remove_litter(folder)
    up_to_now = [path for path in list_checkpoints(folder) if _step(path) <= step]
    for old in up_to_now[total_limit:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, newest first; whether they are valid is for [`load_checkpoint`] to say."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if path.name.removeprefix(_PREFIX).isdigit() and path.is_dir()]
    return sorted(named, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return folder / f"{_PREFIX}{step:08d}"


def read_manifest(path: Path) -> dict[str, Any]:
    """
    The manifest of a checkpoint; the files that it lists are not read.

    Raises:
        ValueError: If it is missing, damaged or of a newer format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"{path.name} has format {manifest['format']}; this version reads {_FORMAT}.")
        unsigned = {name: value for name, value in manifest.items() if name != "sha256"}
        if manifest["sha256"] != _manifest_sha256(unsigned):
            raise ValueError(f"{path.name}/{MANIFEST} is damaged.")
    except _UNREADABLE as error:
        raise ValueError(f"{path.name} is not a whole checkpoint: {type(error).__name__}.") from None
    return manifest


def load_checkpoint(path: Path) -> Checkpoint:
    """
    Reads one checkpoint and verifies every file against the manifest.

    Raises:
        ValueError: If the manifest is missing, damaged or of a newer format, or a file that it lists is missing,
            damaged or not one of tensors. Files that it does not list are not read.
    """
    manifest = read_manifest(path)
    try:
        for name, digest in manifest["files"].items():
            if Path(name).name != name or Path(name).suffix != ".safetensors":
                raise ValueError(f"{path.name}/{name} is foreign.")
            if hash_file(path / name) != digest:
                raise ValueError(f"{path.name}/{name} is damaged.")
        tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in manifest["files"]}
        return Checkpoint(int(manifest["step"]), tensors, manifest["facts"], manifest["sha256"])
    except _UNREADABLE as error:
        raise ValueError(f"{path.name} is not a whole checkpoint: {type(error).__name__}.") from None


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, or `None`, and a line for each newer one that was passed over."""
    passed_over: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return load_checkpoint(path), passed_over
        except ValueError as error:
            passed_over.append(f"passed over: {error}")
    return None, passed_over


def remove_later_checkpoints(folder: Path, step: int) -> None:
    """Removes those of later steps, where a run goes back to one of `step`."""
    for path in list_checkpoints(folder):
        if _step(path) > step:
            shutil.rmtree(path)


def remove_litter(folder: Path) -> None:
    """Removes what an interrupted save left behind."""
    for path in folder.glob(f"{LITTER}*"):
        _remove(path)
