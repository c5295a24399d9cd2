"""Persons from columns, tables and folders; what names no person contributes zero, and identifiers go nowhere."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from pictures import photo, png

from dp_curriculum.config import DataConfig
from dp_curriculum.data import load_images, open_rows, read_images
from dp_curriculum.data.images import NO_CONTRIBUTION, PrivateImages
from dp_curriculum.data.inspection import format_inspection, inspect_images
from dp_curriculum.data.sources import open_images
from dp_curriculum.data.units import NO_PERSON


NAMES = ["ann", "bob", "ann", "", "cem", "bob"]


def config(**fields: Any) -> DataConfig:
    return DataConfig(**{"resolution": 8, "num_channels": 1, **fields})


def rows(persons: list[Any], kind: Any = None, labels: list[int] | None = None) -> datasets.Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (len(persons), 8, 8), dtype=np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"]),
         "person": kind or datasets.Value("string")}
    )  # fmt: skip
    columns = {"image": list(pixels), "label": labels or [row % 2 for row in range(len(persons))], "person": persons}
    return datasets.Dataset.from_dict(columns, features=features)


def read(dataset: datasets.Dataset, **fields: Any) -> PrivateImages:
    chosen = config(**{"person_column": "person", **fields})
    return read_images(open_rows(dataset, chosen), chosen)


def write_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(photo(8 + number).convert("L")))


def persons_of(images: PrivateImages) -> list[int]:
    assert images.persons is not None
    return images.persons.tolist()


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind"),
    [(["ann", "bob", "ann", None, "cem", " bob"], "string"), ([7, 3, 7, None, 1, 3], "int64"),
     ([7, 3, 7, None, 1, 3], "uint16"), (["ann", "bob", "ann", "", "cem", "bob "], "large_string")],
)  # fmt: skip
def test_a_column_of_text_or_whole_numbers_names_persons(values: list[Any], kind: str) -> None:
    images = read(rows(values, datasets.Value(kind)))
    assert persons_of(images) == [0, 1, 0, NO_PERSON, 2, 1] and len(images.units) == 3
    assert images.labels.tolist() == [0, 1, 0, NO_CONTRIBUTION, 0, 1], "a row of no one contributes zero"


def test_a_column_of_classes_names_persons() -> None:
    images = read(rows([1, 0, 1], datasets.ClassLabel(names=["ann", "bob"])), label_column="label")
    assert persons_of(images) == [0, 1, 0]


@pytest.mark.parametrize("kind", ["float64", "bool", "binary", "date32"])
def test_a_column_of_another_type_is_refused_by_its_type_alone(kind: str) -> None:
    dataset = rows([None] * 4, datasets.Value(kind))
    with pytest.raises(ValueError, match=r"--person_column=person to hold text or whole numbers: its type is"):
        open_rows(dataset, config(person_column="person"))


@pytest.mark.parametrize("name", ["patient", "image", "label"])
def test_a_column_that_is_not_there_or_is_another_thing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"--person_column={name} to be a column of persons: the dataset has person"):
        open_rows(rows(["a", "b"]), config(person_column=name))


def test_persons_are_named_once_and_folders_are_for_folders() -> None:
    with pytest.raises(ValueError, match="--person_column=a to come without --person_from"):
        config(person_column="a", person_from="folder")
    with pytest.raises(ValueError, match="--person_from=folder to come with a folder of images"):
        open_rows(rows(["a", "b"]), config(person_from="folder"))
    with pytest.raises(ValueError, match="--person_from=file to be folder"):
        config(person_from="file")
    with pytest.raises(ValueError, match="--person_column=patient to be a column of persons"):
        load_images(config(person_column="patient"))  # the embedded digits


def test_without_an_option_images_are_the_unit() -> None:
    images = read(rows(NAMES), person_column=None)
    assert images.persons is None and len(images.units) == len(images) and config().unit == "image"


# --- tables and folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("has_labels", [True, False])
def test_a_table_beside_images_names_persons(form: str, has_labels: bool, tmp_path: Path) -> None:
    files = [f"{'ab'[row % 2]}/{row}.png" for row in range(6)]
    write_images(tmp_path, *files)
    table = {"file_name": files, "who": NAMES, "kind": ["a", "b"] * 3}
    write_table(tmp_path / f"metadata.{form}", table)
    fields = {"label_column": "kind", "class_names": ["a", "b"]} if has_labels else {}
    images = load_images(config(train_data_dir=str(tmp_path), person_column="who", **fields))
    assert persons_of(images) == [0, 1, 0, NO_PERSON, 2, 1]
    assert images.labels.tolist() == [0, 1, 0, NO_CONTRIBUTION, 0, 1] and images.class_names == ("a", "b")


def write_table(path: Path, table: dict[str, list[Any]]) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table(table), path)
        return
    lines = [dict(zip(table, values)) for values in zip(*table.values())]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.write_text("\n".join([",".join(table), *(",".join(line.values()) for line in lines)]))


def test_a_line_is_a_row_so_that_an_image_of_two_persons_is_two_rows(tmp_path: Path) -> None:
    """The third line takes nothing from the first: without it, the first is as it was. An unlisted file is no row."""
    write_images(tmp_path, "1.png", "2.png", "3.png")
    write_table(tmp_path / "metadata.csv", {"file_name": ["1.png", "2.png", "1.png"], "who": ["ann", "bob", "cem"]})
    images = load_images(config(train_data_dir=str(tmp_path), person_column="who"))
    assert persons_of(images) == [0, 1, 2] and images.images[0].equal(images.images[2])


def test_values_of_json_lines_speak_for_themselves_alone(tmp_path: Path) -> None:
    """Mixed types: a number and its text are one person; a fraction, a list, or nothing is no one."""
    values = [7, "7", 7.5, None, [1], True, "ann", float("nan")]
    write_images(tmp_path, *(f"{row}.png" for row in range(len(values))))
    write_table(tmp_path / "metadata.jsonl", {"file_name": [f"{row}.png" for row in range(8)], "who": values})
    images = load_images(config(train_data_dir=str(tmp_path), person_column="who"))
    assert persons_of(images) == [0, 0, *[NO_PERSON] * 4, 1, NO_PERSON]


def test_a_parquet_table_of_fractions_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png")
    pyarrow.parquet.write_table(pa.table({"file_name": ["1.png"], "who": [1.0]}), tmp_path / "metadata.parquet")
    with pytest.raises(
        ValueError, match="--person_column=who to hold text or whole numbers: its type in metadata.parq"
    ):
        open_images(config(train_data_dir=str(tmp_path), person_column="who"))


def test_a_table_without_the_column_and_no_table_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png")
    with pytest.raises(ValueError, match="--person_column=who to name a column of a table beside the images"):
        open_images(config(train_data_dir=str(tmp_path), person_column="who"))
    write_table(tmp_path / "metadata.csv", {"file_name": ["1.png"], "kind": ["a"]})
    with pytest.raises(
        ValueError, match=r"--person_column=who to be a column of metadata.csv: it has file_name, kind"
    ):
        open_images(config(train_data_dir=str(tmp_path), person_column="who"))


def test_folders_of_persons_in_folders_of_classes(tmp_path: Path) -> None:
    """A name is one person in all classes, at any depth; an image beside the folders is of no one."""
    write_images(tmp_path, "a/ann/1.png", "a/bob/2.png", "a/bob/2024/3.png", "a/4.png", "b/ann/5.png", "b/cem/6.png")
    images = load_images(config(train_data_dir=str(tmp_path), person_from="folder"))
    found = dict(zip(("4", "1", "3", "2", "5", "6"), persons_of(images)))
    assert found == {"4": NO_PERSON, "1": 0, "2": 1, "3": 1, "5": 0, "6": 2}
    assert images.labels.tolist() == [NO_CONTRIBUTION, 0, 0, 0, 1, 1] and images.class_names == ("a", "b")


def test_folders_of_persons_alone_are_one_class(tmp_path: Path) -> None:
    write_images(tmp_path, "ann/1.png", "ann/2.png", "bob/3.png", "4.png")
    fields: dict[str, Any] = {"train_data_dir": str(tmp_path), "person_from": "folder"}
    with pytest.raises(ValueError, match="If the folders are the persons, type --label_column none"):
        open_images(config(**fields))
    images = load_images(config(label_column="none", **fields))
    assert persons_of(images) == [NO_PERSON, 0, 0, 1] and images.class_names == ("image",)
    assert images.labels.tolist() == [NO_CONTRIBUTION, 0, 0, 0]


def test_folders_of_persons_beside_a_table_of_classes(tmp_path: Path) -> None:
    write_images(tmp_path, "ann/1.png", "bob/2.png", "3.png")
    write_table(
        tmp_path / "metadata.csv", {"file_name": ["ann/1.png", "bob/2.png", "3.png", "4.png"], "kind": ["b", "a"] * 2}
    )
    chosen = config(
        train_data_dir=str(tmp_path), person_from="folder", label_column="kind", class_names=["a", "b"]
    )  # fmt: skip
    images = load_images(chosen)
    assert persons_of(images) == [0, 1, NO_PERSON, NO_PERSON] and images.labels.tolist() == [1, 0, -1, -1]


def test_splits_stay_apart(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a/ann/1.png", "train/b/bob/2.png", "test/a/cem/3.png", "test/b/ann/4.png")
    for split, count in (("train", 2), ("test", 2)):
        chosen = config(train_data_dir=str(tmp_path), person_from="folder", dataset_split=split)
        assert len(load_images(chosen).units) == count


def test_folders_in_classes_without_the_option_say_what_to_type(tmp_path: Path) -> None:
    write_images(tmp_path, "a/ann/1.png", "b/bob/2.png")
    with pytest.raises(ValueError, match="If they are folders of persons, type --person_from folder"):
        open_images(config(train_data_dir=str(tmp_path)))


# --- one person, nobody, and what is said ----------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "found"), [(["ann"] * 4, "one person, who has all rows"), ([""] * 4, "none")])
def test_one_person_and_none_are_refused_and_nothing_of_a_row_is_said(
    values: list[str], found: str, tmp_path: Path
) -> None:
    rows(values).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=f"--person_column=person to name persons: it names {found}") as error:
        load_images(config(dataset_name=str(tmp_path), person_column="person"))
    assert "ann" not in str(error.value)


def test_the_owner_is_told_of_persons_and_of_rows_of_no_one(caplog: pytest.LogCaptureFixture) -> None:
    chosen = config(person_column="person")
    text = format_inspection(inspect_images(open_rows(rows(NAMES), chosen), chosen), most=None)
    assert "3 persons, 3 of them with images that contribute: 1 to 2 each, median 2" in text
    assert "1 contribute nothing: it names no person" in text and "5 of 6 rows contribute" in text
    each = format_inspection(inspect_images(open_rows(rows(list("abcdef")), chosen), chosen), most=None)
    assert "each row is a person of its own: without persons, the unit is the image, and the same" in each
    alone = format_inspection(inspect_images(open_rows(rows(["ann"] * 4), chosen), chosen), most=None)
    assert "all rows are of one person: training refuses that" in alone


def test_reading_says_nothing_of_persons(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.DEBUG):
        images = read(rows(NAMES))
    seen = caplog.text + "".join(capfd.readouterr())
    assert not any(name in seen for name in ("ann", "bob", "cem")) and images.persons is not None
    assert images.persons.dtype == torch.int64
