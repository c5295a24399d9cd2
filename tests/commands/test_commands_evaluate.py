"""`evaluate` on the data that people have: images that were held out, folders of class folders, Python."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

import dp_curriculum
from dp_curriculum.cli import main
from dp_curriculum.commands import evaluate_reference
from dp_curriculum.data import digits_dataset
from dp_curriculum.evaluation.evaluation import NO_TRAINING_IMAGE, NOT_COVERED, NOT_PUBLIC
from dp_curriculum.runs.run_folder import RunFolder


pytestmark = pytest.mark.usefixtures("quick_classifiers")

TINY = [
    *("--stages", "mean", "--lesson_noise_multiplier", "20", "--num_channels", "1"),
    *("--resolution", "8", "--block_out_channels", "8", "--pretrain_steps", "2", "--pretrain_batch_size", "4"),
    *("--num_inference_steps", "2", "--sample_steps", "0"),
]
QUICK: dict[str, Any] = {"num_images": 120, "classifiers": ["logistic"]}


def class_folders(root: Path, split: str, count: int) -> Path:
    for index, row in enumerate(digits_dataset(split).select(range(count))):
        folder = root / f"{row['label']}"
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("data") / "photos", "train", 400)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("other") / "others", "test", 150)


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Runs on the folder, with images held out and without."""
    root, runs = tmp_path_factory.mktemp("runs"), {}
    for holdout in (False, True):
        runs[holdout] = root / f"out-{holdout}"
        flags = ["--holdout", "0.4"] if holdout else []
        args = ["train", *TINY, *flags, "--train_data_dir", str(photos), "--output_dir", str(runs[holdout])]
        assert main(args) == 0
    return runs


def marks(evaluation: Any) -> set[str]:
    return {metric.privacy for metric in evaluation.metrics}


def test_what_was_held_out_is_the_reference_by_default(trained: dict[bool, Path]) -> None:
    found = dp_curriculum.evaluate(trained[True], **QUICK, leakage=True, report_html=True)
    assert found is not None
    data = {metric.name: metric.data for metric in found.metrics}
    assert "photos (held out of the training)" in data["accuracy_logistic"]
    counts = re.search(r"against (\d+) training images and (\d+) held-out ones", data["nearest_training_share"])
    assert counts is not None and sum(map(int, counts.groups())) == 400 and 100 < int(counts[2]) < 220
    folder = RunFolder(trained[True]).root / "run" / "evaluation"
    files = {path.name for path in folder.iterdir()}
    assert {"PRIVATE_evaluation.html", "PRIVATE_real_beside_generated.png"} <= files and "evaluation.html" not in files
    assert marks(found) == {NOT_PUBLIC, NOT_COVERED}
    assert all(row["meaning"] for row in json.loads((folder / "evaluation.json").read_text())["metrics"])


