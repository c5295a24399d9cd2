"""`dp-curriculum synthesize`: a dataset with the privacy block of its model, shared and read back by `datasets`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_server
import pyarrow.parquet
import pytest
import yaml
from hub_server import Hub
from huggingface_hub import DatasetCard

from dp_curriculum.cli import main
from dp_curriculum.evaluation import sampling
from dp_curriculum.sharing.synthetic_dataset import MANIFEST


@pytest.fixture
def run(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished_run, tmp_path / "run-of-patients"))


def synthesize(model: Any, *arguments: Any) -> int:
    return main(["synthesize", str(model), *map(str, arguments)])


def card(content: str) -> dict[str, Any]:
    return yaml.safe_load(content.split("---\n", 2)[1])


def test_a_dataset_has_card_and_report_and_is_named_by_its_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert synthesize(run, "--num_images", 12) == 0
    folder = tmp_path / "synthetic-run-of-patients"
    report = json.loads((run / "privacy.json").read_text())
    assert json.loads((folder / "privacy.json").read_text()) == report
    text = (folder / "README.md").read_text()
    found = card(text)
    assert found["differential_privacy"] == report and report["statement"] in text
    assert found["tags"] == ["synthetic", "dp-curriculum", "differential-privacy"]
    assert found["annotations_creators"] == ["machine-generated"] and found["size_categories"] == ["n<1K"]
    assert DatasetCard(text).data.task_categories == ["image-classification", "unconditional-image-generation"]
    printed = capsys.readouterr().out
    assert re.search(
        r"12 images in .*; [\d.]+ images/s, beside [\d.]+ images/s of UNet2DModel alone \(\d+ %\)", printed
    )
    assert main(["verify", str(folder)]) == 0
    assert synthesize(run, "--num_images", 12) == 0
    assert "all there already" in capsys.readouterr().out


@pytest.fixture
def small_judge(quick_classifiers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that 100 images train."""
    monkeypatch.setattr(sampling, "_LEAST_JUDGE_IMAGES", 100)
    monkeypatch.setattr(sampling, "_PER_CLASS", 10)


def test_a_filtered_dataset_says_so_and_verifies(small_judge: None, run: Path, tmp_path: Path) -> None:
    options = ["--num_images", 20, "--images_per_shard", 8]
    assert synthesize(run, *options, "--output_dir", "plain") == 0
    assert synthesize(run, *options, "--output_dir", "filtered", "--filter_by_classifier") == 0
    made = [sorted((tmp_path / name / "data").iterdir()) for name in ("plain", "filtered")]
    plain, filtered = (pyarrow.concat_tables([pyarrow.parquet.read_table(path) for path in paths]) for paths in made)
    assert plain["label"].equals(filtered["label"]) and not plain["image"].equals(filtered["image"])
    line = "- filter: by a classifier that was trained on other generated images\n"
    for name, chosen in (("plain", False), ("filtered", True)):
        text = (tmp_path / name / "README.md").read_text()
        assert (line in text) is chosen
        # A dataset that an earlier version began has no such fact, and can be continued.
        assert ("filter_by_classifier" in json.loads((tmp_path / name / MANIFEST).read_text())) is chosen
        assert main(["verify", name]) == 0
    assert synthesize(run, *options, "--output_dir", "filtered") == 2
    made[1][0].unlink()
    assert synthesize(run, *options, "--output_dir", "filtered", "--filter_by_classifier") == 0
    assert pyarrow.parquet.read_table(made[1][0]).equals(filtered.slice(0, 8))
    (tmp_path / "filtered" / "README.md").write_text(text.replace("other generated", "private"))
    assert main(["verify", "filtered"]) == 1


def test_a_card_that_was_edited_does_not_verify(run: Path, tmp_path: Path) -> None:
    assert synthesize(run, "--num_images", 3, "--output_dir", "made") == 0
    text = (tmp_path / "made" / "README.md").read_text()
    epsilon = card(text)["differential_privacy"]["epsilon"]
    (tmp_path / "made" / "README.md").write_text(text.replace(f"epsilon: {epsilon}", "epsilon: 0.1"))
    assert main(["verify", str(tmp_path / "made")]) == 1


_READ = """
import json
from datasets import ClassLabel, Image, load_dataset
{snippet}
assert isinstance(images.features["image"], Image) and isinstance(images.features["label"], ClassLabel)
first = images[0]["image"]
print("found", json.dumps([list(images["label"]), images.features["label"].names, first.mode, first.size]))
"""


