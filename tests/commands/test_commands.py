"""`dp-curriculum evaluate` on a run that was trained in seconds: reports, marks, refusals before any work."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from dp_curriculum.cli import main
from dp_curriculum.commands.arguments import config_parser, parse_config
from dp_curriculum.data import digits_dataset
from dp_curriculum.evaluation.evaluation import NO_TRAINING_IMAGE, NOT_COVERED, NOT_PUBLIC
from dp_curriculum.training.curriculum import run_curriculum


pytestmark = pytest.mark.usefixtures("quick_classifiers")

TINY = [
    *("--stages", "mean", "dp_sgd", "--lesson_noise_multiplier", "20"),
    *("--resolution", "8", "--block_out_channels", "8"),
    *("--pretrain_steps", "2", "--pretrain_batch_size", "4", "--num_dp_steps", "2", "--expected_batch_size", "16"),
    *("--num_inference_steps", "2", "--sample_steps", "0"),
]
# Without calibration of the noise, which takes longer than all else: where the guarantee is not in question.
BARE = [*TINY, "--non_private"]
QUICK = ["--num_images", "120", "--classifiers", "logistic"]
REPORT = {"evaluation.json", "evaluation.md", "real_beside_generated.png", "confusion.png"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "digits-run"
    assert main(["train", *TINY, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def saved_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both splits as a folder in Hub layout."""
    folder = tmp_path_factory.mktemp("data") / "numerals"
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = digits_dataset(split).select(range(150))
        rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.fixture
def hub_like(trained: Path, tmp_path: Path) -> Path:
    """What others get: all that is shared, without `run/`."""
    return Path(shutil.copytree(trained, tmp_path / "snapshot", ignore=shutil.ignore_patterns("run")))


def evaluate(*arguments: Any) -> int:
    return main(["evaluate", *map(str, arguments)])


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)


def privacy_marks(folder: Path) -> dict[str, str]:
    return {metric["name"]: metric["privacy"] for metric in numbers(folder)["metrics"]}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_report_of_a_run_lies_beside_it_and_reads_the_test_split(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "digits-run"))
    shared = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert evaluate(run, *QUICK) == 0
    folder = run / "run" / "evaluation"
    assert files(folder) == REPORT
    assert set(privacy_marks(folder).values()) == {NO_TRAINING_IMAGE}
    found = numbers(folder)
    assert found["title"] == "Evaluation of digits-run" and found["num_images"] == 120
    assert "differentially private" in found["epsilon"] and "digits (test)" in found["metrics"][0]["data"]
    printed = capsys.readouterr().out
    assert f"report in {folder}" in printed
    assert all(metric["name"] in printed for metric in found["metrics"])
    # What is pushed is as it was.
    assert {path: path.stat().st_mtime_ns for path in shared} == shared


def test_a_trailing_slash_or_a_dot_names_the_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    assert evaluate(".", *QUICK, "--output_dir", tmp_path / "report") == 0
    assert numbers(tmp_path / "report")["title"] == "Evaluation of digits-run"


def test_leakage_adds_attacks_and_a_private_sheet_only_where_asked(trained: Path, tmp_path: Path) -> None:
    assert evaluate(trained, *QUICK, "--leakage", "--report_html", "--output_dir", tmp_path) == 0
    private = "PRIVATE_nearest_training_images.png"
    assert files(tmp_path) == REPORT | {"evaluation.html", private}
    marks = privacy_marks(tmp_path)
    attacks = {"nearest_neighbor_ratio", "nearest_training_share"}
    attacks |= {f"membership_{name}" for name in ("auc", "tpr_at_1", "tpr_at_0.1", "worst_5", "worst_1")}
    assert {name for name, mark in marks.items() if mark == NOT_COVERED} == attacks
    for name in ("evaluation.html", "evaluation.md", "evaluation.json"):
        assert private not in (tmp_path / name).read_text()


def test_stages_add_what_each_lesson_left_with_the_epsilon_spent_until_then(trained: Path, tmp_path: Path) -> None:
    assert evaluate(trained, *QUICK, "--each_stage", "--output_dir", tmp_path) == 0
    assert files(tmp_path) == REPORT | {"stages.png"}
    stages = numbers(tmp_path)["stages"]
    assert [stage["stage"] for stage in stages] == ["mean", "dp_sgd"]
    report = json.loads((trained / "privacy.json").read_text())
    assert 0 < stages[0]["epsilon"] < stages[1]["epsilon"] == report["epsilon"]
    assert all(0 <= stage["accuracy"] <= 1 and stage["fd_classifier"] > 0 for stage in stages)


