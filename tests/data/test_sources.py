"""Where a dataset is found, and that a row can name no other place."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pictures import CLASSES, grey, png, read, rows, write_hub_folder
from PIL import Image

from dp_curriculum.config import DataConfig
from dp_curriculum.data.images import NO_CONTRIBUTION
from dp_curriculum.data.reading import load_images
from dp_curriculum.data.sources import digits_dataset, open_images, open_rows


def test_a_folder_in_hub_layout_is_read(tmp_path: Path) -> None:
    folder = write_hub_folder(
        tmp_path / "my data", [png(grey(0)), png(grey(99)), png(grey(255))], label=([1, 0, 1], CLASSES)
    )
    private = load_images(DataConfig(dataset_name=str(folder), resolution=8, num_channels=1))
    assert private.images.shape == (3, 1, 8, 8) and private.images.dtype == torch.uint8
    assert private.images[:, 0, 0, 0].tolist() == [0, 99, 255]
    assert private.labels.tolist() == [1, 0, 1]
    assert private.class_names == ("cat", "dog") and private.num_classes == 2 and len(private) == 3


def test_embedded_digits_are_real_and_their_split_is_fixed() -> None:
    train, test = (
        load_images(DataConfig(dataset_name="digits", resolution=8, num_channels=1), split)
        for split in ("train", "test")
    )
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    assert train.labels[:8].tolist() == load_images(DataConfig(resolution=8)).labels[:8].tolist()
    images = {image.numpy().tobytes() for image in torch.cat([train.images, test.images])}
    assert len(images) > 1790, "the halves share no image, but for a few digits that were drawn alike"
    assert train.images.max() == 255 and train.images.min() == 0
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    with pytest.raises(ValueError, match="--dataset_split=validation to be train or test for --dataset_name=digits"):
        digits_dataset("validation")


@pytest.mark.parametrize("splits", [False, True])
def test_what_save_to_disk_wrote_is_read(tmp_path: Path, splits: bool) -> None:
    saved: Any = rows(png(grey(3)), None, png(grey(4)), labels=[1, 0, 0])
    saved = datasets.DatasetDict({"train": saved, "test": saved.select([0])}) if splits else saved
    saved.save_to_disk(tmp_path / "saved")
    config = DataConfig(dataset_name=str(tmp_path / "saved"), resolution=8, num_channels=1)
    found = load_images(config)
    assert found.images[:, 0, 0, 0].tolist() == [3, 0, 4] and found.labels.tolist() == [1, NO_CONTRIBUTION, 0]
    if splits:
        assert len(load_images(config, "test")) == 1
        with pytest.raises(ValueError, match="--dataset_split=val to be a readable dataset: its splits are train, t"):
            open_images(config, "val")


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
        open_images(DataConfig(**fields))
    assert "\n" not in str(caught.value)


def test_an_unknown_split_or_configuration_is_refused(tmp_path: Path) -> None:
    folder = str(write_hub_folder(tmp_path / "data", [png(grey(0))]))
    with pytest.raises(ValueError, match="--dataset_split=validation to be a readable dataset"):
        open_images(DataConfig(dataset_name=folder, dataset_split="validation"))
    with pytest.raises(ValueError, match="to be a readable dataset: .*large"):
        open_images(DataConfig(dataset_name=folder, dataset_config_name="large"))


def test_a_streaming_dataset_of_the_caller_is_refused() -> None:
    stream = rows(png(grey(0))).to_iterable_dataset()
    with pytest.raises(ValueError, match="needs random access.*without streaming=True"):
        read(stream)  # type: ignore[arg-type]


def test_a_transform_that_would_not_be_applied_is_refused() -> None:
    turned = rows(png(grey(0))).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match="to have no transform: apply it with map"):
        read(turned)


# --- layouts in which rows decide on types -------------------------------------------------------------------------


def write_json(folder: Path) -> None:
    (folder / "train.jsonl").write_text(json.dumps({"image": "a.png", "label": 1}), encoding="utf-8")


def write_csv(folder: Path) -> None:
    (folder / "train.csv").write_text("image,label\na.png,1\n", encoding="utf-8")


def write_tar(folder: Path) -> None:
    import io
    import tarfile

    with tarfile.open(folder / "train-000.tar", "w") as archive:
        for name, data in (("0.png", png(grey(0))), ("0.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def online(hub: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Hub of this machine, for `datasets` too."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return hub


@pytest.mark.parametrize("write", [write_json, write_csv, write_tar])
def test_a_layout_whose_types_rows_decide_on_is_refused(write: Any, tmp_path: Path, online: Any) -> None:
    """Locally these are folders without images; on the Hub they are what `datasets` would read."""
    write(tmp_path)
    with pytest.raises(ValueError, match=r"to hold images; not read: files \*\.(jsonl|csv|tar)"):
        load_images(DataConfig(dataset_name=str(tmp_path), resolution=8, num_channels=1))
    online.put("org/data", {path.name: path.read_bytes() for path in tmp_path.iterdir()}, kind="dataset")
    with pytest.raises(ValueError, match="Refusing to read --dataset_name=org/data: in .* data the rows decide"):
        open_images(DataConfig(dataset_name="org/data", resolution=8, num_channels=1))


def test_loose_images_on_the_hub_are_refused_with_what_to_do(online: Any) -> None:
    """Their classes would be those of the files: one image of a new class would shift all the others."""
    online.put("org/loose", dict.fromkeys(("a/1.png", "b/2.png"), png(grey(0))), kind="dataset")
    with pytest.raises(ValueError, match="in imagefolder data the rows decide .* --train_data_dir"):
        open_images(DataConfig(dataset_name="org/loose", resolution=8, num_channels=1))


def test_parquet_on_the_hub_is_read_and_a_row_opens_nothing_there(tmp_path: Path, online: Any) -> None:
    elsewhere = {"bytes": None, "path": "hf://datasets/org/other@main/1.png"}
    folder = write_hub_folder(tmp_path / "data", [png(grey(3)), elsewhere, png(grey(4))], label=([1, 0, 0], CLASSES))
    online.put("org/data", {"data/train.parquet": next(folder.rglob("*.parquet")).read_bytes()}, kind="dataset")
    online.put("org/other", {"1.png": png(grey(9))}, kind="dataset")
    config = DataConfig(dataset_name="org/data", resolution=8, num_channels=1)
    source = open_images(config)
    assert (source.kind, source.place) == ("hub", "org/data")
    found = load_images(config)
    assert found.labels.tolist() == [1, NO_CONTRIBUTION, 0] and found.images[:, 0, 0, 0].tolist() == [3, 0, 4]
    assert not any("org/other" in request for request in online.requests)


# --- a row names a place -------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Any:
    """A server that notes who connects."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    seen: list[Any] = []
    stop = threading.Event()

    def accept() -> None:
        while not stop.is_set():
            try:
                connection, address = server.accept()
            except OSError:
                continue
            seen.append(address)
            connection.close()

    thread = threading.Thread(target=accept)
    thread.start()
    yield server.getsockname()[1], seen
    stop.set()
    thread.join()
    server.close()


