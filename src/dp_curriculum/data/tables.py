"""Tables beside images, read as text and row by row: no row decides a type, a class, or how another one is read.

A line of `metadata.csv` or `metadata.jsonl` is a row. One that cannot be read, or has more or fewer fields than the
first line, stands for an image that cannot be read. `metadata.parquet` brings the types of its columns along.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet


TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"
_DELIMITERS = (",", ";", "\t")


def column_names(table: Path) -> tuple[str, ...] | None:
    """
    The columns of a table, from its first line or its schema; `None` for JSON lines, which have neither.

    Raises:
        ValueError: If the first line cannot be read, or names no column `file_name`.
    """
    if table.suffix == ".jsonl":
        return None
    try:
        if table.suffix == ".parquet":
            names = tuple(pyarrow.parquet.read_schema(table).names)
        else:
            with table.open("rb") as file:
                names = _header(file.readline())[0]
    except (ValueError, OSError) as error:
        raise ValueError(f"Expected {table} to be a table: {type(error).__name__} in its first line.") from None
    if FILE_NAME not in names:
        raise ValueError(f"Expected {table} to have a column {FILE_NAME}: it has {', '.join(names)}.")
    return names


def read_table(table: Path, column: str) -> Iterator[tuple[str | None, Any]]:
    """
    File name and value of `column` in each row; `None` for either where the row has none, or cannot be read.

    Raises:
        ValueError: If a parquet file is damaged; the message says nothing of a row.
    """
    if table.suffix == ".csv":
        yield from _csv_rows(table, column)
    elif table.suffix == ".jsonl":
        yield from _json_rows(table, column)
    else:
        yield from _parquet_rows(table, column)


def _header(line: bytes) -> tuple[tuple[str, ...], str]:
    """Column names and delimiter, by what the first line has most of."""
    text = line.decode("utf-8-sig")
    delimiter = max(_DELIMITERS, key=text.count)
    fields = _fields(text.encode(), delimiter)
    if fields is None:
        raise ValueError("unreadable header")
    return tuple(field.strip() for field in fields), delimiter


def _fields(line: bytes, delimiter: str) -> list[str] | None:
    try:
        return next(csv.reader([line.decode("utf-8").rstrip("\r\n")], delimiter=delimiter, strict=True))
    except (csv.Error, UnicodeDecodeError, StopIteration):
        return None


def _csv_rows(table: Path, column: str) -> Iterator[tuple[str | None, Any]]:
    with table.open("rb") as file:
        names, delimiter = _header(file.readline())
        places = names.index(FILE_NAME), names.index(column)
        for line in file:  # not the csv module's rows: an open quote would swallow all that follow
            if line.strip():
                fields = _fields(line, delimiter)
                fits = fields is not None and len(fields) == len(names)
                yield (fields[places[0]], fields[places[1]]) if fits and fields else (None, None)


def _json_rows(table: Path, column: str) -> Iterator[tuple[str | None, Any]]:
    with table.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    row = json.loads(line)
                    yield _text(row.get(FILE_NAME)), row.get(column)
                except (ValueError, AttributeError, RecursionError):
                    yield None, None


def _parquet_rows(table: Path, column: str) -> Iterator[tuple[str | None, Any]]:
    try:
        for batch in pyarrow.parquet.ParquetFile(table).iter_batches(columns=[FILE_NAME, column]):
            yield from ((_text(row[FILE_NAME]), row[column]) for row in batch.to_pylist())
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected {table.name} to be readable to its end: {type(error).__name__}.") from None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