@pytest.mark.parametrize(
    ("fields", "stages"),
    [
        ({"non_private": True}, [("mean", False), ("dp_sgd", False)]),
        ({"stages": ["mean"]}, [("mean", True)]),
        ({"stages": ["mean", "mode", "dp_sgd"], "mix_lessons": True}, [("mean_mode", True), ("dp_sgd", True)]),
    ],
)
def test_stages_of_a_run_without_noise_or_without_a_hard_stage(
    fields: dict[str, Any], stages: list[tuple[str, bool]], make_config: Any, tmp_path: Path
) -> None:
    config = make_config(num_inference_steps=2, sample_steps=0, **fields)
    run_curriculum(config, digits_dataset().select(range(64)), output_dir=tmp_path / "out")
    assert evaluate(tmp_path / "out", "--num_images", "100", "--classifiers", "cnn", "--each_stage") == 0
    found = numbers(tmp_path / "out" / "run" / "evaluation")["stages"]
    assert [(stage["stage"], stage["epsilon"] is not None) for stage in found] == stages


def test_epsilon_of_a_lesson_is_what_was_charged_for_it(make_config: Any, tmp_path: Path) -> None:
    """A lesson that is lost between its charge and its file is paid twice."""
    config = make_config(num_inference_steps=2, sample_steps=0, stages=["mean"])
    rows, out = digits_dataset().select(range(64)), tmp_path / "out"
    run_curriculum(config, rows, output_dir=out)
    shutil.rmtree(out / "run" / "lessons" / "01-mean")
    twice = run_curriculum(config, rows, output_dir=out, resume_from_checkpoint="latest")
    assert evaluate(out, "--num_images", "100", "--classifiers", "cnn", "--each_stage") == 0
    (stage,) = numbers(out / "run" / "evaluation")["stages"]
    assert stage["epsilon"] == pytest.approx(twice.report.epsilon, rel=1e-6)


def test_a_model_that_was_stopped_in_a_lesson_is_not_said_to_be_of_the_hard_stage(
    make_config: Any, tmp_path: Path
) -> None:
    config = make_config(num_inference_steps=2, sample_steps=0, stages=["mean"])
    run_curriculum(config, digits_dataset().select(range(64)), output_dir=tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "run" / "lessons" / "01-mean" / "unet")
    config.replace(stages=["mean", "dp_sgd"]).to_yaml(tmp_path / "out" / "run" / "config.yaml")
    assert evaluate(tmp_path / "out", "--num_images", "100", "--classifiers", "cnn", "--each_stage") == 0
    assert [stage["stage"] for stage in numbers(tmp_path / "out" / "run" / "evaluation")["stages"]] == ["stopped"]


def test_a_lesson_that_was_stopped_half_way_is_left_out(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "out"))
    shutil.rmtree(run / "run" / "lessons" / "01-mean" / "unet")
    assert evaluate(run, *QUICK, "--each_stage") == 0
    assert [stage["stage"] for stage in numbers(run / "run" / "evaluation")["stages"]] == ["dp_sgd"]


def test_the_training_split_is_allowed_and_marked(trained: Path, tmp_path: Path) -> None:
    assert evaluate(trained, *QUICK, "--split", "train", "--output_dir", tmp_path) == 0
    assert set(privacy_marks(tmp_path).values()) == {NOT_COVERED}
    assert "PRIVATE_real_beside_generated.png" in files(tmp_path)
    assert "real_beside_generated.png" not in files(tmp_path)


