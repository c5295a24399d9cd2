"""Looks for what must not be in any file of a run: keys and generator states, counts, names, and pictures."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file


SIMILAR = 0.9  # correlation; of two pictures of 64 random pixels, one in ten million windows reaches 0.7
_WINDOW = 64  # bytes of a generator state that are looked for at once
_BINARY = (".safetensors", ".png")


def generator_states() -> list[bytes]:
    """The states of all global generators, in parts that a file would hold whatever wraps them."""
    python = np.array(random.getstate()[1][:-1], dtype=np.uint32).tobytes()
    words = np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]
    engine = torch.get_rng_state().numpy().tobytes()
    # Torch keeps a word of its engine in eight bytes; others may have packed them.
    packed = np.frombuffer(engine[24 : 24 + 8 * 624], "<u8").astype("<u4").tobytes()
    parts = []
    for state in (python, words, engine, packed):
        starts = range(len(state) // 4, len(state) - _WINDOW, len(state) // 4)
        parts += [state[start : start + _WINDOW] for start in starts]
    return [part for part in parts if len(set(part)) > 8]


def holds_secret(folder: Path, secrets: Iterable[bytes]) -> list[str]:
    """Files that hold one of these byte strings, as such, in hexadecimal, or as an integer in decimal."""
    forms = [form for secret in secrets for form in (secret, secret.hex().encode(), str(_integer(secret)).encode())]
    return [path.name for path in _files(folder) if any(form in path.read_bytes() for form in forms)]


def _integer(secret: bytes) -> int:
    return int.from_bytes(secret, "little")


def holds_number(folder: Path, numbers: Iterable[int]) -> list[str]:
    """Files of text that hold one of these numbers by itself, and files with it in their name."""
    pattern = re.compile(r"(?<![\d.\w])(?:" + "|".join(map(str, numbers)) + r")(?![\d\w]|\.\d)")
    texts = ((path.name, f"{path.name}\n{_text(path)}") for path in _files(folder))
    return [name for name, text in texts if pattern.search(text)]


def holds_text(folder: Path, words: Iterable[str]) -> list[str]:
    """Files whose name or bytes hold one of these words."""
    wanted = list(words)
    return [
        path.name
        for path in _files(folder)
        if any(word in str(path.relative_to(folder)) or word.encode() in path.read_bytes() for word in wanted)
    ]


def holds_picture(folder: Path, picture: np.ndarray) -> list[str]:
    """Files with a window that looks like `picture` (H, W), whatever its brightness and contrast."""
    return [path.name for path in _files(folder) if _similarity(path, picture) > SIMILAR]


def _similarity(path: Path, picture: np.ndarray) -> float:
    if path.suffix == ".png":
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"), dtype=np.float64)
        if min(pixels.shape) < len(picture):
            return 0.0
        windows = np.lib.stride_tricks.sliding_window_view(pixels, picture.shape)
        return _correlation(windows.reshape(-1, picture.size), picture)
    if path.suffix == ".safetensors":
        tensors = [tensor.double().flatten().numpy() for tensor in load_file(path).values()]
        rows = [
            np.lib.stride_tricks.sliding_window_view(tensor, picture.size)
            for tensor in tensors
            if tensor.size >= picture.size
        ]
        return max((_correlation(row, picture) for row in rows), default=0.0)
    raw = np.frombuffer(path.read_bytes(), np.uint8).astype(np.float64)
    if raw.size < picture.size:
        return 0.0
    return _correlation(np.lib.stride_tricks.sliding_window_view(raw, picture.size), picture)


def _correlation(rows: np.ndarray, picture: np.ndarray) -> float:
    """The largest correlation of a row with the picture, of either sign."""
    unit = picture.ravel() - picture.mean()
    unit = unit / np.linalg.norm(unit)
    largest = 0.0
    for part in np.array_split(rows, max(1, len(rows) // 50_000)):
        centred = part - part.mean(1, keepdims=True)
        norms = np.linalg.norm(centred, axis=1)
        values = np.abs(centred @ unit) / np.where(norms > 1e-12, norms, np.inf)
        largest = max(largest, float(values.max(initial=0.0)))
    return largest


def _files(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.rglob("*")) if path.is_file())


def _text(path: Path) -> str:
    return "" if path.suffix in _BINARY else path.read_bytes().decode("utf-8", errors="replace")
