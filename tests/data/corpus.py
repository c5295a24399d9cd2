"""A corpus of bad image files that grows: formats times faults. Add a fault here, and every test of files has it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from pictures import bomb, encoded, photo
from PIL import Image

from dp_curriculum.data.decoding import FORMATS


# Compressed where the format can be: a damaged stream is what decoders talk about.
_OPTIONS: dict[str, dict[str, Any]] = {
    "TIFF": {"compression": "tiff_adobe_deflate"},
    "JPEG": {"quality": 90, "progressive": True},
    "TGA": {"compression": "tga_rle"},
}
_SUFFIXES = {"JPEG": ".jpg", "JPEG2000": ".jp2", "DIB": ".dib"}
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
_TIFF_COMPRESSIONS = ("tiff_lzw", "packbits", "tiff_jpeg", "zstd", "tiff_adobe_deflate", "raw", "group4", "lzma")


def suffix(kind: str) -> str:
    return _SUFFIXES.get(kind, f".{kind.lower()}")


def whole_files() -> Iterator[tuple[str, bytes]]:
    """A good file of each format, by a name with the suffix that the format has."""
    for kind in FORMATS:
        yield f"whole-{kind}{suffix(kind)}", encoded(photo(32), kind, **_OPTIONS.get(kind, {}))


def damaged_files() -> Iterator[tuple[str, bytes]]:
    """Each format: cut at several places, bits flipped at several places, parts overwritten, something behind it."""
    random = np.random.default_rng(0)
    for kind in FORMATS:
        good = encoded(photo(32), kind, **_OPTIONS.get(kind, {}))
        for part in (0.02, 0.1, 0.3, 0.6, 0.9, 0.999):
            yield f"cut-{part}-{kind}{suffix(kind)}", good[: int(len(good) * part)]
        for number in range(12):
            flipped = bytearray(good)
            for place in random.integers(0 if number < 4 else 32, len(good), 1 + 3 * number):
                flipped[place] ^= 1 << int(random.integers(8))
            yield f"flip-{number}-{kind}{suffix(kind)}", bytes(flipped)
        half = len(good) // 2
        yield f"zeros-{kind}{suffix(kind)}", good[:half] + bytes(len(good) - half)
        yield f"ones-{kind}{suffix(kind)}", good[:half] + b"\xff" * (len(good) - half)
        yield f"noise-{kind}{suffix(kind)}", good[:64] + random.bytes(len(good))
        yield f"behind-{kind}{suffix(kind)}", good + random.bytes(1000)
        yield f"twice-{kind}{suffix(kind)}", good + good
        yield f"header-{kind}{suffix(kind)}", good[:24] + b"\xff" * 12 + good[36:]


def odd_files() -> Iterator[tuple[str, bytes]]:
    """Files of other modes, compressions and kinds than people mean, and no images at all."""
    for mode in _MODES:
        for kind in FORMATS:
            try:
                data = encoded(photo(16).convert(mode) if mode != "PA" else photo(16).convert("P").convert("PA"), kind)
            except (OSError, ValueError, KeyError):  # Pillow cannot write it
                continue
            yield f"mode-{mode.replace(';', '')}-{kind}{suffix(kind)}", data
    for compression in _TIFF_COMPRESSIONS:
        try:
            good = encoded(
                photo(48).convert("1" if compression == "group4" else "RGB"), "TIFF", compression=compression
            )
        except (OSError, ValueError, KeyError):
            continue
        yield f"{compression}.tiff", good
        yield f"{compression}-cut.tiff", good[:200] + bytes(len(good) - 200)
        yield f"{compression}-late.tiff", good[:-100] + bytes(100)
    for name, data in {
        "nothing": b"",
        "text": b"a name that nobody may see",
        "html": b"<html><img src='http://127.0.0.1/x.png'></html>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) print\n%%EOF\n",
        "pickle": b"\x80\x04cos\nsystem\n(S'echo seen'\ntR.",
        "zip": b"PK\x03\x04" + bytes(200),
        "xpm": b"/* XPM */\nstatic char *x[] = {};",
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(60),
    }.items():
        yield f"{name}.png", data


def bombs() -> Iterator[tuple[str, bytes]]:
    """Few bytes that say, or become, many pixels."""
    yield "above-the-limit.png", bomb(7072)
    yield "wide.png", bomb(60_000_000, 1)
    yield "pillow-error.png", bomb(20_000)
    jpeg = bytearray(encoded(photo(32), "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 65_000, 65_000)
    yield "says-65000.jpg", bytes(jpeg)
    yield "says-40000.ppm", b"P6\n40000 40000\n255\n" + bytes(100)
    yield "says-40000.pgm", b"P5\n40000 40000\n65535\n" + bytes(100)
    bmp = bytearray(encoded(photo(32), "BMP"))
    bmp[18:26] = struct.pack("<ii", 40_000, 40_000)
    yield "says-40000.bmp", bytes(bmp)
    gif = bytearray(encoded(photo(32), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    yield "says-65535.gif", bytes(gif)
    ico = bytearray(encoded(photo(32), "ICO"))
    inner = bomb(9000)
    ico[14:18], ico[18:22] = struct.pack("<I", len(inner)), struct.pack("<I", 22)
    yield "a-bomb-inside.ico", bytes(ico[:22]) + inner
    text = b"x" * 2**26
    yield "a-large-text.png", encoded(photo(16), "PNG", pnginfo=_text(text))


def _text(content: bytes) -> Any:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("comment", content.decode(), zip=True)
    return info


def largest_files() -> Iterator[tuple[str, bytes]]:
    """As many pixels as are allowed, in the modes that take most memory; all of them can be read."""
    yield "grey-16.png", bomb(7071, bits=16)
    yield "rgba-8.png", bomb(7071, bits=8, colour=6)
    yield "palette.png", encoded(Image.new("P", (7071, 7071)), "PNG", transparency=0)
