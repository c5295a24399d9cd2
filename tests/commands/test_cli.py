"""The command: flags over YAML over defaults, one line for each error, and its exit status."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from dp_curriculum.cli import main
from dp_curriculum.commands.arguments import config_parser, parse_config
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.training.curriculum import run_curriculum


ROOT = Path(__file__).parents[2]
TINY = [
    *("--stages", "mean", "dp_sgd", "--lesson_noise_multiplier", "20"),
    *("--resolution", "8", "--block_out_channels", "8"),
    *("--pretrain_steps", "2", "--pretrain_batch_size", "4", "--num_dp_steps", "2", "--expected_batch_size", "16"),
    *("--num_inference_steps", "2", "--sample_steps", "0"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    assert main(["train", *TINY, "--output_dir", str(folder)]) == 0
    return folder


def test_plan_prints_mechanisms_noise_and_epsilon_and_reads_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    """The dataset does not exist: a plan that looked for it would fail."""
    public = ["--dataset_name", "nobody/has-this", "--public_dataset_size", "60000", "--num_classes", "10"]
    public += ["--num_channels", "1"]
    assert main(["plan", *TINY, *public]) == 0
    printed = capsys.readouterr().out
    for word in ("60,000 images, 10 classes", "central-images-mean", "dp-sgd", "Poisson 0.000266667", "estimate"):
        assert word in printed
    last = next(line for line in printed.splitlines() if line.startswith("dp-sgd")).split()[-1]
    assert 9.9 <= float(last) <= 10


def test_a_plan_needs_the_public_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--dataset_name", "org/data", "--num_channels", "3"]
    assert main(["plan", *source[:2]]) == 2
    assert "--num_channels 3" in capsys.readouterr().err
    assert main(["plan", *source]) == 2
    assert "--public_dataset_size" in capsys.readouterr().err
    assert main(["plan", *source, "--public_dataset_size", "9999"]) == 2
    assert "--num_classes" in capsys.readouterr().err


def test_a_plan_for_the_digits_has_their_classes_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--num_classes", "4"]) == 2
    assert "--num_classes=4 to be 10" in capsys.readouterr().err
    assert main(["plan", "--num_classes", "10", "--no_estimate"]) == 0
    assert "1,437 images, 10 classes" in capsys.readouterr().out


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"privacy": {"target_epsilon": 3}, "model": {"block_out_channels": [64]}}))
    parser = config_parser("train", None)
    args = ["--config", str(path), "--block_out_channels", "32"]
    args += ["--no_central_post_process"]
    _, config = parse_config(parser, args)
    assert config.privacy.target_epsilon == 3.0
    assert config.model.block_out_channels == [32]
    assert config.lessons.central_post_process is False
    assert config.dp_sgd == CurriculumConfig().dp_sgd


def test_train_saves_the_configuration_that_it_ran(trained: Path) -> None:
    saved = CurriculumConfig.from_yaml(trained / "run" / "config.yaml")
    assert saved.data.resolution == 8 and saved.dp_sgd.num_dp_steps == 2


def test_verify_holds_on_a_run_and_fails_where_a_number_was_edited(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(trained), "--local_run"]) == 0
    assert "FAILS" not in capsys.readouterr().out
    report = json.loads((trained / "privacy.json").read_text())
    report["mechanisms"][1]["noise_multiplier"] /= 2
    (tmp_path / "privacy.json").write_text(json.dumps(report))
    assert main(["verify", str(tmp_path)]) == 1
    assert "FAILS  epsilon" in capsys.readouterr().out


def test_sample_writes_the_same_images_at_any_batch_size(trained: Path, tmp_path: Path) -> None:
    for name, size in (("one", "1"), ("three", "3")):
        arguments = ["--num_images", "4", "--batch_size", size, "--output_dir", str(tmp_path / name)]
        assert main(["sample", str(trained), *arguments]) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [*(f"00000{index}-class{index}.png" for index in range(4)), "sheet.png"]
    for name in files[:-1]:
        one, three = (np.asarray(Image.open(tmp_path / folder / name), dtype=int) for folder in ("one", "three"))
        # A processor adds up batches of other sizes in another order: a value at a border may round the other way.
        assert abs(one - three).max() <= 1 and (one != three).mean() < 0.05
    first, second = (np.asarray(Image.open(tmp_path / "one" / name), dtype=int) for name in files[:2])
    assert (first != second).mean() > 0.05, "other images differ"


def test_sample_takes_names_and_indices(trained: Path, tmp_path: Path) -> None:
    arguments = ["--num_images", "3", "--class_label", "7", "2", "--output_dir", str(tmp_path)]
    assert main(["sample", str(trained), *arguments]) == 0
    labels = [path.stem.split("class")[1] for path in sorted(tmp_path.glob("0*.png"))]
    assert labels == ["7", "2", "7"]


BAD = {
    "unknown flag": (["--epsilon", "1"], 2, "--epsilon"),
    "missing column": (["--image_column", "picture"], 2, "--image_column=picture"),
    "unknown dataset": (["--dataset_name", "no-such-org/no-such-data"], 2, "--dataset_name=no-such-org/no-such-data"),
    "resolution": (["--resolution", "9", "--block_out_channels", "8", "16"], 2, "--resolution=9"),
    "channels": (["--num_channels", "2"], 2, "--num_channels=2"),
    "epsilon zero": (["--target_epsilon", "0"], 2, "--target_epsilon=0"),
    "epsilon infinite": (["--target_epsilon", "inf"], 2, "--target_epsilon=inf"),
    "epsilon not a number": (["--target_epsilon", "ten"], 2, "--target_epsilon"),
    "delta": (["--target_delta", "1"], 2, "--target_delta=1"),
    "epsilon too small": (["--target_epsilon", "0.01"], 4, "--target_epsilon=0.01"),
    "batch": (["--expected_batch_size", "5000"], 2, "--expected_batch_size=5000"),
    "K": (["--noise_multiplicity", "0"], 2, "--noise_multiplicity=0"),
    "fp16": (["--mixed_precision", "fp16"], 2, "--mixed_precision=fp16"),
    "stage": (["--stages", "median", "dp_sgd"], 2, "--stages=median"),
    "no config": (["--config", "missing.yaml"], 2, "--config=missing.yaml"),
    "resume nothing": (["--resume_from_checkpoint", "nowhere"], 2, "--resume_from_checkpoint"),
    "no noise": (["--lesson_noise_multiplier", "0"], 2, "--lesson_noise_multiplier=0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line_and_spends_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, status, named = BAD[name]
    out = tmp_path / "out"
    assert main(["train", *TINY, "--output_dir", str(out), *arguments]) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dp-curriculum: error:")]
    assert len(lines) == 1 and named in lines[0]
    assert not out.exists()


def test_too_small_a_budget_names_what_is_spent_and_the_smallest_that_is_feasible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *TINY, "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--target_epsilon", "0.1"]) == 4
    message = capsys.readouterr().err.strip().splitlines()[-1]
    smallest = message.split("set --target_epsilon to ")[1].split()[0]
    assert main(["plan", *TINY, "--target_epsilon", smallest, "--no_estimate"]) == 0


def test_a_folder_that_holds_a_run_is_left_alone_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["train", *TINY, "--output_dir", str(out)]) == 0
    before = (out / "privacy.json").read_bytes()
    assert main(["train", *TINY, "--output_dir", str(out)]) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert (out / "privacy.json").read_bytes() == before
    assert main(["train", *TINY, "--output_dir", str(out), "--overwrite_output_dir", "--num_dp_steps", "3"]) == 0
    assert json.loads((out / "privacy.json").read_text())["mechanisms"][1]["num_steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--class_label", "10"], "--class_label=10"),
        (["--class_label", "seven"], "--class_label=seven"),
        (["--num_images", "0"], "--num_images=0"),
        (["--num_inference_steps", "0"], "num_inference_steps=0"),
    ],
)
def test_bad_sampling_is_refused(
    arguments: list[str], named: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(trained), "--output_dir", str(tmp_path / "images"), *arguments]) == 2
    assert named in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in (str(tmp_path), "no-such-org/no-such-model"):
        assert main(["sample", model, "--output_dir", str(tmp_path / "images")]) == 2
        assert model in capsys.readouterr().err


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tarin"]) == 2
    assert "there is no command 'tarin': did you mean train?" in capsys.readouterr().err
    assert main(["xyz"]) == 2
    assert "dp-curriculum --help lists them" in capsys.readouterr().err
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "  train " in shown and "  plan " in shown
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("dp_curriculum")


def test_a_large_delta_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture, make_config: Any) -> None:
    config = make_config(target_delta=0.02, num_inference_steps=2, sample_steps=0)
    rows: datasets.Dataset = digits_dataset().select(range(64))
    run_curriculum(config, rows, output_dir=tmp_path / "out")
    assert any("--target_delta=0.02" in record.message for record in caplog.records)
    assert "But delta is above 1 / 64: with that probability the limit" in (tmp_path / "out/README.md").read_text()
    assert main(["verify", str(tmp_path / "out"), "--local_run"]) == 0


def test_the_example_runs_under_accelerate_launch(tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    example = [str(ROOT / "examples" / "train_dp_curriculum.py"), *TINY, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *launch, *example], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "README.md").exists()
    assert "differentially private" in done.stdout
