"""Small image files, folders and datasets for the tests of reading."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dp_curriculum.config import DataConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.reading import read_images
from dp_curriculum.data.sources import open_rows


CLASSES = datasets.ClassLabel(names=["cat", "dog"])
IMAGE, NUMBER, TEXT = datasets.Image(), datasets.Value("int64"), datasets.Value("string")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(image: Any, **options: Any) -> bytes:
    return encoded(image if isinstance(image, Image.Image) else Image.fromarray(image), "PNG", **options)


def grey(value: int, size: int = 8) -> np.ndarray:
    return np.full((size, size), value, dtype=np.uint8)


def photo(size: int = 24, mode: str = "RGB") -> Image.Image:
    """A picture with structure, which no decoder makes by accident."""
    x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    pixels = np.stack([x, y, (x * y) ** 0.5], axis=-1)
    return Image.fromarray((255 * pixels).astype(np.uint8)).convert(mode)


def bomb(width: int, height: int | None = None, *, bits: int = 1, colour: int = 0) -> bytes:
    """A valid PNG of few bytes and many pixels, all black."""
    height = height or width

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    compressor, line = zlib.compressobj(9), bytes(1 + (width * bits * channels + 7) // 8)
    body = b"".join([*(compressor.compress(line) for _ in range(height)), compressor.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def rows(*images: bytes | None, labels: list[int] | None = None) -> datasets.Dataset:
    """A dataset in memory, whatever its bytes are."""
    columns: dict[str, Any] = {
        "image": [None if image is None else {"bytes": image, "path": None} for image in images]
    }
    features: dict[str, Any] = {"image": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, CLASSES
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def read(dataset: datasets.Dataset, **fields: Any) -> PrivateImages:
    config = DataConfig(**{"resolution": 8, "num_channels": 1, **fields})
    return read_images(open_rows(dataset, config), config)


def write_hub_folder(
    folder: Path, images: Sequence[bytes | None | dict[str, Any]], **columns: tuple[list[Any], Any]
) -> Path:
    """A dataset as the Hub lays it out: parquet, with its features in the file. Nothing checks the values."""
    arrays: dict[str, pa.Array] = {
        "image": pa.array(
            [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in images],
            type=pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        )
    }
    features: dict[str, Any] = {"image": datasets.Image()}
    for name, (values, feature) in columns.items():
        kind = pa.int64() if isinstance(feature, datasets.ClassLabel) else feature.pa_type
        arrays[name], features[name] = pa.array(values, type=kind), feature
    info = {"huggingface": json.dumps({"info": {"features": datasets.Features(features).to_dict()}})}
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.table(arrays).replace_schema_metadata(info), folder / "data" / "train-00000-of-00001.parquet")
    return folder


def image_folder(root: Path, *paths: str) -> DataConfig:
    """Images, and where a path ends with a slash, empty folders."""
    for path in paths:
        folder = root / path if path.endswith("/") else (root / path).parent
        folder.mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            Image.fromarray(grey(90)).save(root / path)
    return DataConfig(train_data_dir=str(root), resolution=8, num_channels=1)