def test_the_training_folder_is_known_by_any_of_its_names(
    saved_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on a relative path; evaluated on the absolute one, from elsewhere."""
    monkeypatch.chdir(saved_digits.parent)
    out = tmp_path / "out"
    assert main(["train", *BARE, "--dataset_name", "./numerals", "--num_channels", "1", "--output_dir", str(out)]) == 0
    for split, mark in (("train", NOT_COVERED), ("test", NOT_PUBLIC)):
        folder = tmp_path / split
        arguments = ["--reference_dataset", saved_digits, "--split", split, "--output_dir", folder]
        assert evaluate(out, *QUICK, *arguments) == 0
        assert set(privacy_marks(folder).values()) == {mark}
        assert f"numerals ({split})" in numbers(folder)["metrics"][0]["data"]


def test_a_reference_with_several_columns_is_read_from_those_that_are_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two columns of images, and whole numbers as classes."""
    rows = digits_dataset("test").select(range(150))
    images = list(rows["image"])
    columns = {"image": images, "turned": [image.rotate(90) for image in images], "label": list(rows["label"])}
    image, number = datasets.Image(), datasets.Value("int64")
    features = datasets.Features({"image": image, "turned": image, "label": number})
    folder = tmp_path / "numerals" / "data"
    folder.mkdir(parents=True)
    numerals = datasets.Dataset.from_dict(columns, features=features)
    numerals.to_parquet(str(folder / "test-00000-of-00001.parquet"))
    arguments = ["--reference_dataset", folder.parent, "--output_dir", tmp_path / "report"]
    assert_refused(evaluate(trained, *QUICK, *arguments), "--image_column", capsys)
    named = ["--image_column", "image", "--label_column", "label", "--num_classes", 10]
    assert evaluate(trained, *QUICK, *arguments, *named) == 0
    assert "150 of numerals (test)" in numbers(tmp_path / "report")["metrics"][0]["data"]


def test_leakage_attacks_what_was_trained_on_whatever_the_reference(
    trained: Path, saved_digits: Path, tmp_path: Path
) -> None:
    """The run's 1,437 training images, not the 150 that the other dataset calls so."""
    arguments = ["--reference_dataset", saved_digits, "--leakage", "--output_dir", tmp_path]
    assert evaluate(trained, *QUICK, *arguments) == 0
    found = {metric["name"]: metric["data"] for metric in numbers(tmp_path)["metrics"]}
    assert "against 1,437 training images and 150 held-out ones" in found["nearest_training_share"]
    assert "150 of numerals (test)" in found["accuracy_logistic"]


def test_a_folder_of_training_images_goes_before_the_name_of_a_dataset(tmp_path: Path) -> None:
    """A run on `--train_data_dir` keeps the default name `digits`: asked for digits, it gets digits."""
    for index, row in enumerate(digits_dataset().select(range(40))):
        folder = tmp_path / "pictures" / "train" / f"{row['label']}"
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{index}.png")
    out = tmp_path / "out"
    assert (
        main(
            [
                "train",
                *BARE,
                "--train_data_dir",
                str(tmp_path / "pictures"),
                "--num_channels",
                "1",
                "--output_dir",
                str(out),
            ]
        )
        == 0
    )
    report = tmp_path / "report"
    assert evaluate(out, *QUICK, "--reference_dataset", "digits", "--output_dir", report) == 0
    assert "360 of digits (test)" in numbers(report)["metrics"][0]["data"]


def test_a_model_without_its_run_is_evaluated_where_reference_and_folder_are_given(
    hub_like: Path, tmp_path: Path
) -> None:
    before = files(hub_like)
    arguments = ["--reference_dataset", "digits", "--output_dir", tmp_path / "report"]
    assert evaluate(hub_like, *QUICK, *arguments) == 0
    assert files(tmp_path / "report") == REPORT and files(hub_like) == before


def test_a_model_without_its_run_names_what_it_needs(
    hub_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, output = ["--reference_dataset", "digits"], ["--output_dir", tmp_path / "report"]
    for given, named in (
        (output, "--reference_dataset"),
        (reference, "--output_dir"),
        ([*reference, *output, "--leakage"], "--leakage"),
        ([*reference, *output, "--each_stage"], "--each_stage"),
    ):
        assert_refused(evaluate(hub_like, *QUICK, *given), named, capsys)
    assert not (tmp_path / "report").exists()


def test_a_shared_model_that_names_its_dataset_marks_its_training_split(hub_like: Path, saved_digits: Path) -> None:
    """The report of a Hub model says what it was trained on; the split is the one that is trained on by default."""
    path = hub_like / "model_index.json"
    index = json.loads(path.read_text())
    index["privacy"]["protected_dataset"]["name"] = str(saved_digits)
    path.write_text(json.dumps(index))
    for split, mark in (("train", NOT_COVERED), ("test", NOT_PUBLIC)):
        folder = hub_like.parent / split
        arguments = ["--reference_dataset", saved_digits, "--split", split, "--output_dir", folder]
        assert evaluate(hub_like, *QUICK, *arguments) == 0
        assert set(privacy_marks(folder).values()) == {mark}


def assert_refused(status: int, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dp-curriculum: error:")]
    assert status == 2 and len(lines) == 1 and named in lines[0], lines


BAD = {
    "few images": (["--num_images", "99"], "--num_images=99"),
    "negative images": (["--num_images", "-1"], "--num_images=-1"),
    "no seed": (["--num_seeds", "0"], "--num_seeds=0"),
    "classifier": (["--classifiers", "svm"], "--classifiers=svm"),
    "weights": (["--inception_weights", "nowhere.pth"], "--inception_weights=nowhere.pth"),
    "split": (["--split", "validation"], "validation"),
    "reference": (["--reference_dataset", "no-such-org/no-such-data"], "no-such-org/no-such-data"),
    "leakage of what was trained on": (["--leakage", "--split", "train"], "--split=train"),
    "unknown flag": (["--resolution", "8"], "--resolution"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_an_image_is_sampled(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dp_curriculum.commands.evaluate.sample_images", None)
    arguments, named = BAD[name]
    output = tmp_path / "report"
    assert_refused(evaluate(trained, *QUICK, *arguments, "--output_dir", output), named, capsys)
    assert not output.exists()


@pytest.mark.parametrize(
    ("class_names", "named"),
    [
        ([f"{i}" for i in range(9)], "the classes of the model, 10 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9): it has 9"),
        ([f"{i}" for i in range(12)], "it has 12 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)"),
    ],
)
def test_another_number_of_classes_is_refused(
    class_names: list[str],
    named: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dp_curriculum.commands.evaluate.sample_images", None)
    reference = relabelled(tmp_path / "others", class_names)
    assert_refused(evaluate(trained, *QUICK, "--reference_dataset", reference), named, capsys)


def relabelled(folder: Path, class_names: list[str]) -> Path:
    rows = digits_dataset("test").filter(
        lambda label: label < len(class_names), input_columns="label", keep_in_memory=True
    )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=class_names)})
    (folder / "data").mkdir(parents=True)
    rows.cast(features, keep_in_memory=True).to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    return folder


def test_the_same_classes_in_another_order_or_others_as_many_are_refused(
    hub_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dp_curriculum.commands.evaluate.sample_images", None)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    path = hub_like / "model_index.json"
    index = json.loads(path.read_text())
    index["id2label"] = dict(enumerate(words))
    path.write_text(json.dumps(index))
    for name, names in (("turned", words[::-1]), ("clothes", [f"garment {i}" for i in range(10)])):
        arguments = ["--reference_dataset", relabelled(tmp_path / name, names), "--output_dir", tmp_path / "report"]
        assert_refused(evaluate(hub_like, *QUICK, *arguments), "it has 10", capsys)
    assert not (tmp_path / "report").exists()


def test_an_unlabelled_model_is_compared_by_its_looks_alone(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(num_inference_steps=2, sample_steps=0, label_column="none", non_private=True)
    run_curriculum(config, digits_dataset().select(range(64)), output_dir=tmp_path / "out")
    for option in ("--each_stage", "--filter_by_classifier"):
        assert_refused(evaluate(tmp_path / "out", *QUICK, option), option, capsys)
    assert evaluate(tmp_path / "out", *QUICK, "--output_dir", tmp_path / "report") == 0
    assert list(privacy_marks(tmp_path / "report")) == ["fd_haar", "fd_haar_floor"]
    assert files(tmp_path / "report") == REPORT - {"confusion.png"}


def test_the_report_says_that_images_were_filtered(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dp_curriculum.evaluation.sampling._LEAST_JUDGE_IMAGES", 100)
    monkeypatch.setattr("dp_curriculum.evaluation.sampling._PER_CLASS", 10)
    for name, options in (("plain", []), ("chosen", ["--filter_by_classifier"])):
        assert evaluate(trained, *QUICK, *options, "--output_dir", tmp_path / name) == 0
        assert numbers(tmp_path / name)["filter_by_classifier"] is (name == "chosen")
    distances = [numbers(tmp_path / name)["metrics"][2]["value"] for name in ("plain", "chosen")]
    assert distances[0] != distances[1]


def test_missing_plots_are_named_before_the_work(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    assert_refused(evaluate(trained, *QUICK), "dp_curriculum[plots]", capsys)


def test_evaluation_leaves_the_global_generator_alone(trained: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    assert evaluate(trained, *QUICK, "--output_dir", tmp_path) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert os.listdir(tmp_path)


RGB32 = str(Path(__file__).parents[2] / "examples" / "configs" / "rgb32.yaml")


def test_what_a_file_says_of_its_own_images_is_not_said_of_a_folder_in_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    plan = ["plan", "--config", RGB32, "--train_data_dir", str(tmp_path), "--no_estimate"]
    assert main(plan) == 2
    assert "--public_dataset_size to be given" in capsys.readouterr().err
    assert main([*plan, "--public_dataset_size", "20000"]) == 0
    told = capsys.readouterr()
    assert "20,000 images, 2 classes" in told.out and "50,000" not in told.out + told.err
    folder = str(tmp_path / "copy")
    assert main(["plan", "--config", RGB32, "--dataset_name", folder, "--no_estimate"]) in (0, 2)
    assert "rgb32.yaml is for 50,000 images of" in capsys.readouterr().err


def test_the_nearest_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--target_epsilom", "3"]) == 2
    assert "did you mean --target_epsilon? Else see --help." in capsys.readouterr().err
    assert main(["plan", "--nothing_like_it"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_the_folder_of_a_saved_configuration_keeps_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run saves the whole path; the same folder may be named by a relative one when it is resumed."""
    saved = tmp_path / "config.yaml"
    saved.write_text(f"data: {{train_data_dir: {tmp_path / 'photos'}, num_channels: 3, num_classes: 7}}\n")
    monkeypatch.chdir(tmp_path)
    for folder, classes in (("photos", 7), ("./photos/", 7), ("others", None)):
        _, config = parse_config(config_parser("train", None), ["--config", str(saved), "--train_data_dir", folder])
        assert config.data.num_classes == classes
