"""The public lesson: images of a named dataset in the private shape, labels only where classes are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from dp_curriculum.cli import main
from dp_curriculum.data import digits_dataset
from dp_curriculum.lessons.public_images import check_not_private, read_public_images
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.training.curriculum import run_curriculum


DIGITS = tuple(str(digit) for digit in range(10))


@pytest.fixture
def public_folder(tmp_path: Path) -> Path:
    """Two colour pictures of 20x10 pixels in each of the classes "cat" and "dog", as parquet."""
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [Image.new("RGB", (20, 10), (60 * row, 0, 0)) for row in range(4)]
    rows = datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 1, 0, 1]}, features=features)
    folder = tmp_path / "public"
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")
    return folder


def public(make_config: Any, name: Any, **fields: Any) -> Any:
    return make_config(pretrain_dataset_name=str(name), **{"stages": ["public", "mean", "dp_sgd"], **fields})


def test_images_come_in_the_private_shape_and_without_classes_of_their_own(
    make_config: Any, public_folder: Path
) -> None:
    found = read_public_images(public(make_config, public_folder, num_channels=1), DIGITS)
    assert found.images.shape == (4, 1, 8, 8) and found.images.dtype == torch.uint8
    assert found.labels.tolist() == [10] * 4  # the class of no name


def test_labels_are_read_where_the_classes_are_the_same(make_config: Any, public_folder: Path) -> None:
    config = public(make_config, public_folder, num_channels=3)
    assert read_public_images(config, ("cat", "dog")).labels.tolist() == [0, 1, 0, 1]
    assert read_public_images(config, ("dog", "cat")).labels.tolist() == [2] * 4


def test_a_run_does_not_ask_for_images_in_both(
    make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A public dataset with all, none or one of the private images: the same files and log lines, but for noise."""
    rows = digits_dataset().select(range(20))
    logged = []
    for count in (0, 1, 20):
        shared = datasets.concatenate_datasets([rows.select(range(count)), digits_dataset("test").select(range(20))])
        folder = tmp_path / str(count) / "public"
        folder.mkdir(parents=True)
        shared.cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet")
        config = public(make_config, folder, stages=["public", "mean"], num_inference_steps=1, sample_steps=0, seed=0)
        caplog.clear()
        with caplog.at_level("DEBUG", logger="dp_curriculum"):
            run_curriculum(config, rows, output_dir=tmp_path / str(count) / "out")
        logged.append([record.getMessage() for record in caplog.records])
    assert logged[0] == logged[1] == logged[2]


@pytest.mark.parametrize("stages", [["public"], ["public", "mean", "dp_sgd"], ["public", "dp_sgd"]])
def test_a_run_spends_nothing_on_it_and_the_card_names_it(
    stages: list[str], make_config: Any, public_folder: Path, tmp_path: Path
) -> None:
    config = public(make_config, public_folder, stages=stages, num_inference_steps=2, sample_steps=0)
    rows = digits_dataset().select(range(60))
    result = run_curriculum(config, rows, output_dir=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "privacy.json").read_text())
    names = {"mean": "central-images-mean", "dp_sgd": "dp-sgd"}
    assert [row["name"] for row in report["mechanisms"]] == [names[stage] for stage in stages if stage in names]
    assert report["public_data"] == [{"name": "a local folder", "role": "pretraining"}]
    assert str(public_folder) not in (tmp_path / "out" / "privacy.json").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "on public images (a local folder)" in card and str(public_folder) not in card
    assert result.report.epsilon == 0 if stages == ["public"] else 0 < result.report.epsilon <= 10
    assert (RunFolder(tmp_path / "out").lesson_sheet("public")).exists()


@pytest.mark.parametrize(
    ("stages", "begin_without_class"), [(["public"], True), (["mean", "public"], False), (["public", "mean"], False)]
)
def test_classes_that_it_does_not_have_begin_as_no_class(
    stages: list[str], begin_without_class: bool, make_config: Any, public_folder: Path, tmp_path: Path
) -> None:
    """Random embeddings that the network never met would draw noise; what a lesson of classes taught is kept."""
    config = public(make_config, public_folder, stages=stages, num_inference_steps=1, sample_steps=0, seed=0)
    result = run_curriculum(config, digits_dataset().select(range(60)), output_dir=tmp_path / "out")
    *classes, none = result.pipeline.unet.class_embedding.weight.detach()
    assert all(torch.equal(row, none) for row in classes) == begin_without_class
    assert begin_without_class or not any(torch.equal(row, none) for row in classes)


