"""A folder of images: what folders, options and tables decide, and what no file can."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas
import pytest
from pictures import grey, image_folder, png

from dp_curriculum.config import DataConfig
from dp_curriculum.data.images import NO_CONTRIBUTION
from dp_curriculum.data.reading import load_images
from dp_curriculum.data.sources import open_images


# --- classes by folder ---------------------------------------------------------------------------------------------


def test_a_folder_of_images_is_read_one_class_per_sub_folder(tmp_path: Path) -> None:
    for name, value in (("dog", 200), ("cat", 100), ("cat", 101)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{value}.png").write_bytes(png(grey(value, 20)))
    (tmp_path / "cat" / "broken.png").write_bytes(b"not an image")
    private = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=8, num_channels=1))
    assert private.class_names == ("cat", "dog")
    found = sorted(zip(private.labels.tolist(), private.images[:, 0, 0, 0].tolist()))
    assert found == [(NO_CONTRIBUTION, 0), (0, 100), (0, 101), (1, 200)]


@pytest.mark.parametrize("others", [[], ["c/2.png"]])
def test_one_image_more_or_less_does_not_change_the_classes_of_a_folder(tmp_path: Path, others: list[str]) -> None:
    """Neighbours: the only image of class b is there, or not."""
    with_it = load_images(image_folder(tmp_path / "with", "a/1.png", "b/9.png", *others))
    without = load_images(image_folder(tmp_path / "without", "a/1.png", "b/", *others))
    assert with_it.class_names == without.class_names == tuple("abc"[: 2 + len(others)])
    assert sorted(with_it.labels.tolist()) == sorted([*without.labels.tolist(), 1])


@pytest.mark.parametrize(
    "odd",
    [
        *("3.png", "b/train-3.png", "b/x_test_3.png", "test_1.png", "._3.png", "list.png.txt", "b/notes.txt"),
        *(
            "a/annotations.json",
            "annotations.json",
            "b/labels.csv",
            "metadata.json",
            "metadata.csv",
            "a/metadata.jsonl",
        ),
    ],
)
def test_the_name_and_place_of_one_file_change_nothing_for_the_others(tmp_path: Path, odd: str) -> None:
    """`datasets` by itself makes splits of file names, and takes labels away for one image at another depth."""
    config = image_folder(tmp_path / "images", "a/1.png", "b/2.png", "c/")
    before = load_images(config)
    content = (tmp_path / "images" / "a" / "1.png").read_bytes()
    (tmp_path / "images" / odd).write_bytes(b"file_name,kind\n" if odd == "metadata.csv" else content)
    for reads in (config, DataConfig(dataset_name=str(tmp_path / "images"), resolution=8, num_channels=1)):
        after = load_images(reads)
        assert after.class_names == before.class_names == ("a", "b", "c")
        assert after.labels.tolist() in (before.labels.tolist(), [*before.labels.tolist(), 1])


@pytest.mark.parametrize(
    ("paths", "class_names", "labels"),
    [
        (["1.png", "2.png"], ("image",), [0, 0]),
        (["a/1.png", "a/2.png"], ("a",), [0, 0]),
        (["train/1.png", "test/2.png"], ("image",), [0]),
        (["train/a/1.png", "train/b/", "test/b/2.png"], ("a", "b"), [0]),
        (["a/1.png", ".hidden/", "__more/", "b/2.png"], ("a", "b"), [0, 1]),
        (["a/1.png", "b/2.PNG", "a/.3.png", "._x.png"], ("a", "b"), [0, 1]),
        (["train/a/1.png", "extra/b/1.png"], None, []),
        (["a/1.png", "b/c/2.png"], None, []),
    ],
)
def test_classes_of_a_folder_are_its_folders_of_images(
    tmp_path: Path, paths: list[str], class_names: tuple[str, ...] | None, labels: list[int]
) -> None:
    config = image_folder(tmp_path / "images", *paths)
    if class_names is None:
        with pytest.raises(ValueError, match=r"--train_data_dir=\S+ to be folders of images: \w+ has sub-folders"):
            load_images(config)
        return
    found = load_images(config)
    assert found.class_names == class_names and sorted(found.labels.tolist()) == labels


def test_declared_names_say_which_folders_are_classes_and_in_which_order(tmp_path: Path) -> None:
    config = image_folder(tmp_path / "images", "a/1.png", "b/2.png", "junk/3.png")
    found = load_images(dataclasses.replace(config, class_names=["b", "a", "none yet"]))
    assert found.class_names == ("b", "a", "none yet") and found.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="--class_names=x y to be sub-folders of .*: those are a b junk"):
        load_images(dataclasses.replace(config, class_names=["x", "y"]))
    with pytest.raises(ValueError, match="--num_classes=2 to match the 3 sub-folders"):
        load_images(dataclasses.replace(config, num_classes=2))
    unlabelled = load_images(dataclasses.replace(config, label_column="none"))
    assert unlabelled.class_names == ("image",) and unlabelled.labels.tolist() == [0, 0, 0]


def test_a_folder_of_images_is_the_same_by_either_option_and_through_links(tmp_path: Path) -> None:
    config = image_folder(tmp_path / "images", "a/1.png", "b/2.png", "c/")
    (tmp_path / "images" / "d").symlink_to(tmp_path / "images" / "a", target_is_directory=True)
    named = load_images(DataConfig(dataset_name=str(tmp_path / "images"), resolution=8, num_channels=1))
    assert named.class_names == load_images(config).class_names == ("a", "b", "c", "d")
    assert named.labels.tolist() == load_images(config).labels.tolist() == [0, 1, 3]


def test_a_link_that_leads_back_ends_nothing(tmp_path: Path) -> None:
    config = image_folder(tmp_path / "images", "a/1.png")
    (tmp_path / "images" / "a" / "back").symlink_to(tmp_path / "images", target_is_directory=True)
    assert load_images(config).labels.tolist() == [0]


def test_the_option_that_named_a_folder_is_the_one_that_is_told(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", "a/1.png", "b/c/2.png")
    with pytest.raises(ValueError, match="--dataset_name="):
        load_images(DataConfig(dataset_name=str(tmp_path / "images"), resolution=8, num_channels=1))


def test_an_archive_is_refused(tmp_path: Path) -> None:
    config = image_folder(tmp_path / "images", "a/1.png", "b/2.png")
    (tmp_path / "images" / "more.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="to hold no archive: unpack more.zip"):
        load_images(config)


@pytest.mark.parametrize("file", ["notes.txt", "train.parquet", "scan.dcm"])
def test_a_folder_without_images_is_refused_with_what_lies_there(tmp_path: Path, file: str) -> None:
    """`datasets` alone would read it as unreadable images, which train a class of nothing."""
    (tmp_path / file).write_text("no picture", encoding="utf-8")
    suffix = Path(file).suffix
    with pytest.raises(ValueError, match=rf"--train_data_dir=\S+ .* to hold images; not read: files \*\{suffix}"):
        load_images(DataConfig(train_data_dir=str(tmp_path), resolution=8, num_channels=1))


def test_what_is_not_read_is_known_before_a_row_is_and_no_row_changes_it(tmp_path: Path) -> None:
    config = image_folder(tmp_path / "images", "a/1.png", "b/2.jpg")
    for name in ("a/notes.TXT", "b/scan.dcm", "a/more.dcm", "README"):
        (tmp_path / "images" / name).write_bytes(b"")
    (tmp_path / "images" / "metadata.csv").write_text("file_name,diagnosis,age\n", encoding="utf-8")
    before = open_images(config).unread
    assert before == ("column age of metadata.csv", "column diagnosis of metadata.csv", "files *.dcm", "files *.txt")
    image_folder(tmp_path / "images", "a/2.webp")
    assert open_images(config).unread == before


# --- classes by a column of a table --------------------------------------------------------------------------------


def with_table(
    root: Path, table: str | bytes, *paths: str, name: str = "metadata.csv", **fields: object
) -> DataConfig:
    config = image_folder(root, *(paths or ("1.png", "2.png", "3.png")))
    (root / name).write_bytes(table.encode() if isinstance(table, str) else table)
    given = {"label_column": "kind", "class_names": ["cat", "dog"], **fields}
    return dataclasses.replace(config, **given)  # type: ignore[arg-type]


ODD_LINES = {
    "a class that is not declared": "2.png,unknown",
    "one comma too many": "2.png,dog,",
    "one comma too few": "2.png",
    "23 digits": "2.png," + "1" * 23,
    "an open quote": '"2.png,dog',
    "an open quote at the end": '2.png,"dog',
    "no text": b"2.png,\xff\xfe",
    "a NUL": "2.png,\0",
    "a place elsewhere": "../../etc/passwd,dog",
    "an address": "ftp://127.0.0.1/x.png,dog",
    "a device": "/dev/zero,dog",
    "no name": ",dog",
    "no such file": "9.png,dog",
    "a very long field": "2.png," + "x" * 200_000,
}


@pytest.mark.parametrize("line", ODD_LINES.values(), ids=ODD_LINES)
def test_one_line_of_a_table_is_one_row_whatever_it_holds(line: str | bytes, tmp_path: Path) -> None:
    odd = line if isinstance(line, bytes) else line.encode()
    table = b"file_name,kind\n1.png,cat\n" + odd + b"\n3.png,dog\n"
    config = with_table(tmp_path / "images", table)
    found = load_images(config)
    assert found.labels.tolist() == [0, NO_CONTRIBUTION, 1] and found.class_names == ("cat", "dog")
    assert found.images[0].unique().tolist() == found.images[2].unique().tolist() == [90]


ODD_OBJECTS = {
    "a class that is not declared": '{"file_name": "2.png", "kind": "unknown"}',
    "another type": '{"file_name": "2.png", "kind": [1]}',
    "a name of another type": '{"file_name": 2, "kind": "dog"}',
    "a list": "[1, 2]",
    "no JSON": '{"file_name": "2.png", "kind":',
    "a deep nest": "[" * 100_000,
    "another column": '{"file_name": "2.png", "species": "dog"}',
    "23 digits": '{"file_name": "2.png", "kind": 11111111111111111111111}',
    "not a number": '{"file_name": "2.png", "kind": NaN}',
}


@pytest.mark.parametrize("line", ODD_OBJECTS.values(), ids=ODD_OBJECTS)
def test_one_object_of_json_lines_is_one_row_whatever_it_holds(line: str, tmp_path: Path) -> None:
    table = f'{{"file_name": "1.png", "kind": "cat"}}\n{line}\n{{"file_name": "3.png", "kind": 1}}\n'
    found = load_images(with_table(tmp_path / "images", table, name="metadata.jsonl"))
    assert found.labels.tolist() == [0, NO_CONTRIBUTION, 1]


def test_a_table_in_parquet_brings_its_types(tmp_path: Path) -> None:
    config = with_table(tmp_path / "images", b"", name="metadata.parquet")
    pandas.DataFrame({"file_name": ["3.png", None, "1.png"], "kind": ["dog", "cat", None]}).to_parquet(
        tmp_path / "images" / "metadata.parquet"
    )
    assert load_images(config).labels.tolist() == [1, NO_CONTRIBUTION, NO_CONTRIBUTION]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_of_spreadsheets_are_read(tmp_path: Path, delimiter: str, end: str, mark: bytes) -> None:
    lines = [["kind", "file_name", "note"], ["dog", "2.png", '"a, b; c"'], ["cat", "1.png", ""], []]
    table = mark + end.join(delimiter.join(line) for line in lines).encode()
    assert load_images(with_table(tmp_path / "images", table)).labels.tolist() == [1, 0]


def test_numbers_are_indices_of_the_declared_classes(tmp_path: Path) -> None:
    table = "file_name,kind\n1.png,1\n2.png,0\n3.png,2\n"
    config = with_table(tmp_path / "images", table, class_names=[], num_classes=2)
    assert load_images(config).labels.tolist() == [1, 0, NO_CONTRIBUTION]
    named = dataclasses.replace(config, class_names=["cat", "dog"])
    assert load_images(named).labels.tolist() == [1, 0, NO_CONTRIBUTION]


def test_a_table_may_lie_in_a_sub_folder_or_over_the_splits(tmp_path: Path) -> None:
    paths = ("train/x/1.png", "train/x/2.png", "test/x/3.png")
    config = with_table(
        tmp_path / "a", "file_name,kind\n1.png,dog\n../x/2.png,cat\n", *paths, name="train/x/metadata.csv"
    )
    assert load_images(config).labels.tolist() == [1, 0]
    over = "file_name,kind\ntrain/x/1.png,dog\ntest/x/3.png,cat\n"
    config = with_table(tmp_path / "b", over, *paths)
    assert load_images(config).labels.tolist() == [1]
    assert load_images(config, "test").labels.tolist() == [0]


@pytest.mark.parametrize(
    ("table", "fields", "message"),
    [
        ("file_name,kind\n", {"class_names": []}, "--class_names to be given: --label_column=kind does not name"),
        ("file_name,kind\n", {"label_column": "sort"}, "--label_column=sort to be a column of metadata.csv: it has"),
        ("path,kind\n", {}, "metadata.csv to have a column file_name: it has path, kind"),
        (b"\xff\xfe\n", {}, "metadata.csv to be a table: UnicodeDecodeError in its first line"),
        ('"\n', {}, "metadata.csv to be a table: ValueError in its first line"),
    ],
)
def test_a_table_whose_classes_are_not_declared_is_refused(
    tmp_path: Path, table: str | bytes, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load_images(with_table(tmp_path / "images", table, **fields))
    assert "\n" not in str(refusal.value)


def test_a_label_column_without_a_table_is_refused(tmp_path: Path) -> None:
    config = image_folder(tmp_path / "images", "a/1.png", "b/2.png")
    with pytest.raises(ValueError, match="there is no metadata.csv or metadata.jsonl or metadata.parquet"):
        load_images(dataclasses.replace(config, label_column="kind", class_names=["a", "b"]))


def test_sub_folders_stay_the_classes_where_a_table_lies_beside_them(tmp_path: Path) -> None:
    config = image_folder(tmp_path / "images", "a/1.png", "b/2.png")
    (tmp_path / "images" / "metadata.csv").write_text("file_name,kind\na/1.png,x\nb/2.png,y\n", encoding="utf-8")
    (tmp_path / "images" / "a" / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png"}), encoding="utf-8")
    found = open_images(config)
    assert found.class_names == ("a", "b") and found.labels == "sub-folders"
    assert found.unread == ("column kind of metadata.csv", "table metadata.jsonl")
    assert load_images(config).labels.tolist() == [0, 1]
