"""Going on with a run: from the last valid checkpoint or a named one, and never from what does not belong to it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.ledger import LedgerTamperedError, PrivacyLedger, PrivacyReport
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime import checkpointing
from dp_curriculum.runtime.checkpointing import list_checkpoints, load_checkpoint, save_checkpoint
from dp_curriculum.sharing.export import not_private_reasons
from dp_curriculum.training.curriculum import CurriculumResult, run_curriculum


STEPS = 8
Resume = Callable[..., CurriculumResult]


@pytest.fixture(scope="module")
def few_digits() -> datasets.Dataset:
    return digits_dataset().select(range(64))


@pytest.fixture
def config(make_config: Any) -> CurriculumConfig:
    return make_config(
        num_dp_steps=STEPS,
        checkpointing_steps=2,
        checkpoints_total_limit=3,
        sample_steps=0,
        num_inference_steps=2,
        seed=0,
    )


@pytest.fixture
def broken_off(config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path) -> RunFolder:
    """A run that lost its power in the step after its third checkpoint: 2, 4 and 6 are there, 8 steps are charged."""
    folder = RunFolder(tmp_path / "run")
    step = DPTrainer.step

    def until_six(self: DPTrainer) -> None:
        if self.num_steps_taken == 6:
            raise RuntimeError("power cut")
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPTrainer, "step", until_six)
        with pytest.raises(RuntimeError, match="power cut"):
            run_curriculum(config.replace(num_dp_steps=STEPS), few_digits, output_dir=folder.root)
    assert steps_of(folder) == [6, 4, 2]
    return folder


@pytest.fixture
def resume(config: CurriculumConfig, few_digits: datasets.Dataset, broken_off: RunFolder) -> Resume:
    def go_on(**options: Any) -> CurriculumResult:
        options = options or {"resume_from_checkpoint": "latest"}
        return run_curriculum(config, options.pop("rows", few_digits), output_dir=broken_off.root, **options)

    return go_on


def steps_of(folder: RunFolder) -> list[int]:
    return [load_checkpoint(path).step for path in list_checkpoints(folder.checkpoints)]


def hard_steps(result: CurriculumResult) -> int:
    return result.report.fields["mechanisms"][-1]["num_steps"]


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the steps that are taken from now on, from 0."""
    taken: list[int] = []
    step = DPTrainer.step

    def watched(self: DPTrainer) -> None:
        taken.append(self.num_steps_taken)
        step(self)

    monkeypatch.setattr(DPTrainer, "step", watched)
    return taken


