"""From a source into memory: what each row becomes, and what one row can never do."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pictures import CLASSES, NUMBER, bomb, encoded, grey, photo, png, read, rows, write_hub_folder
from PIL import Image

from dp_curriculum.config import DataConfig
from dp_curriculum.data.decoding import MAX_IMAGE_PIXELS
from dp_curriculum.data.images import NO_CONTRIBUTION, bound_images, contributing, to_unit_range
from dp_curriculum.data.reading import load_images, read_images
from dp_curriculum.data.sources import open_rows


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
    "a decoder that prints": lambda: encoded(photo(), "TIFF", compression="tiff_adobe_deflate").replace(
        b"x\x9c", b"xx"
    ),
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
        private = read(rows(good[0], UNREADABLE[kind](), good[1], labels=[0, 1, 1]))
    assert private.labels.tolist() == [0, NO_CONTRIBUTION, 1]
    assert private.images[:, 0, 0, 0].tolist() == [10, 0, 20]
    logged = caplog.messages.copy()
    caplog.clear()
    plain = read(rows(good[0], good[0], good[1], labels=[0, 1, 1]))
    assert len(plain) == len(private)
    printed = capfd.readouterr()
    assert not printed.out and not printed.err
    assert logged == caplog.messages == ["reading images"]


def test_the_decoder_that_prints_does_print_where_it_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    """The control of the test above: what Pillow's decoder of TIFF writes to descriptor 2, past Python."""
    with pytest.raises(OSError), Image.open(io.BytesIO(UNREADABLE["a decoder that prints"]() or b"")) as image:
        image.load()
    assert "Decod" in capfd.readouterr().err


@pytest.mark.parametrize("label", [None, -1, -7, 2, 10**12], ids=str)
def test_a_missing_or_unknown_label_contributes_nothing_and_stops_nothing(label: int | None, tmp_path: Path) -> None:
    images = [png(grey(10)), png(grey(20)), png(grey(30))]
    folder = write_hub_folder(tmp_path / "data", images, label=([0, label, 1], CLASSES))
    private = load_images(DataConfig(dataset_name=str(folder), resolution=8, num_channels=1))
    assert private.labels.tolist() == [0, NO_CONTRIBUTION, 1]
    assert len(private) == 3 and private.num_classes == 2
    assert contributing(private.labels, 2).tolist() == [True, False, True]


def test_labels_without_names_are_taken_by_value(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "data", [png(grey(0))] * 4, y=([2, 0, 3, None], NUMBER))
    config = DataConfig(dataset_name=str(folder), resolution=8, num_channels=1, label_column="y", num_classes=3)
    assert load_images(config).labels.tolist() == [2, 0, NO_CONTRIBUTION, NO_CONTRIBUTION]
    fractions = write_hub_folder(
        tmp_path / "more", [png(grey(0))] * 3, y=([1.0, 0.5, np.nan], datasets.Value("float64"))
    )
    config = DataConfig(dataset_name=str(fractions), resolution=8, num_channels=1, label_column="y", num_classes=3)
    assert load_images(config).labels.tolist() == [1, NO_CONTRIBUTION, NO_CONTRIBUTION]


def test_labels_in_words_are_read_with_declared_names(tmp_path: Path) -> None:
    words = (["eye", "lung", None, "unknown"], datasets.Value("string"))
    folder = write_hub_folder(tmp_path / "data", [png(grey(0))] * 4, y=words)
    names = ["lung", "skin", "eye"]
    found = load_images(
        DataConfig(dataset_name=str(folder), resolution=8, num_channels=1, label_column="y", class_names=names)
    )
    assert found.labels.tolist() == [2, 0, NO_CONTRIBUTION, NO_CONTRIBUTION] and found.class_names == tuple(names)


def test_classes_are_those_declared_whichever_rows_there_are() -> None:
    """The class list is public: it does not shrink when the only image of a class leaves."""
    both = read(rows(png(grey(0)), png(grey(1)), labels=[0, 1]))
    one = read(rows(png(grey(0)), labels=[0]))
    none = read(rows(labels=[]))
    assert both.class_names == one.class_names == none.class_names == ("cat", "dog")
    assert none.images.shape == (0, 1, 8, 8) and none.labels.dtype == torch.int64


def test_many_rows_come_in_their_order_whatever_lies_between() -> None:
    """More than one request and more than one worker; one row ends its worker."""
    images: list[bytes | None] = [png(grey(index % 251)) for index in range(300)]
    images[70], images[200] = None, b"junk"
    found = read(rows(*images))
    expected = [index % 251 for index in range(300)]
    expected[70] = expected[200] = 0
    assert found.images[:, 0, 0, 0].tolist() == expected
    assert (found.labels == NO_CONTRIBUTION).nonzero()[:, 0].tolist() == [70, 200]


def test_float_images_are_bounded_whatever_they_hold() -> None:
    far = torch.tensor([-7.0, 0.25, 255.0, torch.nan, torch.inf, -torch.inf])
    assert bound_images(far).tolist() == [0.0, 0.25, 1.0, 0.0, 1.0, 0.0]
    stored = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    unit = to_unit_range(stored)
    assert unit.dtype == torch.float32 and unit.min() == 0 and unit.max() == 1
    torch.testing.assert_close((unit * 255).round().to(torch.uint8), stored)


def test_an_error_while_rows_are_read_says_nothing_of_a_row() -> None:
    def broken() -> object:
        yield {"image": {"bytes": png(grey(0)), "path": None}, "label": 0}
        raise RuntimeError("row 1: a name")

    features = datasets.Features({"image": datasets.Image(), "label": CLASSES})
    stream = datasets.IterableDataset.from_generator(broken, features=features)
    config = DataConfig(resolution=8)
    with pytest.raises(ValueError, match="readable to its end: RuntimeError") as refusal:
        read_images(open_rows(stream, config, kind="hub"), config)
    assert "a name" not in str(refusal.value)


# --- caches --------------------------------------------------------------------------------------------------------


READ = """
import sys
from dp_curriculum.config import DataConfig
from dp_curriculum.data import load_images
hub, folder = sys.argv[1:]
assert len(load_images(DataConfig(dataset_name=hub, resolution=32, num_channels=1))) == 3
assert len(load_images(DataConfig(train_data_dir=folder, resolution=32, num_channels=1))) == 1
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
