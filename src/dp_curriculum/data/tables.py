"""Tables beside images, read as text and row by row: no row decides a type, a class, or how another one is read.

A line of `metadata.csv` or `metadata.jsonl` is a row. One that cannot be read, or has more or fewer fields than the
first line, stands for an image that cannot be read. `metadata.parquet` brings the types of its columns along.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pyarrow.types


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


def check_person_type(table: Path, column: str) -> None:
    """
    Refuses a parquet column that holds neither text nor whole numbers; in other tables each line speaks for itself.

    Raises:
        ValueError: If it does; the message names the type.
    """
    if table.suffix != ".parquet":
        return
    kind = pyarrow.parquet.read_schema(table).field(column).type
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(
            f"Expected --person_column={column} to hold text or whole numbers: its type in {table.name} is {kind}. "
            "Save it as one of these."
        )


def read_table(table: Path, *columns: str) -> Iterator[tuple[Any, ...]]:
    """
    File name and values of `columns` in each row; `None` for any that the row lacks, and all where it cannot be read.

    Raises:
        ValueError: If a parquet file is damaged; the message says nothing of a row.
    """
    if table.suffix == ".csv":
        yield from _csv_rows(table, columns)
    elif table.suffix == ".jsonl":
        yield from _json_rows(table, columns)
    else:
        yield from _parquet_rows(table, columns)


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


def _csv_rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with table.open("rb") as file:
        names, delimiter = _header(file.readline())
        places = [names.index(name) for name in (FILE_NAME, *columns)]
        for line in file:  # not the csv module's rows: an open quote would swallow all that follow
            if line.strip():
                fields = _fields(line, delimiter)
                fits = fields is not None and len(fields) == len(names)
                yield tuple(fields[place] if fits and fields else None for place in places)


def _json_rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with table.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    row = json.loads(line)
                    yield _text(row.get(FILE_NAME)), *(row.get(column) for column in columns)
                except (ValueError, AttributeError, RecursionError):
                    yield None, *(None for _ in columns)


def _parquet_rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    try:
        for batch in pyarrow.parquet.ParquetFile(table).iter_batches(columns=[FILE_NAME, *columns]):
            for row in batch.to_pylist():
                yield _text(row[FILE_NAME]), *(row[column] for column in columns)
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected {table.name} to be readable to its end: {type(error).__name__}.") from None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
