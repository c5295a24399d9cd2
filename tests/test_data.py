"""Reading a dataset: where it is found, what each row becomes, and what one row can never do."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dp_curriculum.config import DataConfig
from dp_curriculum.data import (
    MAX_IMAGE_PIXELS,
    NO_CONTRIBUTION,
    bound_images,
    contributing,
    decode_image,
    digits_dataset,
    find_columns,
    load_images,
    open_dataset,
    read_images,
    to_unit_range,
)


def png(image: Any, **options: Any) -> bytes:
    return encoded(image if isinstance(image, Image.Image) else Image.fromarray(image), "PNG", **options)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(value: int, size: int = 8) -> np.ndarray:
    return np.full((size, size), value, dtype=np.uint8)


def decode(data: bytes | Image.Image, num_channels: int = 1, resolution: int = 8) -> np.ndarray:
    value = data if isinstance(data, Image.Image) else {"bytes": data, "path": None}
    pixels = decode_image(value, resolution=resolution, num_channels=num_channels)
    assert pixels is not None
    assert pixels.dtype == np.uint8 and pixels.shape == (num_channels, resolution, resolution)
    return pixels


CLASSES = datasets.ClassLabel(names=["cat", "dog"])


def write_hub_folder(folder: Path, images: Sequence[bytes | None], **columns: tuple[list[Any], Any]) -> Path:
    """A dataset as the Hub lays it out: parquet, with its features in the file. Nothing checks the values."""
    arrays: dict[str, pa.Array] = {
        "image": pa.array(
            [None if image is None else {"bytes": image, "path": None} for image in images],
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


def rows(*images: bytes | None, labels: list[int] | None = None) -> datasets.Dataset:
    """A dataset in memory, whatever its bytes are."""
    columns: dict[str, Any] = {
        "image": [None if image is None else {"bytes": image, "path": None} for image in images]
    }
    features: dict[str, Any] = {"image": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, CLASSES
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


# --- where it is found ---------------------------------------------------------------------------------------------


def test_a_folder_in_hub_layout_is_read(tmp_path: Path) -> None:
    folder = write_hub_folder(
        tmp_path / "my data", [png(grey(0)), png(grey(99)), png(grey(255))], label=([1, 0, 1], CLASSES)
    )
    private = load_images(DataConfig(dataset_name=str(folder), resolution=8))
    assert private.images.shape == (3, 1, 8, 8) and private.images.dtype == torch.uint8
    assert private.images[:, 0, 0, 0].tolist() == [0, 99, 255]
    assert private.labels.tolist() == [1, 0, 1]
    assert private.class_names == ("cat", "dog") and private.num_classes == 2 and len(private) == 3


def test_a_folder_of_images_is_read_one_class_a_subfolder(tmp_path: Path) -> None:
    for name, value in (("dog", 200), ("cat", 100), ("cat", 101)):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(grey(value, 20)).save(tmp_path / name / f"{value}.png")
    (tmp_path / "cat" / "broken.png").write_bytes(b"not an image")
    private = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=8))
    assert private.class_names == ("cat", "dog")
    found = sorted(zip(private.labels.tolist(), private.images[:, 0, 0, 0].tolist()))
    assert found == [(NO_CONTRIBUTION, 0), (0, 100), (0, 101), (1, 200)]


def test_embedded_digits_are_real_and_their_split_is_fixed() -> None:
    train, test = (load_images(DataConfig(dataset_name="digits", resolution=8), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    assert train.labels[:8].tolist() == load_images(DataConfig(resolution=8)).labels[:8].tolist()
    rows = {image.numpy().tobytes() for image in torch.cat([train.images, test.images])}
    assert len(rows) > 1790, "the halves share no image, but for a few digits that were drawn alike"
    assert train.images.max() == 255 and train.images.min() == 0
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    with pytest.raises(ValueError, match="--dataset_split=validation to be train or test for --dataset_name=digits"):
        digits_dataset("validation")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset_name": "nobody/has-this"}, r"--dataset_name=nobody/has-this with --dataset_split=train to be"),
        ({"dataset_name": "./no-such-folder"}, r"--dataset_name=./no-such-folder with .* to be a readable dataset: "),
        ({"train_data_dir": "./no-such-folder"}, r"--train_data_dir=./no-such-folder to be a folder"),
    ],
)
def test_an_unknown_dataset_is_one_line_that_names_the_option(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_dataset(DataConfig(**fields))
    assert "\n" not in str(caught.value)


def test_an_unknown_split_or_configuration_is_refused(tmp_path: Path) -> None:
    folder = str(write_hub_folder(tmp_path / "data", [png(grey(0))]))
    with pytest.raises(ValueError, match="--dataset_split=validation to be a readable dataset"):
        open_dataset(DataConfig(dataset_name=folder, dataset_split="validation"))
    with pytest.raises(ValueError, match="to be a readable dataset: .*large"):
        open_dataset(DataConfig(dataset_name=folder, dataset_config_name="large"))


def test_a_streaming_dataset_of_the_caller_is_refused(tmp_path: Path) -> None:
    stream = rows(png(grey(0))).to_iterable_dataset()
    with pytest.raises(ValueError, match="needs random access.*without streaming=True"):
        read_images(stream, DataConfig(resolution=8))


# --- columns -------------------------------------------------------------------------------------------------------


def features(**columns: Any) -> datasets.Features:
    return datasets.Features(columns)


IMAGE, NUMBER, TEXT = datasets.Image(), datasets.Value("int64"), datasets.Value("string")


def test_columns_are_found_by_their_feature_types() -> None:
    found = find_columns(features(id=NUMBER, digit=CLASSES, picture=IMAGE), DataConfig())
    assert found == ("picture", "digit", ("cat", "dog"))


def test_named_columns_go_before_types() -> None:
    columns = features(a=IMAGE, b=IMAGE, c=CLASSES, d=NUMBER)
    config = DataConfig(image_column="b", label_column="d", num_classes=3)
    assert find_columns(columns, config) == ("b", "d", ("0", "1", "2"))
    assert find_columns(columns, DataConfig(image_column="a")) == ("a", "c", ("cat", "dog"))


@pytest.mark.parametrize("config", [DataConfig(label_column="none"), DataConfig(num_classes=5)])
def test_unlabelled_data_is_one_class(config: DataConfig) -> None:
    columns = features(image=IMAGE, label=CLASSES) if config.label_column else features(image=IMAGE, size=NUMBER)
    assert find_columns(columns, config) == ("image", None, ("image",))
    private = read_images(rows(png(grey(3)), png(grey(4))), DataConfig(resolution=8))
    assert private.labels.tolist() == [0, 0] and private.num_classes == 1


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        (features(label=CLASSES), DataConfig(), "--image_column to be given: none of label holds images"),
        (features(a=IMAGE, b=IMAGE), DataConfig(), "--image_column to be given: .* several candidates, a, b"),
        (features(a=IMAGE), DataConfig(image_column="b"), "--image_column=b to be a column: the dataset has a"),
        (features(a=TEXT), DataConfig(image_column="a"), "--image_column=a to hold images: .*cast_column"),
        (features(a=IMAGE, b=CLASSES, c=CLASSES), DataConfig(), "--label_column to be given: .* candidates, b, c"),
        (features(a=IMAGE), DataConfig(label_column="b"), "--label_column=b to be a column: the dataset has a"),
        (features(a=IMAGE, b=NUMBER), DataConfig(label_column="b"), "--num_classes to be given: --label_column=b"),
        (features(a=IMAGE, b=CLASSES), DataConfig(num_classes=3), "--num_classes=3 to match the 2 names"),
        (features(a=IMAGE, b=TEXT), DataConfig(label_column="b", num_classes=2), "--label_column=b to hold integers"),
        (features(a=IMAGE), DataConfig(label_column="a", num_classes=2), "--label_column=a to hold integers"),
    ],
)
def test_missing_and_ambiguous_columns_are_refused(
    columns: datasets.Features, config: DataConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        find_columns(columns, config)
    assert "\n" not in str(caught.value)


# --- what a row becomes --------------------------------------------------------------------------------------------


def test_grey_and_colour_are_converted_to_the_declared_channels() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert decode(png(red), 3)[:, 0, 0].tolist() == [255, 0, 0]
    assert decode(png(red), 1)[0, 0, 0] == 76, "ITU-R 601 luma of red"
    assert decode(png(grey(40)), 3)[:, 0, 0].tolist() == [40, 40, 40]
    assert decode(png(red.convert("RGBA")), 3)[:, 0, 0].tolist() == [255, 0, 0]
    assert decode(png(red.convert("P")), 3)[:, 0, 0].tolist() == [255, 0, 0]
    assert decode(png(Image.new("1", (8, 8), 1)), 3)[:, 0, 0].tolist() == [255, 255, 255]
    assert decode(png(Image.new("LA", (8, 8), (40, 0))), 1)[0, 0, 0] == 40, "transparency is no pixel value"
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")
    assert decode(cmyk, 3)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("num_channels", [1, 3])
def test_sixteen_bit_and_float_images_are_scaled_and_bounded(num_channels: int) -> None:
    deep = np.linspace(0, 65535, 64).reshape(8, 8)
    expected = np.round(deep / 257).astype(np.uint8)
    for data in (png(deep.astype(np.uint16)), encoded(Image.fromarray(deep.astype(np.int32)), "TIFF")):
        assert np.abs(decode(data, num_channels)[0].astype(int) - expected).max() <= 1
    far = np.array([[-5.0, 0.0, 0.5, 1.0, 17.0, np.nan, np.inf, -np.inf]] * 8, dtype=np.float32)
    assert decode(encoded(Image.fromarray(far), "TIFF"), num_channels)[0, 0].tolist() == [
        0,
        0,
        128,
        255,
        255,
        0,
        255,
        0,
    ]
    outside = np.array([[-70000, 70000] * 4] * 8, dtype=np.int32)
    assert decode(encoded(Image.fromarray(outside), "TIFF"), num_channels)[0, 0, :2].tolist() == [0, 255]


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(np.concatenate([grey(0)[:4], grey(255)[:4]]))  # dark above, light below
    exif = Image.Exif()
    exif[0x0112] = 3  # turned upside down
    pixels = decode(png(image, exif=exif))
    assert pixels[0, 0, 0] == 255 and pixels[0, 7, 0] == 0


def test_the_first_frame_of_an_animation_is_the_image() -> None:
    frames = [Image.fromarray(grey(value)) for value in (10, 200, 90)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0, 0] == 10


def test_other_sizes_are_cropped_to_the_middle_and_resized() -> None:
    wide = np.zeros((16, 48), dtype=np.uint8)
    wide[:, 16:32] = 255
    pixels = decode(png(wide))[0]  # the filter looks a little beyond the crop
    assert (pixels[:, 1:-1] == 255).all() and pixels.min() > 200
    assert decode(png(grey(7, size=3)), resolution=8)[0, 4, 4] == 7
    assert decode(png(grey(7, size=1)), resolution=8)[0, 4, 4] == 7


def bomb(side: int) -> bytes:
    """A valid PNG of few bytes and many pixels: one bit each, all black."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes((1 + (side + 7) // 8) * side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