@pytest.mark.slow
def test_what_is_pushed_is_read_by_datasets_in_a_new_process(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made").mkdir()
    options = ["--num_images", 20, "--images_per_shard", 8, "--output_dir", "made", "--license", "cc0-1.0"]
    assert synthesize(run, *options, "--push_to_hub", "org/numbers", "--label_prior", *[0, 1, 1], *[0] * 7) == 0
    made = hub.repositories[("dataset", "org/numbers")]
    shards = {f"data/train-0000{shard}-of-00003.parquet" for shard in range(3)}
    assert set(made.files) == {"README.md", "privacy.json", ".gitattributes", *shards}
    assert made.private and len(made.commits) == 2
    sent = b"".join(made.files.values())
    assert str(tmp_path).encode() not in sent and b"run-of-patients" not in sent
    assert main(["verify", "org/numbers", "--repo_type", "dataset"]) == 0
    assert "all claims hold" in capsys.readouterr().out
    snippet = made.files["README.md"].decode().split("```python\n")[1].split("```")[0]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _READ.format(snippet=snippet)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    labels, names, mode, size = json.loads(done.stdout.splitlines()[-1].removeprefix("found "))
    assert sorted(labels) == [1] * 10 + [2] * 10 and labels != sorted(labels)
    assert names == [str(index) for index in range(10)] and (mode, size) == ("L", [8, 8])


def test_a_push_that_fails_keeps_the_images_and_the_same_command_goes_on(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--num_images", 6, "--push_to_hub", "org/numbers"]
    hub.fail("POST .*/commit/", "drop", times=99)
    assert synthesize(run, *command) == 5
    assert "the images in synthetic-run-of-patients are kept" in capsys.readouterr().err
    assert len(hub.repositories[("dataset", "org/numbers")].commits) == 1
    hub.faults.clear()
    assert synthesize(run, *command) == 0
    assert "all there already" in capsys.readouterr().out
    assert len(hub.repositories[("dataset", "org/numbers")].commits) == 2
    assert synthesize(run, *command) == 0
    assert len(hub.repositories[("dataset", "org/numbers")].commits) == 2


def test_a_token_that_may_not_write_is_found_before_images_are_made(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub_server.READ_TOKEN)
    assert synthesize(run, "--num_images", 6, "--push_to_hub", "org/numbers") == 2
    assert "the token may only read" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run-of-patients"}


def test_images_of_a_model_that_is_not_private_are_refused_or_stamped(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run" / "privacy_ledger.jsonl").unlink()
    command = ["--num_images", 3, "--output_dir", "made", "--push_to_hub", "org/numbers"]
    assert synthesize(run, *command) == 2
    assert "its ledger is missing. Pass --allow_non_private" in capsys.readouterr().err and not hub.repositories
    assert synthesize(run, *command, "--allow_non_private") == 0
    text = hub.repositories[("dataset", "org/numbers")].files["README.md"].decode()
    assert "# org/numbers (NOT PRIVATE)" in text and "differential-privacy" not in card(text)["tags"]
    assert "differentially private with" not in text


def test_a_model_from_the_hub_is_verified_before_its_images_are_shared(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A local copy of a repository, as `snapshot_download` makes it."""
    assert main(["push", str(run), "--export_dir", str(tmp_path / "model")]) == 0
    command = ["--num_images", 3, "--push_to_hub", "org/numbers"]
    assert synthesize("model", *command) == 0
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    index["privacy"]["mechanisms"][1]["noise_multiplier"] *= 2
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    assert synthesize("model", *command, "--output_dir", "again") == 2
    assert "pipe.privacy does not hold" in capsys.readouterr().err


def test_a_run_that_was_planted_in_a_download_turns_no_check_off(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder says of itself that it is one's own run: what is loaded from it is looked at all the same."""
    assert main(["push", str(run), "--export_dir", str(tmp_path / "model")]) == 0
    shutil.copytree(run / "run", tmp_path / "model" / "run")
    command = ["--num_images", 3, "--push_to_hub", "org/numbers"]
    assert synthesize("model", *command, "--output_dir", "made") == 0
    edits = {
        "pipeline.py": lambda path: path.write_text("raise SystemExit"),
        "samples.png": lambda path: path.write_bytes(b"<svg/>"),
        "unet/diffusion_pytorch_model.bin": lambda path: path.write_bytes(b"\x80\x02}q\x00."),
    }
    for number, (name, edit) in enumerate(edits.items()):
        copy = Path(shutil.copytree(tmp_path / "model", tmp_path / f"model-{number}"))
        edit(copy / name)
        assert synthesize(copy, *command, "--output_dir", f"made-{number}") == 2
        assert f"{'files' if 'bin' in name else name} does not hold" in capsys.readouterr().err


def test_a_model_of_another_version_or_with_words_of_its_owner_can_be_used(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What could not be checked is not checked on the dataset either, and says so there."""
    assert main(["push", str(run), "--export_dir", str(tmp_path / "model")]) == 0
    card = tmp_path / "model" / "README.md"
    card.write_text(card.read_text() + "\n## Added by the owner\n\nHello.\n")
    assert synthesize("model", "--num_images", 3, "--push_to_hub", "org/numbers", "--output_dir", "made") == 0
    assert main(["verify", "made"]) == 0


def test_a_folder_that_the_hub_could_not_have_leaves_a_card_that_holds(run: Path, tmp_path: Path) -> None:
    assert synthesize(run, "--num_images", 3, "--output_dir", "my numbers") == 0
    assert 'load_dataset("your-name/your-dataset"' in (tmp_path / "my numbers" / "README.md").read_text()
    assert main(["verify", "my numbers"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_images", "0"], "--num_images=0"),
        ([], "num_images"),
        (["--num_images", "3", "--label_prior", "1"], "one weight for each of the 10 classes"),
        (["--num_images", "3", "--label_prior", "some"], "label_prior"),
        (["--num_images", "3", "--output_dir", "run-of-patients"], "to be a new or empty folder"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert synthesize(run, *arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and sum("error" in line for line in error) == 1


def test_a_model_without_a_report_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((run / "model_index.json").read_text())
    index["privacy"] = None
    (run / "model_index.json").write_text(json.dumps(index))
    assert synthesize(run, "--num_images", 3) == 2
    assert "it has no privacy report" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["synthesize", "model", "--num_images", "8", "--person_column", "who"],
        ["train", "--output_dir", "run", "--pretrain_person_column", "who"],
    ],
)
def test_persons_are_of_private_images_alone(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Neither generated nor public images have any; the error is one of usage."""
    try:
        status: Any = main(command)
    except SystemExit as error:
        status = error.code
    assert status == 2 and command[-2] in capsys.readouterr().err
