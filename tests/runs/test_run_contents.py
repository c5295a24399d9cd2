"""What a run holds belongs together: what is of another run is refused, and no crash makes a stranger of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file

from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.lessons.planned import plan_lessons
from dp_curriculum.privacy.hash_chain import HashChain
from dp_curriculum.privacy.ledger import LedgerTamperedError, PrivacyLedger
from dp_curriculum.runs.run_contents import check_contents, taught_weights
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime import checkpointing
from dp_curriculum.runtime.checkpointing import list_checkpoints
from dp_curriculum.runtime.hashing import hash_file, hash_folder
from dp_curriculum.sharing.export import not_private_reasons
from dp_curriculum.training.curriculum import CurriculumResult, run_curriculum


Train = Callable[..., CurriculumResult]
RELEASED = "run/lessons/01-mean/released.safetensors"
TAUGHT = "run/lessons/01-mean/unet"


@pytest.fixture(scope="module")
def few_digits() -> datasets.Dataset:
    return digits_dataset().select(range(64))


@pytest.fixture
def config(make_config: Any) -> CurriculumConfig:
    return make_config(checkpointing_steps=2, sample_steps=0, num_inference_steps=2, seed=0)


@pytest.fixture
def train(config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path) -> Train:
    def start(name: str = "run", *, resume: bool = False, **fields: Any) -> CurriculumResult:
        return run_curriculum(
            config.replace(**fields),
            few_digits,
            output_dir=tmp_path / name,
            resume_from_checkpoint="latest" if resume else None,
        )

    return start


def lines_of(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    return [entry for entry in entries if entry["type"] == kind]


def copy_from(other: Path, run: Path, name: str) -> None:
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if (other / name).is_dir() else shutil.copyfile)(other / name, run / name)


# --- what is recorded ----------------------------------------------------------------------------------------------


def test_all_that_a_run_takes_up_and_releases_is_recorded(train: Train, tmp_path: Path) -> None:
    train(stages=["mean", "mode", "dp_sgd"])
    root, folder = tmp_path / "run", RunFolder(tmp_path / "run")
    recorded = {entry["name"]: entry["digest"] for entry in lines_of(folder, "hash")}
    assert recorded.pop("run/checkpoints/checkpoint-00000002") and recorded.pop("run/checkpoints/checkpoint-00000004")
    assert recorded == {
        RELEASED: hash_file(root / RELEASED),
        TAUGHT: hash_folder(root / TAUGHT),
        "run/lessons/02-mode/released.safetensors": hash_file(root / "run/lessons/02-mode/released.safetensors"),
        "run/lessons/02-mode/unet": hash_folder(root / "run/lessons/02-mode/unet"),
        "unet/diffusion_pytorch_model.safetensors": hash_file(root / "unet/diffusion_pytorch_model.safetensors"),
        "privacy.json": hash_file(root / "privacy.json"),
    }


def test_a_hash_is_on_disk_before_its_file_has_a_name(train: Train, tmp_path: Path) -> None:
    """Whenever something gets its name in the folder of the run, the ledger on disk has its hash."""
    folder, named, replace = RunFolder(tmp_path / "run"), [], os.replace

    def watched(source: Any, target: Any) -> None:
        name = Path(target).relative_to(folder.root).as_posix()
        if name.startswith(("run/lessons", "run/checkpoints")) and ".tmp-" not in name:
            named.append(name)
            assert name in {entry["name"] for entry in lines_of(folder, "hash")}
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watched)
        train()
    assert named == [RELEASED, TAUGHT, *(f"run/checkpoints/checkpoint-0000000{step}" for step in (2, 4))]


@pytest.mark.parametrize("change", ["a byte", "a file more", "a file fewer", "another name"])
def test_the_hash_of_a_folder_is_of_all_that_is_in_it(change: str, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("config.json", "weights.safetensors"):
        (tmp_path / "unet" / name).write_text(name)
    before = hash_folder(tmp_path / "unet")
    shutil.copytree(tmp_path / "unet", tmp_path / "copy")
    assert hash_folder(tmp_path / "copy") == before
    if change == "a byte":
        (tmp_path / "unet" / "config.json").write_text("config.jsoN")
    elif change == "a file more":
        (tmp_path / "unet" / "weights.bin").write_text("")
    elif change == "a file fewer":
        (tmp_path / "unet" / "config.json").unlink()
    else:
        (tmp_path / "unet" / "config.json").rename(tmp_path / "unet" / "config.yaml")
    assert hash_folder(tmp_path / "unet") != before


# --- what is of another run ------------------------------------------------------------------------------------------


def test_a_lesson_that_spent_far_more_is_not_taken_from_another_run(
    config: CurriculumConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its noise is a thousandth of what this run charged: the report would claim what the lesson did not spend."""
    quick = config.replace(stages=["mean"], pretrain_steps=1)
    quick.to_yaml(tmp_path / "quiet.yaml")
    loud = quick.replace(lesson_noise_multiplier=0.02)
    loud.replace(target_epsilon=1e6).to_yaml(tmp_path / "loud.yaml")
    for name in ("quiet", "loud"):
        args = ["train", "--config", str(tmp_path / f"{name}.yaml"), "--output_dir", str(tmp_path / name)]
        assert main(args) == 0
    claimed = [json.loads((tmp_path / name / "privacy.json").read_text())["epsilon"] for name in ("quiet", "loud")]
    assert claimed[0] < 1 and claimed[1] > 1000
    ledger = RunFolder(tmp_path / "quiet").ledger.read_bytes()
    shutil.copytree(tmp_path / "quiet", tmp_path / "kept")
    for name in (RELEASED, TAUGHT):
        copy_from(tmp_path / "kept", tmp_path / "quiet", RELEASED)
        copy_from(tmp_path / "loud", tmp_path / "quiet", name)
        capsys.readouterr()
        args = [
            "train",
            "--config",
            str(tmp_path / "quiet.yaml"),
            "--output_dir",
            str(tmp_path / "quiet"),
            "--resume_from_checkpoint",
            "latest",
        ]
        assert main(args) == 4
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"Refusing to use {tmp_path / 'quiet' / name}: its hash is not in" in error
    assert RunFolder(tmp_path / "quiet").ledger.read_bytes() == ledger
    assert main(["push", str(tmp_path / "quiet"), "--export_dir", str(tmp_path / "exported")]) == 2
    assert "not of its ledger" in capsys.readouterr().err and not (tmp_path / "exported").exists()