def test_latest_starts_a_run_and_goes_on_with_it(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    first = run_curriculum(config, few_digits, output_dir=tmp_path / "new", resume_from_checkpoint="latest")
    again = run_curriculum(config, few_digits, output_dir=tmp_path / "new", resume_from_checkpoint="latest")
    assert hard_steps(first) == STEPS and again.report.to_dict() == first.report.to_dict()


def test_a_named_checkpoint_is_gone_back_to_and_what_came_later_stays_charged(
    resume: Resume, broken_off: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = watch_steps(monkeypatch)
    result = resume(resume_from_checkpoint=broken_off.checkpoints / "checkpoint-00000004")
    assert taken == [] and hard_steps(result) == STEPS and result.report.epsilon <= 10, "eight were charged"
    assert steps_of(broken_off) == [4, 2]


def test_damaged_and_newer_checkpoints_are_named_and_passed_over(
    resume: Resume, broken_off: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    newest, second, _ = list_checkpoints(broken_off.checkpoints)
    (newest / "unet.safetensors").write_bytes(b"half")
    manifest = json.loads((second / "manifest.json").read_text())
    (second / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with caplog.at_level(logging.WARNING):
        result = resume()
    assert "checkpoint-00000006/unet.safetensors is damaged" in caplog.text
    assert "checkpoint-00000004 has format 2; this version reads 1" in caplog.text
    assert "6 charged steps were lost" in caplog.text
    assert hard_steps(result) == STEPS and result.finished


def test_a_valid_checkpoint_is_kept_beside_a_damaged_one_of_a_later_step(tmp_path: Path) -> None:
    def save(step: int) -> Path:
        return save_checkpoint(tmp_path, step=step, tensors={}, facts={}, total_limit=1)

    (save(8) / "manifest.json").write_text("{")
    save(6)
    found, passed_over = checkpointing.latest_checkpoint(tmp_path)
    assert found is not None and found.step == 6 and len(passed_over) == 1


@pytest.mark.parametrize("name", ["nowhere", "unet"])
def test_what_is_no_checkpoint_is_refused_by_name(name: str, resume: Resume, broken_off: RunFolder) -> None:
    (broken_off.root / "unet").mkdir()
    with pytest.raises(ValueError, match=rf"--resume_from_checkpoint=\S+{name} to be a checkpoint"):
        resume(resume_from_checkpoint=broken_off.root / name)


def test_checkpoints_of_another_configuration_or_another_run_are_refused(
    resume: Resume, broken_off: RunFolder, config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    others = {"other": config.replace(dp_max_grad_norm=2.0), "same": config}
    for name, other in others.items():
        run_curriculum(other, few_digits, output_dir=tmp_path / name)
    checkpoint = {name: RunFolder(tmp_path / name).checkpoints / "checkpoint-00000008" for name in others}
    before = broken_off.ledger.read_bytes()
    with pytest.raises(ValueError, match="step 8 in .* not of the run in"):
        resume(resume_from_checkpoint=checkpoint["other"])
    with pytest.raises(LedgerTamperedError, match="checkpoint of step 8"):
        resume(resume_from_checkpoint=checkpoint["same"])
    shutil.copytree(checkpoint["other"], broken_off.checkpoints / "checkpoint-00000008")
    with pytest.raises(ValueError, match="step 8 in .* not of the run in"):
        resume()
    assert broken_off.ledger.read_bytes() == before and steps_of(broken_off) == [8, 6, 4, 2]


def test_another_number_of_images_is_refused(resume: Resume, few_digits: datasets.Dataset) -> None:
    with pytest.raises(ValueError, match=r"another number of images, at sample rate 0.25, not 0.266667"):
        resume(resume_from_checkpoint="latest", rows=few_digits.select(range(60)))


@pytest.mark.parametrize("kept", ["taught", "released"])
def test_a_lesson_that_the_ledger_does_not_charge_is_refused(
    kept: str, make_config: Any, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    """The ledger was lost, or the lesson is of another run: it would be used, and the report would say epsilon 0."""
    config = make_config(stages=["mean"], num_inference_steps=2, sample_steps=0)
    folder = RunFolder(tmp_path / "run")
    run_curriculum(config, few_digits, output_dir=folder.root)
    for path in folder.ledger.parent.glob("privacy_ledger*"):
        path.unlink()
    if kept == "released":
        shutil.rmtree(folder.lesson(1, "mean") / "unet")
    with pytest.raises(LedgerTamperedError, match="01-mean: .* does not charge central-images-mean"):
        run_curriculum(config, few_digits, output_dir=folder.root, resume_from_checkpoint="latest")
    report = PrivacyReport.from_file(folder.privacy)
    reasons = not_private_reasons(folder, config, report)
    assert reasons == ["it holds a lesson or a checkpoint that is not of its ledger"]


def test_another_number_of_classes_is_refused(
    resume: Resume, few_digits: datasets.Dataset, broken_off: RunFolder
) -> None:
    names = datasets.ClassLabel(names=[*map(str, range(10)), "an eleventh"])
    before = broken_off.ledger.read_bytes()
    with pytest.raises(ValueError, match="the run in .* began with 10 classes, not 11"):
        resume(resume_from_checkpoint="latest", rows=few_digits.cast_column("label", names))
    assert broken_off.ledger.read_bytes() == before


def test_a_lost_lesson_is_not_charged_again_once_the_hard_stage_has_begun(
    resume: Resume, broken_off: RunFolder
) -> None:
    shutil.rmtree(broken_off.lesson(1, "mean"))
    before = broken_off.ledger.read_bytes()
    with pytest.raises(ValueError, match="01-mean lacks the weights"):
        resume()
    assert broken_off.ledger.read_bytes() == before


def test_lessons_alone_never_pass_their_target(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    """Each crash between charge and save is paid; when the next would pass the target, it is refused."""
    from dp_curriculum.privacy.accounting import PrivacyBudgetExceeded
    from dp_curriculum.training import teaching

    lessons = config.replace(stages=["mean"], lesson_noise_multiplier=2.0, target_epsilon=3.5)

    def crash(*arguments: Any) -> None:
        raise RuntimeError("power cut")

    outcomes: list[type[BaseException]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching, "_save_tensors", crash)
        for _ in range(4):
            with pytest.raises((RuntimeError, PrivacyBudgetExceeded)) as found:
                run_curriculum(lessons, few_digits, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
            outcomes.append(found.type)
    assert outcomes[0] is RuntimeError and outcomes[-1] is PrivacyBudgetExceeded
    with PrivacyLedger.open(RunFolder(tmp_path / "out").ledger) as ledger:
        assert ledger.epsilon(1e-5) <= 3.5


def test_checkpoints_hold_weights_and_public_facts_alone(broken_off: RunFolder) -> None:
    for path in list_checkpoints(broken_off.checkpoints):
        names = {file.name for file in path.iterdir()}
        assert names == {"ema.safetensors", "manifest.json", "optimizer.safetensors", "unet.safetensors"}
        manifest = json.loads((path / "manifest.json").read_text())
        assert set(manifest) == {"format", "step", "files", "facts", "sha256"}
        assert set(manifest["facts"]) == {"ledger_head", "mechanism"}
        checkpoint = load_checkpoint(path)
        weights = checkpoint.tensors["unet"]
        for name, tensor in checkpoint.tensors["optimizer"].items():
            parameter, _, kind = name.rpartition(".")
            assert kind in ("exp_avg", "exp_avg_sq", "step")
            assert tensor.shape == (() if kind == "step" else weights[parameter].shape)
        assert str(broken_off.root) not in (path / "manifest.json").read_text()


@pytest.mark.parametrize("left", [["run"], ["run", "run/.tmp-config.yaml"], [".tmp-run"]])
def test_what_an_early_interruption_leaves_is_no_obstacle(left: list[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    for name in left:
        (folder.root / name).mkdir(parents=True, exist_ok=True)
    folder.check(resume=False, overwrite=False)
    (folder.root / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        folder.check(resume=False, overwrite=False)