def places(outside: Path, port: int) -> dict[str, str]:
    (outside / "1.png").write_bytes(png(grey(200)))
    os.mkfifo(outside / "pipe.png")
    return {
        "ftp": f"ftp://127.0.0.1:{port}/1.png",
        "http": f"http://127.0.0.1:{port}/1.png",
        "zip": f"zip://1.png::{outside}/x.zip",
        "file": f"file://{outside}/1.png",
        "a device": "/dev/zero",
        "a pipe": str(outside / "pipe.png"),
        "elsewhere": str(outside / "1.png"),
        "above": "../outside/1.png",
        "through a link": "link/1.png",
        "a folder": ".",
        "a NUL": "1\0.png",
        "empty": "",
        "home": "~/1.png",
    }


def test_a_row_of_a_parquet_file_opens_nothing_outside_its_folder(tmp_path: Path, listener: Any) -> None:
    port, seen = listener
    (tmp_path / "outside").mkdir()
    named = places(tmp_path / "outside", port)
    images: list[Any] = [{"bytes": None, "path": place} for place in named.values()]
    inside = [{"bytes": None, "path": "images/9.png"}, {"bytes": None, "path": str(tmp_path / "d/images/9.png")}]
    folder = write_hub_folder(tmp_path / "d", [*images, *inside, png(grey(7))])
    (folder / "images").mkdir()
    (folder / "images" / "9.png").write_bytes(png(grey(9)))
    (folder / "link").symlink_to(tmp_path / "outside")
    found = load_images(DataConfig(dataset_name=str(folder), resolution=8, num_channels=1))
    assert found.labels.tolist() == [NO_CONTRIBUTION] * len(named) + [0, 0, 0]
    assert found.images[:, 0, 0, 0].tolist()[-3:] == [9, 9, 7]
    assert not seen, "nobody was asked"


def test_rows_of_a_dataset_in_memory_name_files_in_a_declared_folder_alone(tmp_path: Path) -> None:
    for name, value in (("a.png", 10), ("b.png", 20)):
        (tmp_path / name).write_bytes(png(grey(value)))
    paths = [str(tmp_path / "a.png"), "b.png", "/dev/zero"]
    named = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    assert read(named).labels.tolist() == [NO_CONTRIBUTION] * 3
    found = read(named, image_root=str(tmp_path))
    assert found.labels.tolist() == [0, 0, NO_CONTRIBUTION] and found.images[:2, 0, 0, 0].tolist() == [10, 20]
    text = datasets.Dataset.from_dict({"picture": paths})
    assert read(text, image_root=str(tmp_path), image_column="picture").labels.tolist() == [0, 0, NO_CONTRIBUTION]
    raw = datasets.Dataset.from_dict({"raw": [png(grey(30)), b"junk"]})
    assert read(raw, image_column="raw").labels.tolist() == [0, NO_CONTRIBUTION]


def test_files_of_a_folder_are_opened_as_they_were_listed_and_only_if_they_are_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere.png").write_bytes(png(grey(5)))
    (tmp_path / "a" / "1.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "a" / "2.png").symlink_to("/dev/zero")
    (tmp_path / "a" / "3.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "a" / "4.png")
    Image.fromarray(grey(6)).save(tmp_path / "a" / "5.png")
    (tmp_path / "a" / "6.png").mkdir()
    found = load_images(
        DataConfig(train_data_dir=str(tmp_path / "a"), label_column="none", resolution=8, num_channels=1)
    )
    assert found.labels.tolist() == [0, NO_CONTRIBUTION, NO_CONTRIBUTION, NO_CONTRIBUTION, 0]


def test_what_is_known_of_a_source_before_a_row_is_read(tmp_path: Path) -> None:
    folder = write_hub_folder(
        tmp_path / "data", [png(grey(0))], label=([0], CLASSES), age=([3], datasets.Value("int32"))
    )
    source = open_images(DataConfig(dataset_name=str(folder)))
    assert (source.kind, source.place, source.split) == ("folder", str(folder.resolve()), "train")
    assert (source.labels, source.class_names, source.unread) == ("column label", ("cat", "dog"), ("column age",))
    assert open_images(DataConfig()).kind == "embedded"
    memory = open_rows(rows(png(grey(0))), DataConfig(dataset_name="org/mine"))
    assert (memory.kind, memory.place, memory.labels) == ("memory", "org/mine", None)
