"""Decoding of one image file to pixels, in a separate process.

Decoders are C code: they print to descriptors, log, take memory, and may end the process. Here their output is
discarded. The process that trains learns only that a row which could not be read adds zero. See workers.py for the
other end.
This file imports NumPy and Pillow alone, so that a worker starts at once.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import signal
import stat
import warnings
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image


MAX_IMAGE_PIXELS = 50_000_000  # at most 4 bytes each in any mode: 200 MB
MAX_FILE_BYTES = 2**28
MAX_WORKER_BYTES = 3 * 2**29  # what a worker may take in all; an image of the largest size needs half of it
MAX_CPU_SECONDS = 60.0  # of one image
# Decoders of pictures alone: others start an interpreter (EPS), or follow links (MIC, FPX).
_PICTURES = ("PNG", "JPEG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "JPEG2000", "PPM", "TGA", "ICO", "AVIF")
Image.init()  # fills the table of the decoders that this Pillow was built with
FORMATS = tuple(name for name in _PICTURES if name in Image.OPEN)
SUFFIXES = frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS)
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP_PIXELS = 2**20
_BUFFER = 2**20  # bytes of a request, or of an answer, that move at once


class Unreadable(ValueError):
    """An image that contributes zero; the message says why, for its owner alone."""


@dataclass(frozen=True)
class PixelFormat:
    """
    The public shape and conventions that every image is brought to; no pixel decides any of them.

    Args:
        resolution (`int`): Side in pixels; the image is cropped to a square around its centre and resized.
        num_channels (`int`): 1 for grey, 3 for RGB.
        intensity_range (`tuple[float, float]`, *optional*): What is black and what is white where a pixel has more
            than 8 bits. If unset, integers range over [0, 65535] and floats over [0, 1].
        alpha_background (`float`, *optional*, defaults to 1): Grey level in [0, 1] behind transparent pixels.
    """

    resolution: int
    num_channels: int
    intensity_range: tuple[float, float] | None = None
    alpha_background: float = 1.0


def decode(data: bytes, pixel_format: PixelFormat) -> np.ndarray:
    """
    An image file as `uint8` of shape `(C, H, W)`.

    Raises:
        Exception: Of any kind, where the file cannot be read. Every one of them means a row that contributes zero.
    """
    side = pixel_format.resolution
    image = _open(data)
    upright = _UPRIGHT.get(_orientation(image) or 1)
    image.draft(None, (2 * side, 2 * side))  # a JPEG is decoded at a half, quarter or eighth where that is enough
    image.load()
    _check_size(image)  # some files show their true size only while they are decoded
    image = _to_eight_bits(image, pixel_format.intensity_range)
    image = _composite(_resize(image, side), pixel_format.alpha_background)
    mode = "L" if pixel_format.num_channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if upright is not None:
        image = image.transpose(upright)
    pixels = np.frombuffer(image.tobytes(), dtype=np.uint8)  # in half the time of np.asarray
    return pixels.reshape(side, side, pixel_format.num_channels).transpose(2, 0, 1)


def describe(data: bytes) -> dict[str, Any]:
    """Format, mode and size of an image file, for its owner."""
    image = _open(data)
    told = {"format": image.format, "mode": image.mode, "width": image.width, "height": image.height}
    return {**told, "range": image.getextrema()} if image.mode.startswith(("I", "F")) else told


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image)
    return image


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise Unreadable(f"more than {MAX_IMAGE_PIXELS:,} pixels")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # noqa: BLE001 - damaged metadata of an image that can be read
        return None


def _to_eight_bits(image: Image.Image, intensity_range: tuple[float, float] | None) -> Image.Image:
    """Pixels of more than 8 bits as 8, in strips: the whole image as floats would take eight times its memory."""
    if not image.mode.startswith(("I", "F")):
        return image
    low, high = intensity_range or ((0.0, 1.0) if image.mode.startswith("F") else (0.0, 65535.0))
    rows = max(1, _STRIP_PIXELS // image.width)
    pixels = np.empty((image.height, image.width), dtype=np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = np.asarray(image.crop((0, top, image.width, bottom)), dtype=np.float64)
        unit = np.nan_to_num((strip - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
        pixels[top:bottom] = np.round(unit.clip(0.0, 1.0) * 255)
    return Image.fromarray(pixels)


def _resize(image: Image.Image, side: int) -> Image.Image:
    """The square around the centre at the new size: first the pixels become fewer, then another mode."""
    if image.mode in ("1", "P", "PA"):  # not numbers that can be averaged
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in ("L", "RGB") and image.has_transparency_data:  # one colour that stands for transparent
        image = image.convert("RGBA")
    if image.size == (side, side):
        return image
    square = min(image.size)
    left, top = (image.width - square) / 2, (image.height - square) / 2
    box = (left, top, left + square, top + square)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)


def _composite(image: Image.Image, level: float) -> Image.Image:
    """Transparent pixels on a ground of one grey level."""
    if not image.has_transparency_data:
        return image
    grey = round(255 * level)
    ground = Image.new("RGBA", image.size, (grey, grey, grey, 255))
    return Image.alpha_composite(ground, image.convert("RGBA"))


def read_file(path: str) -> bytes:
    """
    A regular file of bounded size; a pipe or a device is not waited for.

    Raises:
        OSError: If there is no such file.
        Unreadable: If it is another kind of thing, or too large.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable("not a regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise Unreadable(f"more than {MAX_FILE_BYTES:,} bytes")
        return file.read(MAX_FILE_BYTES)


def serve() -> None:
    """Answers requests of [`~dp_curriculum.data.workers.Worker`] until its input ends; prints nothing, ever."""
    requests, answers = os.fdopen(os.dup(0), "rb", _BUFFER), os.fdopen(os.dup(1), "wb", _BUFFER)
    _say_nothing()
    _take_little_memory()
    while line := requests.readline():
        request = json.loads(line)
        pixel_format = PixelFormat(**request["pixel_format"])
        facts, decoded = [], []
        for item in request["items"]:
            pixels, found = _row(item, requests, pixel_format, wants_facts=request["describe"])
            facts.append(found)
            if pixels is not None:
                decoded.append(pixels)
        _allow_processor_time(0)
        answers.write(json.dumps(facts).encode() + b"\n")
        if decoded:
            answers.write(np.stack(decoded).tobytes())
        answers.flush()


def _row(
    item: int | str | None, requests: BinaryIO, pixel_format: PixelFormat, *, wants_facts: bool
) -> tuple[np.ndarray | None, Any]:
    """The pixels of one row, if any, and its facts: whether there are pixels, or more of them for its owner."""
    data = requests.read(item) if isinstance(item, int) else b""
    facts: dict[str, Any] = {}
    _allow_processor_time(MAX_CPU_SECONDS)
    try:
        if item is None:
            raise Unreadable("no image")
        if isinstance(item, str):
            data = read_file(item)
        if wants_facts:
            facts |= describe(data)
        pixels = decode(data, pixel_format)
    except Exception as error:  # noqa: BLE001 - whatever one row does, it must look like a row that adds zero
        reason = str(error) if isinstance(error, Unreadable) else f"cannot be read: {type(error).__name__}"
        return None, {**facts, "reason": reason} if wants_facts else 0
    return pixels, {**facts, "reason": None} if wants_facts else 1


def _say_nothing() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def _take_little_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows; the bound of pixels holds there too
        return
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_WORKER_BYTES, MAX_WORKER_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _allow_processor_time(seconds: float) -> None:
    """Ends this process where what it does next takes more; the row that did contributes zero. 0: no bound."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def format_fields(pixel_format: PixelFormat) -> dict[str, Any]:
    """A pixel format as JSON; `PixelFormat(**fields)` is its inverse."""
    return dataclasses.asdict(pixel_format)