@pytest.mark.parametrize("name", [RELEASED, TAUGHT, "run/checkpoints/checkpoint-00000004", "run/checkpoints"])
def test_what_another_run_with_the_same_configuration_left_is_refused(name: str, train: Train, tmp_path: Path) -> None:
    for run in ("run", "other"):
        train(run)
    train("run", resume=True)
    copy_from(tmp_path / "other", tmp_path / "run", name)
    before = RunFolder(tmp_path / "run").ledger.read_bytes()
    with pytest.raises(LedgerTamperedError) as caught:
        train("run", resume=True)
    assert "\n" not in str(caught.value) and RunFolder(tmp_path / "run").ledger.read_bytes() == before


def test_a_checkpoint_with_a_forged_manifest_is_refused(
    config: CurriculumConfig, train: Train, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    """It names a line of this ledger and this configuration, its hashes fit its files, and its weights are others."""
    train("run"), train("other")
    forged = tmp_path / "forged" / "checkpoint-00000004"
    shutil.copytree(tmp_path / "other" / "run/checkpoints/checkpoint-00000004", forged)
    manifest = json.loads((forged / "manifest.json").read_text())
    own = json.loads((tmp_path / "run/run/checkpoints/checkpoint-00000004/manifest.json").read_text())
    manifest["facts"] = own["facts"]
    del manifest["sha256"]
    manifest["sha256"] = checkpointing._manifest_sha256(manifest)
    (forged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LedgerTamperedError, match="checkpoint-00000004: its hash is not in"):
        run_curriculum(config, few_digits, output_dir=tmp_path / "run", resume_from_checkpoint=forged)
    own_one = tmp_path / "run/run/checkpoints/checkpoint-00000004"
    copied = shutil.copytree(own_one, tmp_path / "kept/checkpoint-00000004")
    run_curriculum(config, few_digits, output_dir=tmp_path / "run", resume_from_checkpoint=copied)


def test_a_file_in_the_place_of_one_that_was_lost_is_refused(train: Train, tmp_path: Path) -> None:
    """Charged, and its hash recorded or not: what then has its name is not of this run."""
    train("other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing.os, "replace", crash_at(RELEASED, tmp_path / "run"))
        with pytest.raises(PowerCut):
            train("run")
    copy_from(tmp_path / "other", tmp_path / "run", RELEASED)
    with pytest.raises(LedgerTamperedError, match="released.safetensors: its hash is not in"):
        train("run", resume=True)


def test_a_run_of_an_earlier_version_is_not_resumed(train: Train, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dp_curriculum.privacy.ledger.SCHEMA_VERSION", "1.0")
        patch.setattr(PrivacyLedger, "has_hashes", True)
        train("run")
    with PrivacyLedger.open(folder.ledger, create=False) as ledger:
        assert not ledger.has_hashes
    before = folder.ledger.read_bytes()
    with pytest.raises(ValueError, match=r"Refusing to resume the run in --output_dir=\S+run: an earlier version"):
        train("run", resume=True)
    assert folder.ledger.read_bytes() == before


# --- crashes ---------------------------------------------------------------------------------------------------------


class PowerCut(Exception):
    """Nothing after it happens."""


def crash_at(name: str, root: Path) -> Callable[..., None]:
    """An `os.replace` that never gives a file this name: all that comes before it was done."""
    replace = os.replace

    def cut(source: Any, target: Any) -> None:
        if Path(target) == root / name:
            raise PowerCut
        replace(source, target)

    return cut


@pytest.mark.parametrize(
    ("name", "lessons", "steps"),
    [(RELEASED, 2, 4), (TAUGHT, 1, 4), ("run/checkpoints/checkpoint-00000002", 1, 4), ("privacy.json", 1, 4)],
)
def test_a_crash_between_a_hash_and_its_file_is_no_obstacle(
    name: str, lessons: int, steps: int, train: Train, tmp_path: Path
) -> None:
    """A release that was lost so is paid again; what follows from releases is computed again, and costs nothing."""
    folder = RunFolder(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", crash_at(name, folder.root))
        with pytest.raises(PowerCut):
            train()
    assert lines_of(folder, "hash")[-1]["name"] == name and not (folder.root / name).exists()
    result = train(resume=True)
    charged = {row["name"]: row["num_steps"] for row in result.report.fields["mechanisms"]}
    assert charged == {"central-images-mean": lessons, "dp-sgd": steps} and result.report.epsilon <= 10
    with PrivacyLedger.open(folder.ledger) as ledger:
        check_contents(folder, plan_lessons(CurriculumConfig.from_yaml(folder.config)), ledger)
    assert not_private_reasons(folder, CurriculumConfig.from_yaml(folder.config), result.report) == []


def test_a_hash_that_could_not_be_written_leaves_no_file(train: Train, tmp_path: Path) -> None:
    """A full disk: what has a name without a hash would be refused ever after."""
    folder, append = RunFolder(tmp_path / "run"), HashChain.append

    def full(self: HashChain, body: dict[str, Any]) -> int:
        if body["type"] == "hash" and body["name"].startswith("run/checkpoints"):
            raise OSError(28, "No space left on device")
        return append(self, body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HashChain, "append", full)
        with pytest.raises(OSError, match="No space left"):
            train()
    assert list_checkpoints(folder.checkpoints) == []
    assert train(resume=True).finished


def test_an_overwritten_checkpoint_keeps_its_hashes(train: Train, tmp_path: Path) -> None:
    """Each of the two is of this run: a crash between them must not make a stranger of the first."""
    train()
    folder = RunFolder(tmp_path / "run")
    with PrivacyLedger.open(folder.ledger) as ledger:
        name = "run/checkpoints/checkpoint-00000004"
        (first,) = ledger.digests(name)
        ledger.record(name, "ab" * 32)
        ledger.record(name, first)
        assert ledger.digests(name) == (first, "ab" * 32)
        check_contents(folder, plan_lessons(CurriculumConfig.from_yaml(folder.config)), ledger)


def test_pickles_beside_taught_weights_are_refused_and_never_read(train: Train, tmp_path: Path) -> None:
    train(stages=["mean", "dp_sgd"])
    config, folder = CurriculumConfig.from_yaml(RunFolder(tmp_path / "run").config), RunFolder(tmp_path / "run")
    (group,) = plan_lessons(config)
    weights = taught_weights(folder, group)
    (weights / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(LedgerTamperedError, match="01-mean/unet: its hash is not in"):
        train(resume=True)


@pytest.mark.parametrize(
    "options",
    [
        ["--overwrite_output_dir"],
        ["--resume_from_checkpoint", "latest"],
        ["--resume_from_checkpoint", "latest", "--sample_steps", "1"],
    ],
)
def test_a_run_under_way_is_neither_replaced_nor_written_into(
    options: list[str], config: CurriculumConfig, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    config.to_yaml(tmp_path / "config.yaml")
    folder = RunFolder(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    command = ["train", "--config", str(tmp_path / "config.yaml"), "--output_dir", str(folder.root), *options]
    with PrivacyLedger.open(folder.ledger):
        assert main(command) == 4
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dp-curriculum: error: ") and str(tmp_path / "run") in error
    assert {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()} == before


# --- how steps were executed -----------------------------------------------------------------------------------------


def test_the_report_states_the_weakest_randomness_that_any_part_of_the_run_used(train: Train, tmp_path: Path) -> None:
    train(secret_randomness="fast")
    again = train(resume=True, secret_randomness="secure").report.fields
    assert again["randomness"]["generator"] == "numpy-philox" and again["randomness"]["secure_rng"] is False
    card = (tmp_path / "run" / "README.md").read_text()
    assert "numpy-philox" in card and "| noise and sampling | chacha20" not in card
    assert [row["name"] for row in again["mechanisms"]] == ["central-images-mean", "dp-sgd"]


def test_a_part_that_was_weaker_is_told_and_splits_no_row_of_the_mechanisms(train: Train, tmp_path: Path) -> None:
    """Half of the steps with each source of noise, in this order."""
    step = DPTrainer.step

    def until_two(self: DPTrainer) -> None:
        if self.num_steps_taken == 2:
            raise PowerCut
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPTrainer, "step", until_two)
        with pytest.raises(PowerCut):
            train(num_dp_steps=6, secret_randomness="secure")
    fields = train(resume=True, num_dp_steps=6, secret_randomness="fast").report.fields
    assert fields["randomness"]["generator"] == "numpy-philox"
    assert [row["num_steps"] for row in fields["mechanisms"]] == [1, 6]
    reserved = lines_of(RunFolder(tmp_path / "run"), "reserve")
    assert [entry["execution"]["randomness"]["generator"] for entry in reserved] == [
        *("chacha20",) * 3,
        "numpy-philox",
    ]


def test_each_reservation_tells_device_precision_and_check(
    train: Train, tmp_path: Path, bf16_hardware: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = train(mixed_precision="bf16").report.fields
    lesson, *hard = (entry["execution"] for entry in lines_of(RunFolder(tmp_path / "run"), "reserve"))
    assert (lesson["device"], lesson["precision"], lesson["gradients"]) == ("cpu", "float64", "not taken")
    assert {(entry["precision"], entry["gradients"]) for entry in hard} == {("bfloat16", "checked")}
    implementation = fields["implementation"]
    assert (implementation["device"], implementation["precision"]) == ("cpu", "bfloat16")
    assert implementation["max_relative_gradient_error"] == hard[0]["max_gradient_error"] > 0
    assert implementation["verified_per_image_gradients"] is True


def test_a_run_that_drew_nothing_says_so(tmp_path: Path) -> None:
    with PrivacyLedger.open(tmp_path / "ledger.jsonl") as ledger:
        execution = ledger.execution
    assert execution.randomness["generator"] == "none" and execution.gradients == "not taken"


def test_taught_weights_are_those_that_the_next_stage_begins_with(train: Train, tmp_path: Path) -> None:
    """The recorded folder holds weights of the lesson, which a resumed run takes up to the last bit."""
    result = train(stages=["mean"])
    taught = load_file(tmp_path / "run" / TAUGHT / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, taught[name]) for name, value in result.pipeline.unet.state_dict().items())