def test_its_classes_are_kept_where_they_are_those_of_the_private_images(
    make_config: Any, public_folder: Path, tmp_path: Path
) -> None:
    private = datasets.load_dataset("parquet", data_dir=str(public_folder), split="train")
    config = public(
        make_config, public_folder, stages=["public"], num_channels=3, num_inference_steps=1, sample_steps=0
    )
    result = run_curriculum(config, private, output_dir=tmp_path / "out")
    cat, dog, none = result.pipeline.unet.class_embedding.weight.detach()
    assert not torch.equal(cat, none) and not torch.equal(dog, none)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": ["public", "mean"], "pretrain_dataset_name": None}, "--pretrain_dataset_name"),
        ({"stages": ["mean"], "pretrain_dataset_name": "digits"}, "public in --stages"),
    ],
)
def test_stage_and_dataset_come_together(fields: dict[str, Any], message: str, make_config: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


@pytest.mark.parametrize("what", ["missing", "no pictures", "unreadable", "split"])
def test_what_cannot_be_a_lesson_is_refused_before_anything_is_spent(
    what: str, make_config: Any, public_folder: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {}
    if what == "missing":
        public_folder = tmp_path / "nowhere"
    elif what == "no pictures":
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(public_folder / "train.parquet")
    elif what == "unreadable":
        broken = {"picture": [{"bytes": b"no picture", "path": None}]}
        features = datasets.Features({"picture": datasets.Image()})
        datasets.Dataset.from_dict(broken, features=features).to_parquet(public_folder / "train.parquet")
    else:
        fields["pretrain_dataset_split"] = "validation"
    config = public(make_config, public_folder, **fields)
    with pytest.raises(ValueError, match="--pretrain_dataset_") as refusal:
        run_curriculum(config, digits_dataset().select(range(60)), output_dir=tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "train[:50%]", "test+train", "all"])
@pytest.mark.parametrize("stages", [["public"], ["public", "mean", "dp_sgd"]])
def test_the_private_dataset_is_refused_as_the_public_one(
    stages: list[str], split: str, make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be learned as it is, and the card would say epsilon 0."""
    config = public(make_config, "digits", stages=stages, pretrain_dataset_split=split)
    with pytest.raises(ValueError, match="to be other images than the private ones"):
        run_curriculum(config, output_dir=tmp_path / "out")
    named = config.replace(dataset_name="org/data", pretrain_dataset_name="org/data")
    with pytest.raises(ValueError, match="to be other images than the private ones"):
        run_curriculum(named, digits_dataset().select(range(60)), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config.to_yaml(tmp_path / "config.yaml")
    assert main(["plan", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "--pretrain_dataset_name=digits" in capsys.readouterr().err


def test_another_split_and_another_dataset_are_taken_as_public(
    make_config: Any, public_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_not_private(public(make_config, "digits", pretrain_dataset_split="test"))
    check_not_private(public(make_config, public_folder))
    monkeypatch.chdir(public_folder.parent)
    for private in ("public", str(public_folder), f"../{public_folder.parent.name}/public"):
        with pytest.raises(ValueError, match="other images"):
            check_not_private(public(make_config, public_folder, dataset_name=private))
    with pytest.raises(ValueError, match="other images"):
        check_not_private(public(make_config, public_folder, train_data_dir="public"))
    named = {"dataset_name": "org/data", "dataset_config_name": "path", "pretrain_dataset_config_name": "chest"}
    check_not_private(public(make_config, "org/data", **named, pretrain_dataset_split="test"))
    for name in ("org/data", "Org/Data"):  # configurations are often sizes of the same images
        with pytest.raises(ValueError, match="other images"):
            check_not_private(public(make_config, name, **named))
    with pytest.raises(ValueError, match="other images"):  # a copy of the Hub dataset under its own name
        check_not_private(public(make_config, public_folder, dataset_name="org/Public"))
    with pytest.raises(ValueError, match="other images"):
        check_not_private(public(make_config, public_folder, dataset_name=str(public_folder.parent)))
