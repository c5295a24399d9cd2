"""The fingerprint of a dataset: the same images give the same, anything else another; it never stops a reading."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dp_curriculum.config import DataConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.data.fingerprint import Fingerprint
from dp_curriculum.data.images import Batch
from dp_curriculum.data.reading import read_images
from dp_curriculum.data.sources import open_rows


KEY = bytes(range(32))


def taken(rows: Any, key: bytes = KEY, **fields: Any) -> str:
    config = DataConfig(**{"resolution": 8, "num_channels": 1, **fields})
    fingerprint = Fingerprint(key)
    read_images(fingerprint.watch(open_rows(rows, config)), config)
    return fingerprint.digest()


def of_references(*images: Any) -> str:
    def read() -> Iterator[Batch]:
        yield list(images), [0] * len(images), []

    source = dataclasses.replace(open_rows(digits_dataset().select(range(1)), DataConfig(num_channels=1)), read=read)
    fingerprint = Fingerprint(KEY)
    for _ in fingerprint.watch(source).read():
        pass
    return fingerprint.digest()


def test_order_and_the_options_of_a_run_change_nothing_and_images_do() -> None:
    rows = digits_dataset().select(range(12))
    first = taken(rows)
    assert first == taken(rows) == taken(rows.select(range(11, -1, -1))) == taken(rows, resolution=16)
    others = [rows.select(range(11)), digits_dataset().select(range(13)), digits_dataset().select(range(1, 13))]
    others.append(digits_dataset().select([*range(12), 0]))
    assert len({first, *map(taken, others)}) == 5
    assert taken(rows, key=bytes(32)) != first, "whoever lacks the key learns nothing from it"


def test_other_persons_of_the_same_images_are_told_apart_and_their_names_have_no_part() -> None:
    rows = digits_dataset().select(range(6))

    def of(*persons: str) -> str:
        return taken(rows.add_column("person", list(persons)), person_column="person")

    first = of("a", "a", "b", "b", "c", "c")
    assert first == of("x", "x", "a", "a", "b", "b")
    assert len({first, of("a", "b", "b", "b", "c", "c"), of("a", "b", "c", "d", "e", "f"), taken(rows)}) == 4


def test_a_row_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "image").write_bytes(b"pixels")
    nothing = of_references(None)
    assert nothing == of_references(tmp_path / "none") == of_references(tmp_path / "pipe") == of_references(tmp_path)
    assert of_references(tmp_path / "image") == of_references(b"pixels") != nothing
    assert of_references(None, None) != nothing, "it is a row"