UNREADABLE: dict[str, Callable[[], bytes | None]] = {
    "missing": lambda: None,
    "empty": lambda: b"",
    "text": lambda: b"secret-name.png is not an image",
    "truncated": lambda: png(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))[:-900],
    "bit flip": lambda: b"\x09" + png(grey(5))[1:],
    "too large": lambda: bomb(int(MAX_IMAGE_PIXELS**0.5) + 1),
    "larger than Pillow's warning": lambda: bomb(11_000),
    "larger than Pillow's limit": lambda: bomb(20_000),
    "in a mode without grey": lambda: encoded(Image.new("LAB", (8, 8)), "TIFF"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_row_contributes_nothing_and_is_not_seen(
    kind: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is raised or warned of, the log is that of readable rows, and the other rows are as they were."""
    good = [png(grey(10)), png(grey(20))]
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        private = read_images(rows(good[0], UNREADABLE[kind](), good[1], labels=[0, 1, 1]), DataConfig(resolution=8))
    assert private.labels.tolist() == [0, NO_CONTRIBUTION, 1]
    assert private.images[:, 0, 0, 0].tolist() == [10, 0, 20]
    logged = caplog.messages.copy()
    caplog.clear()
    plain = read_images(rows(good[0], good[0], good[1], labels=[0, 1, 1]), DataConfig(resolution=8))
    assert len(plain) == len(private)
    printed = capfd.readouterr()
    assert not printed.out and "secret" not in printed.err and "arning" not in printed.err
    assert logged == caplog.messages == ["reading images"]


def test_a_large_image_below_the_limit_is_read() -> None:
    """The control of the bombs: the same file of a size that is allowed."""
    assert (decode(bomb(2000)) == 0).all()


def test_warnings_that_a_row_sets_off_are_not_shown() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decode_image({"bytes": bomb(11_000), "path": None}, resolution=8, num_channels=1)
    assert not seen


@pytest.mark.parametrize("label", [None, -1, -7, 2, 10**12], ids=str)
def test_a_missing_or_unknown_label_contributes_nothing_and_stops_nothing(label: int | None, tmp_path: Path) -> None:
    images = [png(grey(10)), png(grey(20)), png(grey(30))]
    folder = write_hub_folder(tmp_path / "data", images, label=([0, label, 1], CLASSES))
    private = load_images(DataConfig(dataset_name=str(folder), resolution=8))
    assert private.labels.tolist() == [0, NO_CONTRIBUTION, 1]
    assert len(private) == 3 and private.num_classes == 2
    assert contributing(private.labels, 2).tolist() == [True, False, True]


def test_labels_without_names_are_taken_by_value(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "data", [png(grey(0))] * 4, y=([2, 0, 3, None], NUMBER))
    config = DataConfig(dataset_name=str(folder), resolution=8, label_column="y", num_classes=3)
    assert load_images(config).labels.tolist() == [2, 0, NO_CONTRIBUTION, NO_CONTRIBUTION]
    fractions = write_hub_folder(
        tmp_path / "more", [png(grey(0))] * 3, y=([1.0, 0.5, np.nan], datasets.Value("float64"))
    )
    config = DataConfig(dataset_name=str(fractions), resolution=8, label_column="y", num_classes=3)
    assert load_images(config).labels.tolist() == [1, NO_CONTRIBUTION, NO_CONTRIBUTION]


def test_classes_are_those_declared_whichever_rows_there_are() -> None:
    """The class list is public: it does not shrink when the only image of a class leaves."""
    both = read_images(rows(png(grey(0)), png(grey(1)), labels=[0, 1]), DataConfig(resolution=8))
    one = read_images(rows(png(grey(0)), labels=[0]), DataConfig(resolution=8))
    none = read_images(rows(labels=[]), DataConfig(resolution=8))
    assert both.class_names == one.class_names == none.class_names == ("cat", "dog")
    assert none.images.shape == (0, 1, 8, 8) and none.labels.dtype == torch.int64


def test_float_images_are_bounded_whatever_they_hold() -> None:
    far = torch.tensor([-7.0, 0.25, 255.0, torch.nan, torch.inf, -torch.inf])
    assert bound_images(far).tolist() == [0.0, 0.25, 1.0, 0.0, 1.0, 0.0]
    stored = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    unit = to_unit_range(stored)
    assert unit.dtype == torch.float32 and unit.min() == 0 and unit.max() == 1
    torch.testing.assert_close((unit * 255).round().to(torch.uint8), stored)


# --- caches --------------------------------------------------------------------------------------------------------


READ = """
import sys
from dp_curriculum.config import DataConfig
from dp_curriculum.data import load_images
hub, folder = sys.argv[1:]
assert len(load_images(DataConfig(dataset_name=hub, resolution=32))) == 3
assert len(load_images(DataConfig(train_data_dir=folder, resolution=32))) == 1
"""
READ_THE_ORDINARY_WAY = "import sys, datasets; print(len(datasets.load_dataset(sys.argv[1], split='train')))"


def test_no_pixel_reaches_a_cache(tmp_path: Path) -> None:
    """Negative control: `datasets.load_dataset` as it is commonly called leaves the very bytes in its cache."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    planted = png(noise)
    hub = write_hub_folder(tmp_path / "hub", [png(grey(0)), planted, None], label=([0, 1, 1], CLASSES))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "secret.png").write_bytes(planted)

    def traces(script: str, *arguments: Path, home: Path) -> list[Path]:
        for name in ("tmp", "hf"):
            (home / name).mkdir(parents=True)
        environment = {**os.environ, "HF_HOME": str(home / "hf"), "TMPDIR": str(home / "tmp"), "HOME": str(home)}
        command = [sys.executable, "-c", script, *map(str, arguments)]
        subprocess.run(command, env=environment, cwd=home, check=True, capture_output=True, timeout=120)
        written = [path for path in home.rglob("*") if path.is_file()]
        marks = (planted[60:100], noise[5].tobytes(), noise[20].tobytes())
        return [path for path in written if any(mark in path.read_bytes() for mark in marks)]

    assert traces(READ_THE_ORDINARY_WAY, hub, home=tmp_path / "ordinary")
    assert not traces(READ, hub, tmp_path / "images", home=tmp_path / "ours")


def image_folder(root: Path, *paths: str) -> DataConfig:
    """Images, and where a path ends with a slash, empty folders."""
    for path in paths:
        folder = root / path if path.endswith("/") else (root / path).parent
        folder.mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            Image.fromarray(grey(90)).save(root / path)
    return DataConfig(train_data_dir=str(root), resolution=8)


@pytest.mark.parametrize("others", [[], ["c/2.png"]])
def test_one_image_more_or_less_does_not_change_the_classes_of_a_folder(tmp_path: Path, others: list[str]) -> None:
    """Neighbours: the only image of class b is there, or not."""
    with_it = load_images(image_folder(tmp_path / "with", "a/1.png", "b/9.png", *others))
    without = load_images(image_folder(tmp_path / "without", "a/1.png", "b/", *others))
    assert with_it.class_names == without.class_names == tuple("abc"[: 2 + len(others)])
    assert sorted(with_it.labels.tolist()) == sorted([*without.labels.tolist(), 1])


@pytest.mark.parametrize("odd", ["3.png", "b/train-3.png", "b/x_test_3.png", "._3.png", "list.png.txt", "b/notes.txt"])
def test_the_name_and_place_of_one_file_change_nothing_for_the_others(tmp_path: Path, odd: str) -> None:
    """`datasets` by itself makes splits of file names, and takes labels away for one image at another depth."""
    config = image_folder(tmp_path / "images", "a/1.png", "b/2.png", "c/")
    before = load_images(config)
    (tmp_path / "images" / odd).write_bytes((tmp_path / "images" / "a" / "1.png").read_bytes())
    after = load_images(config)
    assert after.class_names == before.class_names == ("a", "b", "c")
    assert after.labels.tolist() in (before.labels.tolist(), [*before.labels.tolist(), 1])


def test_a_folder_of_images_is_the_same_by_either_option_and_through_links(tmp_path: Path) -> None:
    config = image_folder(tmp_path / "images", "a/1.png", "b/2.png", "c/")
    (tmp_path / "images" / "d").symlink_to(tmp_path / "images" / "a", target_is_directory=True)
    named = load_images(DataConfig(dataset_name=str(tmp_path / "images"), resolution=8))
    assert named.class_names == load_images(config).class_names == ("a", "b", "c", "d")
    assert named.labels.tolist() == load_images(config).labels.tolist() == [0, 1, 3]


def test_a_link_that_leads_back_ends_nothing(tmp_path: Path) -> None:
    config = image_folder(tmp_path / "images", "a/1.png")
    (tmp_path / "images" / "a" / "back").symlink_to(tmp_path / "images", target_is_directory=True)
    assert load_images(config).labels.tolist() == [0]


def test_the_option_that_named_a_folder_is_the_one_that_is_told(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", "a/1.png", "b/c/2.png")
    with pytest.raises(ValueError, match="--dataset_name="):
        load_images(DataConfig(dataset_name=str(tmp_path / "images"), resolution=8))


def test_a_table_of_metadata_is_read_by_datasets(tmp_path: Path) -> None:
    config = image_folder(tmp_path / "images", "1.png", "2.png")
    (tmp_path / "images" / "metadata.csv").write_text("file_name,kind\n1.png,1\n2.png,0\n", encoding="utf-8")
    found = load_images(dataclasses.replace(config, label_column="kind", num_classes=2))
    assert found.labels.tolist() == [1, 0]


@pytest.mark.parametrize("odd", ["test-3.png", "train-3.png"])
def test_with_a_table_the_name_of_one_file_changes_nothing_for_the_others(tmp_path: Path, odd: str) -> None:
    config = image_folder(tmp_path / "images", "1.png", "2.png", odd)
    table = f"file_name,kind\n1.png,1\n2.png,0\n{odd},1\n"
    (tmp_path / "images" / "metadata.csv").write_text(table, encoding="utf-8")
    found = load_images(dataclasses.replace(config, label_column="kind", num_classes=2))
    assert sorted(found.labels.tolist()) == [0, 1, 1]


def test_an_archive_is_refused(tmp_path: Path) -> None:
    config = image_folder(tmp_path / "images", "a/1.png", "b/2.png")
    (tmp_path / "images" / "more.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="to hold no archive: unpack more.zip"):
        load_images(config)


def test_an_error_while_rows_are_read_says_nothing_of_a_row(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"image": {"bytes": png(grey(0)), "path": None}, "label": 0}
        raise RuntimeError("row 1: a name")

    features = datasets.Features({"image": datasets.Image(), "label": CLASSES})
    broken = datasets.IterableDataset.from_generator(rows, features=features)
    with pytest.raises(ValueError, match="readable to its end: RuntimeError") as refusal:
        read_images(broken, DataConfig(resolution=8), streamed=True)
    assert "a name" not in str(refusal.value)


@pytest.mark.parametrize(
    ("paths", "class_names", "labels"),
    [
        (["1.png", "2.png"], ("image",), [0, 0]),
        (["a/1.png", "a/2.png"], ("image",), [0, 0]),
        (["train/1.png", "test/2.png"], ("image",), [0]),
        (["train/a/1.png", "train/b/", "test/b/2.png"], ("a", "b"), [0]),
        (["a/1.png", ".hidden/", "__more/", "b/2.png"], ("a", "b"), [0, 1]),
        (["1.png", "b/2.png"], ("image",), [0, 0]),
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
        with pytest.raises(ValueError, match=r"--train_data_dir=\S+ to be folders of images: \w+ has folders"):
            load_images(config)
        return
    found = load_images(config)
    assert found.class_names == class_names and sorted(found.labels.tolist()) == labels


@pytest.mark.parametrize("file", ["notes.txt", "train.parquet"])
def test_a_folder_without_images_is_refused(tmp_path: Path, file: str) -> None:
    """`datasets` alone would read it as unreadable images, which train a class of nothing."""
    (tmp_path / file).write_text("no picture", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--train_data_dir=\S+ to hold image files: .* --dataset_name="):
        load_images(DataConfig(train_data_dir=str(tmp_path), resolution=8))
