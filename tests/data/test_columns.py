"""Columns and classes are settled from types and options; no row has a say."""

from __future__ import annotations

import datasets
import pytest
from pictures import CLASSES, IMAGE, NUMBER, TEXT

from dp_curriculum.config import DataConfig
from dp_curriculum.data.columns import Columns, find_columns, label_index
from dp_curriculum.data.images import NO_CONTRIBUTION


def features(**columns: object) -> datasets.Features:
    return datasets.Features(columns)


def test_columns_are_found_by_their_feature_types() -> None:
    found = find_columns(features(id=NUMBER, digit=CLASSES, picture=IMAGE), DataConfig())
    assert found == Columns("picture", "digit", ("cat", "dog"), unread=("id",))


def test_named_columns_go_before_types() -> None:
    columns = features(a=IMAGE, b=IMAGE, c=CLASSES, d=NUMBER)
    config = DataConfig(image_column="b", label_column="d", num_classes=3)
    assert find_columns(columns, config) == Columns("b", "d", ("0", "1", "2"), unread=("a", "c"))
    assert find_columns(columns, DataConfig(image_column="a")) == Columns("a", "c", ("cat", "dog"), unread=("b", "d"))


def test_unlabelled_data_is_one_class_and_what_is_not_read_is_known() -> None:
    found = find_columns(features(image=IMAGE, label=CLASSES), DataConfig(label_column="none"))
    assert found == Columns("image", None, ("image",), unread=("label",))
    found = find_columns(features(image=IMAGE, size=NUMBER), DataConfig())
    assert found == Columns("image", None, ("image",), unread=("size",))


def test_images_of_another_program_are_known_by_their_bytes_and_path() -> None:
    """What pandas or pyarrow write of a column of images, without the types of `datasets`."""
    bare = features(picture={"bytes": datasets.Value("binary"), "path": TEXT}, size=NUMBER)
    assert find_columns(bare, DataConfig()).image == "picture"
    assert find_columns(features(raw=datasets.Value("binary")), DataConfig(image_column="raw")).image == "raw"


@pytest.mark.parametrize("kind", [TEXT, NUMBER, datasets.Value("float32"), datasets.Value("bool")])
def test_declared_names_are_the_classes_of_text_and_numbers(kind: datasets.Value) -> None:
    config = DataConfig(label_column="b", class_names=["lung", "skin", "eye"])
    assert find_columns(features(a=IMAGE, b=kind), config).class_names == ("lung", "skin", "eye")


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        (features(label=CLASSES), DataConfig(), "--image_column to be given: none of label holds images"),
        (features(a=IMAGE, b=IMAGE), DataConfig(), "--image_column to be given: .* several candidates, a, b"),
        (features(a=IMAGE), DataConfig(image_column="b"), "--image_column=b to be a column: the dataset has a"),
        (features(a=NUMBER), DataConfig(image_column="a"), "--image_column=a to hold images: its type is Value"),
        (features(a=IMAGE, b=CLASSES, c=CLASSES), DataConfig(), "--label_column to be given: .* candidates, b, c"),
        (features(a=IMAGE), DataConfig(label_column="b"), "--label_column=b to be a column: the dataset has a"),
        (
            features(a=IMAGE, b=NUMBER),
            DataConfig(label_column="b"),
            "--class_names to be given: --label_column=b .*or --num",
        ),
        (features(a=IMAGE, b=CLASSES), DataConfig(num_classes=3), "--num_classes=3 to match the 2 names"),
        (
            features(a=IMAGE, b=CLASSES),
            DataConfig(class_names=["dog", "cat"]),
            "--class_names=dog cat to be those of --label_column=b, in their order: cat dog",
        ),
        (
            features(a=IMAGE, b=TEXT),
            DataConfig(label_column="b", num_classes=2),
            "--class_names to be given: --label_column=b does not name its classes; list all of them.$",
        ),
        (features(a=IMAGE), DataConfig(label_column="a", num_classes=2), "--label_column=a to hold names, integers"),
        (features(a=IMAGE, b=NUMBER), DataConfig(num_classes=5), "--num_classes=5 to come with --label_column, one"),
        (features(a=IMAGE), DataConfig(class_names=["a", "b"]), "--class_names=a b to come with .* no column beside"),
    ],
)
def test_missing_and_ambiguous_columns_are_refused(
    columns: datasets.Features, config: DataConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        find_columns(columns, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "index"),
    [
        (0, 0),
        (1.0, 1),
        (True, 1),
        ("dog", 1),
        (" cat ", 0),
        ("1", 1),
        (2, NO_CONTRIBUTION),
        (-1, NO_CONTRIBUTION),
        (0.5, NO_CONTRIBUTION),
        (float("nan"), NO_CONTRIBUTION),
        (float("inf"), NO_CONTRIBUTION),
        (None, NO_CONTRIBUTION),
        ("", NO_CONTRIBUTION),
        ("unknown", NO_CONTRIBUTION),
        ("Dog", NO_CONTRIBUTION),
        ("12345678901234567890123", NO_CONTRIBUTION),
        (12345678901234567890123, NO_CONTRIBUTION),
        ("-1", NO_CONTRIBUTION),
        ("\u0661", NO_CONTRIBUTION),  # a digit of another script
        ([0], NO_CONTRIBUTION),
        ({"a": 0}, NO_CONTRIBUTION),
        (b"cat", NO_CONTRIBUTION),
    ],
    ids=str,
)
def test_a_label_is_a_declared_class_or_nothing(value: object, index: int) -> None:
    assert label_index(value, ("cat", "dog")) == index


def test_a_name_goes_before_an_index() -> None:
    assert label_index("1", ("1", "0")) == 0
