"""Ways to bring data: each ends in what a person expects, or in one line that says what to type instead."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from pictures import CLASSES, NUMBER, TEXT, encoded, image_folder, photo, png, write_hub_folder

from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import NO_CONTRIBUTION, PrivateImages
from dp_curriculum.runtime.processes import process_state
from dp_curriculum.training.validation import validate_data


MakeConfig = Callable[..., CurriculumConfig]
PHOTO = png(photo())
COLOURED = datasets.Image(mode="RGB")
TWELVE_BITS = png(np.full((8, 8), 4095, dtype=np.uint16))


@pytest.fixture(autouse=True)
def _one_process() -> None:
    process_state()  # the loggers of accelerate ask for it


def class_folders(root: Path) -> Path:
    image_folder(root, "cat/1.png", "cat/2.png", "dog/3.png")
    return root


def with_table(root: Path, name: str, text: str, *paths: str) -> Path:
    image_folder(root, *(paths or ("1.png", "2.png")))
    (root / name).write_text(text)
    return root


def with_file(root: Path, name: str, data: bytes) -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
    return root


def zipped(root: Path) -> Path:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("1.png", PHOTO)
    return with_file(root, "images.zip", buffer.getvalue())


def in_memory(mode: str | None = None, **columns: tuple[list[Any], Any]) -> datasets.Dataset:
    features = {"image": datasets.Image(mode=mode), **{name: kind for name, (_, kind) in columns.items()}}
    values: dict[str, Any] = {"image": [{"bytes": PHOTO, "path": None}] * 2}
    return datasets.Dataset.from_dict(
        values | {name: rows for name, (rows, _) in columns.items()}, features=datasets.Features(features)
    )


def saved(root: Path, splits: bool) -> Path:
    rows = in_memory(label=([1, 0], CLASSES))
    (datasets.DatasetDict(train=rows, test=rows) if splits else rows).save_to_disk(str(root))
    return root


@dataclass(frozen=True)
class Way:
    """
    One way to bring data.

    Args:
        make (`Callable`): Makes the data in a new folder; returns a folder, or a dataset in memory.
        fields (`dict`): What a person gives besides.
        says (`tuple[str, ...]`): What the block says of it; or `refused`, what the one line must hold.
    """

    make: Callable[[Path], Any]
    fields: dict[str, Any] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    labels: list[int] | None = None
    by: str = "train_data_dir"


COLOUR = {"num_channels": 3}
ONE_CLASS = {**COLOUR, "label_column": "none"}
WORDS = {**COLOUR, "label_column": "label", "class_names": ["cat", "dog"]}
WAYS = {
    "class folders": Way(class_folders, COLOUR, ("colour", "2 by sub-folders"), (), ("cat", "dog"), [0, 0, 1]),
    "colour is not said": Way(class_folders, {}, (), ("--num_channels 3 for colour", "1 for grey")),
    "grey is said": Way(class_folders, {"num_channels": 1}, ("grey",), (), ("cat", "dog")),
    "classes in another order": Way(
        class_folders, {**COLOUR, "class_names": ["dog", "cat"]}, ("--class_names",), (), ("dog", "cat"), [0, 1, 1]
    ),
    "a wrong number of classes": Way(class_folders, {**COLOUR, "num_classes": 3}, (), ("--num_classes=3", "2")),
    "one class folder": Way(
        lambda root: image_folder(root, "cat/1.png").train_data_dir, COLOUR, ("one, cat", "add a sub-folder"),
        (), ("cat",), [0],
    ),
    "images without classes": Way(
        lambda root: image_folder(root, "1.png").train_data_dir, COLOUR, ("all images train one class",), (),
        ("image",), [0],
    ),
    "classes that nothing gives": Way(
        lambda root: image_folder(root, "1.png").train_data_dir, {**COLOUR, "num_classes": 2}, (),
        ("--num_classes=2", "--label_column"),
    ),
    "split folders": Way(
        lambda root: image_folder(root, "train/cat/1.png", "train/dog/2.png", "test/cat/3.png").train_data_dir,
        COLOUR, ("train; not used: test",), (), ("cat", "dog"), [0, 1],
    ),
    "a split that is not there": Way(
        class_folders, {**COLOUR, "dataset_split": "test"}, (), ("--dataset_split=test", "train")
    ),
    "other files beside": Way(
        lambda root: with_file(class_folders(root), "notes.txt", b"x"), COLOUR, ("files *.txt",), (), ("cat", "dog")
    ),
    "a table beside class folders": Way(
        lambda root: with_table(root, "metadata.csv", "file_name,label\n", "cat/1.png", "dog/2.png"), COLOUR,
        ("column label of metadata.csv",), (), ("cat", "dog"),
    ),
    "a table of words": Way(
        lambda root: with_table(root, "metadata.csv", "file_name,label\n1.png,dog\n2.png,cat\n"), WORDS,
        ("2 by column label (--label_column)",), (), ("cat", "dog"), [1, 0],
    ),
    "a table of lines": Way(
        lambda root: with_table(root, "metadata.jsonl", '{"file_name": "1.png", "label": "dog"}\n'), WORDS,
        ("column label",), (), ("cat", "dog"), [1],
    ),
    "a label in a table that is not named": Way(
        lambda root: with_table(root, "metadata.csv", "file_name,label\n1.png,dog\n"), COLOUR, (),
        ("--label_column label --class_names",),
    ),
    "a label in a table, not wanted": Way(
        lambda root: with_table(root, "metadata.csv", "file_name,label\n1.png,dog\n"), ONE_CLASS,
        ("not used", "column label of metadata.csv"), (), ("image",),
    ),
    "persons in a table": Way(
        lambda root: with_table(root, "metadata.csv", "file_name,patient_id\n1.png,7\n2.png,7\n"), COLOUR,
        ("column patient_id of metadata.csv is not used", "--person_column"), (), ("image",),
    ),
    "persons in a table, named": Way(
        lambda root: with_table(root, "metadata.csv", "file_name,patient_id\n1.png,7\n2.png,8\n"),
        {**COLOUR, "person_column": "patient_id"},
        ("by --person_column=patient_id: the guarantee is for the person",), (), ("image",),
    ),
    "folders of persons inside classes, named": Way(
        lambda root: image_folder(root, "cat/p1/1.png", "dog/p2/2.png").train_data_dir,
        {**COLOUR, "person_from": "folder"},
        ("by --person_from=folder: the guarantee is for the person",), (), ("cat", "dog"), [0, 1],
    ),
    "folders of persons inside classes": Way(
        lambda root: image_folder(root, "cat/p1/1.png", "dog/p2/2.png").train_data_dir, COLOUR, (),
        ("has sub-folders", "--person_from folder"),
    ),
    "an archive": Way(zipped, COLOUR, (), ("unpack images.zip",)),
    "DICOM files": Way(lambda root: with_file(root, "1.dcm", b"x"), COLOUR, (), ("to hold images", "*.dcm")),
    "an empty folder": Way(lambda root: root, COLOUR, (), ("--train_data_dir=", "to hold images")),
    "no such folder": Way(lambda root: root / "nowhere", COLOUR, (), ("nowhere", "there is none")),
    "a dataset beside a folder": Way(
        class_folders, {**COLOUR, "dataset_name": "org/data"}, (), ("--dataset_name=org/data", "--train_data_dir=")
    ),
    "12 bits in 16": Way(
        lambda root: with_file(root, "1.png", TWELVE_BITS), {"num_channels": 1},
        ("65535", "--intensity_range 0 4095 for a 12-bit scanner"), (), ("image",), [0],
    ),
    "12 bits, declared": Way(
        lambda root: with_file(root, "1.png", TWELVE_BITS), {"num_channels": 1, "intensity_range": [0, 4095]},
        ("4095.0 is white",), (), ("image",), [0],
    ),
    "CMYK, transparent and palette images": Way(
        lambda root: with_file(
            with_file(with_file(root, "1.jpg", encoded(photo(mode="CMYK"), "JPEG")), "2.png", png(photo(mode="RGBA"))),
            "3.gif", encoded(photo(mode="P"), "GIF"),
        ),
        COLOUR, ("colour",), (), ("image",), [0, 0, 0],
    ),
    "truncated files": Way(
        lambda root: with_file(root, "1.png", PHOTO[:60]), COLOUR, ("dp-curriculum inspect lists them",), (),
        ("image",), [NO_CONTRIBUTION],
    ),
    "a saved dataset": Way(
        lambda root: saved(root / "d", False), COLOUR, ("2 by column label (by its type)",), (), ("cat", "dog"),
        [1, 0], by="dataset_name",
    ),
    "a saved dataset of splits": Way(
        lambda root: saved(root / "d", True), COLOUR, ("train; not used: test",), (), ("cat", "dog"), [1, 0],
        by="dataset_name",
    ),
    "a saved dataset by the wrong option": Way(
        lambda root: saved(root / "d", False), COLOUR, (), ("Type --dataset_name",)
    ),
    "parquet with names of classes": Way(
        lambda root: write_hub_folder(root / "d", [PHOTO], label=([1], CLASSES), age=([3], NUMBER)), COLOUR,
        ("column image (by its type)", "column age"), (), ("cat", "dog"), [1], by="dataset_name",
    ),
    "parquet of colour by its type": Way(
        lambda root: write_hub_folder(root / "d", [PHOTO], image=([{"bytes": PHOTO, "path": None}], COLOURED)), {},
        ("colour",), (), ("image",), [0], by="dataset_name",
    ),
    "parquet with numbers": Way(
        lambda root: write_hub_folder(root / "d", [PHOTO], label=([1], NUMBER)), COLOUR, (),
        ("--label_column label --class_names",), by="dataset_name",
    ),
    "parquet with numbers, counted": Way(
        lambda root: write_hub_folder(root / "d", [PHOTO], label=([1], NUMBER)),
        {**COLOUR, "label_column": "label", "num_classes": 2}, ("2 by column label",), (), ("0", "1"), [1],
        by="dataset_name",
    ),
    "a label column that is not there": Way(
        lambda root: write_hub_folder(root / "d", [PHOTO], kind=(["x"], TEXT)), {**COLOUR, "label_column": "label"},
        (), ("--label_column=label", "image, kind"), by="dataset_name",
    ),
    "in memory, colour by its type": Way(
        lambda _: in_memory("RGB", label=([0, 1], CLASSES)), {}, ("colour", "in memory"), (), ("cat", "dog"), [0, 1]
    ),
    "in memory, colour not said": Way(lambda _: in_memory(), {}, (), ("--num_channels 3 for colour",)),
    "in memory, words that are not declared": Way(
        lambda _: in_memory(label=(["dog", "cat"], TEXT)), {**COLOUR, "label_column": "label"}, (),
        ("--class_names to be given", "--label_column=label"),
    ),
    "in memory, words": Way(
        lambda _: in_memory(label=(["dog", "cat"], TEXT)), WORDS, ("by column label",), (), ("cat", "dog"), [1, 0]
    ),
    "in memory, floats and truths": Way(
        lambda _: in_memory(label=([True, False], datasets.Value("bool"))),
        {**COLOUR, "label_column": "label", "num_classes": 2}, (), (), ("0", "1"), [1, 0],
    ),
    "in memory, lists": Way(
        lambda _: in_memory(label=([[1], [0]], datasets.Sequence(NUMBER))),
        {**COLOUR, "label_column": "label", "num_classes": 2}, (), ("--label_column=label", "integers"),
    ),
    "splits in memory": Way(
        lambda _: datasets.DatasetDict(train=in_memory(label=([0, 1], CLASSES)), test=in_memory()), COLOUR,
        ("train; not used: test",), (), ("cat", "dog"), [0, 1],
    ),
    "splits in memory without this one": Way(
        lambda _: datasets.DatasetDict(validation=in_memory()), COLOUR, (), ("--dataset_split=train", "validation")
    ),
    "a stream": Way(lambda _: in_memory().to_iterable_dataset(), COLOUR, (), ("streaming=True",)),
}  # fmt: skip


def bring(way: Way, folder: Path) -> tuple[CurriculumConfig, Any]:
    folder.mkdir()
    data = way.make(folder)
    tiny = {"resolution": 8, "block_out_channels": [8], "stages": ["mean"], "lesson_noise_multiplier": 20.0}
    fields = {**tiny, **way.fields}
    if isinstance(data, (str, Path)):
        return CurriculumConfig().replace(**{**fields, way.by: str(data)}), None
    return CurriculumConfig().replace(**fields), data


@pytest.mark.parametrize("name", WAYS)
def test_a_way_to_bring_data(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    way = WAYS[name]
    config, dataset = bring(way, tmp_path / "data")
    caplog.set_level(logging.INFO)
    if way.refused:
        with pytest.raises(ValueError) as refused:
            validate_data(config, dataset)
        message = str(refused.value)
        assert "\n" not in message and all(words in message for words in way.refused), message
        return
    settled, private, _ = validate_data(config, dataset)
    assert isinstance(private, PrivateImages) and private.images.shape[1] == settled.data.channels
    assert private.class_names == way.classes
    assert way.labels is None or private.labels.tolist() == way.labels
    for words in way.says:
        assert words in caplog.text


def test_twelve_bits_are_white_once_they_are_declared(tmp_path: Path) -> None:
    declared, told = (
        validate_data(*bring(WAYS[name], tmp_path / name))[1] for name in ("12 bits, declared", "12 bits in 16")
    )
    assert declared.images.min() == 255 and told.images.max() < 20


ONLY_IN_TRAINING = ("in memory", "splits in", "a stream", "DICOM", "an empty")  # no folder, or an image must be read


@pytest.mark.parametrize(
    "name", [name for name, way in WAYS.items() if way.refused and not name.startswith(ONLY_IN_TRAINING)]
)
def test_a_plan_refuses_what_training_would(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    way = WAYS[name]
    config, _ = bring(way, tmp_path / "data")
    capsys.readouterr()  # bars of what made the data
    flags = [f"--{way.by}", str(getattr(config.data, way.by)), "--public_dataset_size", "50", "--no_estimate"]
    for option, value in way.fields.items():
        flags += [f"--{option}", *([str(value)] if not isinstance(value, list) else value)]
    assert main(["plan", "--stages", "mean", "--resolution", "8", *flags]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    assert all(words in said.err for words in way.refused)


def test_a_plan_says_what_it_understood_and_needs_no_number_of_classes_for_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_folders(tmp_path / "pets")
    flags = ["--train_data_dir", str(folder), "--num_channels", "3", "--public_dataset_size", "5000"]
    assert main(["plan", "--stages", "mean", "--resolution", "32", "--no_estimate", *flags]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Data:\n") and "2 by sub-folders (in alphabetical order): cat, dog" in said
    assert "colour, the centre square of each image, resized to 32x32" in said
    assert "5,000 images, 2 classes" in said


def test_the_block_does_not_depend_on_the_number_of_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    said = []
    for count in (2, 3):
        root = tmp_path / "pets"
        image_folder(root, *(f"cat/{number}.png" for number in range(count)), "dog/1.png")
        caplog.clear()
        config = CurriculumConfig().replace(
            train_data_dir=str(root), num_channels=3, resolution=8, block_out_channels=[8], stages=["mean"],
            public_dataset_size=9,
        )  # fmt: skip
        validate_data(config, None)
        said.append(caplog.text)
    assert said[0] == said[1]


def test_a_folder_that_cannot_be_made_is_refused_by_the_name_of_its_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    flags = ["--stages", "mean", "--resolution", "8", "--block_out_channels", "8"]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "file" / "out")]) == 5
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--output_dir={tmp_path / 'file' / 'out'}" in error and "Name another one" in error


def test_a_source_on_the_command_line_replaces_that_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, preset = class_folders(tmp_path / "pets"), tmp_path / "preset.yaml"
    preset.write_text("data: {dataset_name: org/data, num_channels: 3}\nprivacy: {public_dataset_size: 5000}\n")
    flags = ["--config", str(preset), "--train_data_dir", str(folder), "--resolution", "32"]
    flags += ["--public_dataset_size", "3000"]  # that of the file is of its own images
    assert main(["plan", "--stages", "mean", "--no_estimate", *flags]) == 0
    assert f"--train_data_dir={folder}" in capsys.readouterr().out