def test_a_folder_without_a_test_split_says_what_to_type(
    trained: dict[bool, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained[False]), "--num_images", "120"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--split=test" in said and "--dataset_split" not in said
    assert "--holdout 0.1" in said and "--reference_dataset" in said
    assert main(["evaluate", str(trained[False]), "--num_images", "120", "--split", "holdout"]) == 2
    assert "--holdout 0.1" in capsys.readouterr().err


def test_a_folder_of_class_folders_is_a_reference(
    trained: dict[bool, Path], others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--num_images", "120", "--classifiers", "logistic", "--report_html"]
    where = ["--reference_dataset", str(others), "--output_dir", str(tmp_path / "report")]
    assert main(["evaluate", str(trained[False]), *arguments, *where]) == 0
    said = capsys.readouterr().out
    assert "150 of others (train)" in said and NOT_PUBLIC in said and "higher is better" in said
    assert (tmp_path / "report" / "PRIVATE_evaluation.html").exists()
    assert main(["evaluate", str(trained[False]), *arguments, *where, "--reference_is_public"]) == 0
    assert NO_TRAINING_IMAGE in capsys.readouterr().out and (tmp_path / "report" / "evaluation.html").exists()
    assert not (tmp_path / "report" / "PRIVATE_evaluation.html").exists()


def test_a_dataset_in_memory_is_a_reference(trained: dict[bool, Path], tmp_path: Path) -> None:
    found = dp_curriculum.evaluate(
        trained[False], reference_dataset=digits_dataset("test"), output_dir=tmp_path / "r", **QUICK
    )
    assert found is not None and marks(found) == {NOT_PUBLIC}
    assert found.metrics[0].data.endswith("360 of dataset in memory"), "whose split nobody knows"
    with pytest.raises(ValueError, match="--num_images=3"):
        dp_curriculum.evaluate(trained[False], num_images=3)


def test_training_images_in_memory_are_not_called_others(trained: dict[bool, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split to be given .* 'holdout' for those"):
        dp_curriculum.evaluate(trained[True], reference_dataset=digits_dataset("train"), output_dir=tmp_path / "r")
    found = dp_curriculum.evaluate(
        trained[False],
        reference_dataset=digits_dataset("train"),
        split="train",
        output_dir=tmp_path / "r",
        **QUICK,
    )
    assert found is not None and marks(found) == {NOT_COVERED}


@pytest.mark.parametrize(
    ("options", "trained_on", "may_hold"),
    [
        ({"split": "train"}, "train[:80%]", True),
        ({"split": "train"}, "train+test", True),
        ({"reference_dataset": datasets.DatasetDict()}, "test", True),
        ({"split": "test"}, "train", False),
        ({"split": "train"}, "train", True),
    ],
)
def test_images_in_memory_may_be_training_images_by_their_split(
    options: dict[str, Any], trained_on: str, may_hold: bool, make_config: Any
) -> None:
    rows = datasets.Dataset.from_dict({"image": []})
    given = {"reference_dataset": rows, "split": None, "leakage": False, "reference_is_public": False} | options
    data = make_config(dataset_split=trained_on).data
    found = evaluate_reference._find(argparse.Namespace(**given), None, data, data)
    assert found.was_trained_on == may_hold


def test_leakage_on_images_in_memory_needs_their_split(trained: dict[bool, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split to be given with leakage and a Dataset in memory"):
        dp_curriculum.evaluate(
            trained[False], reference_dataset=digits_dataset("test"), leakage=True, output_dir=tmp_path / "r", **QUICK
        )


def test_the_embedded_digits_are_no_reference_for_other_classes(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of images in memory whose place was not named: its configuration says digits, as by default."""
    names = datasets.ClassLabel(names=[f"garment {index}" for index in range(10)])
    rows = digits_dataset().select(range(100)).cast_column("label", names)
    config = make_config(stages=["mean"], num_inference_steps=1, sample_steps=0, holdout=0.3)
    dp_curriculum.run_curriculum(config, rows, output_dir=tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--num_images", "120"]) == 2
    assert "to have the classes of the model, 10 (garment 0" in capsys.readouterr().err


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "it holds no model_index.json" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_the_training_folder_by_its_name_is_the_held_out_part_or_marked(
    trained: dict[bool, Path], photos: Path, tmp_path: Path
) -> None:
    held = dp_curriculum.evaluate(trained[True], reference_dataset=str(photos), output_dir=tmp_path / "a", **QUICK)
    assert held is not None and "held out" in held.metrics[0].data
    whole = dp_curriculum.evaluate(
        trained[False], reference_dataset=str(photos), split="train", output_dir=tmp_path / "b", **QUICK
    )
    assert whole is not None and marks(whole) == {NOT_COVERED}


def test_a_lost_key_is_named(trained: dict[bool, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained[True], tmp_path / "out"))
    RunFolder(run).holdout_key.unlink()
    with pytest.raises(ValueError, match="PRIVATE_holdout.key to exist"):
        dp_curriculum.evaluate(run, **QUICK)


def test_an_earlier_report_is_not_replaced_in_silence(
    trained: dict[bool, Path], others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--reference_dataset", str(others), "--num_images", "120", "--classifiers", "logistic"]
    for said in (f"report in {tmp_path}\n", f"report in {tmp_path}, in place of an earlier one\n"):
        assert main(["evaluate", str(trained[False]), *arguments, "--output_dir", str(tmp_path)]) == 0
        assert said in capsys.readouterr().out
