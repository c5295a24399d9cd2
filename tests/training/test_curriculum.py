"""The whole path on tiny models: what it releases, what it spends, and what interruptions leave."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.diffusion.edm import build_unet, edm_loss
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.lessons import pretraining
from dp_curriculum.lessons.planned import lesson_noise_multiplier
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.accounting import PrivacyBudgetExceeded
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.privacy.verification import verify_report
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.training import curriculum, stages, teaching
from dp_curriculum.training.curriculum import run_curriculum
from dp_curriculum.training.validation import check_gradients


RELEASED = {
    "README.md",
    "lesson_mean.png",
    "model_index.json",
    "pipeline.py",
    "privacy.json",
    "samples.png",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def few_digits() -> datasets.Dataset:
    return digits_dataset().select(range(64))


@pytest.fixture
def config(make_config: Any) -> CurriculumConfig:
    return make_config(checkpointing_steps=2, sample_steps=0, num_inference_steps=2, seed=0)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return DPCurriculumPipeline.from_pretrained(folder).unet.state_dict()


def test_a_run_leaves_pipeline_card_report_and_spends_its_target(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    result = run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    folder = RunFolder(tmp_path / "out")
    shared = {name for name in files_of(folder.root) if not name.startswith("run/")}
    assert shared == RELEASED
    assert 0.99 * 10 <= result.report.epsilon <= 10 and result.finished
    report = json.loads(folder.privacy.read_text())
    assert report == result.pipeline.privacy == result.report.to_dict()
    assert all(check.holds for check in verify_report(report))
    assert [row["name"] for row in report["mechanisms"]] == ["central-images-mean", "dp-sgd"]
    assert report["mechanisms"][1]["num_steps"] == config.dp_sgd.num_dp_steps
    with PrivacyLedger.open(folder.ledger, create=False) as ledger:
        assert ledger.epsilon(1e-5) == result.report.epsilon
    assert len(result.pipeline(class_labels=[3, 7]).images) == 2


def test_the_same_command_twice_gives_other_weights_and_central_images(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        run_curriculum(config, few_digits, output_dir=tmp_path / name)
    first, second = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    assert all(not torch.equal(first[name], second[name]) for name in first if first[name].numel() > 1)
    sheets = [(tmp_path / name / "lesson_mean.png").read_bytes() for name in ("first", "second")]
    assert sheets[0] != sheets[1]


def test_the_seed_sets_the_initial_weights_and_leaves_the_global_generator_alone(config: CurriculumConfig) -> None:
    accelerator = curriculum.make_accelerator(config, RunFolder(Path("unused")))
    state = torch.get_rng_state()
    first = curriculum.initial_unet(config, 10, accelerator).state_dict()
    again = curriculum.initial_unet(config, 10, accelerator).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stages", [["mean"], ["mode", "mean"], ["dp_sgd"], ["moments", "dp_sgd"]])
def test_any_curriculum_runs_and_charges_its_stages_only(
    stages: list[str], config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    result = run_curriculum(config.replace(stages=stages), few_digits, output_dir=tmp_path / "out")
    expected = {
        "mean": ["central-images-mean"],
        "mode": ["central-images-mode"],
        "moments": ["moments-mean", "moments-covariance"],
        "dp_sgd": ["dp-sgd"],
    }
    names = [row["name"] for row in result.report.fields["mechanisms"]]
    assert names == [name for stage in stages for name in expected[stage]]
    assert result.report.epsilon <= 10


def test_a_run_that_starts_from_parts_of_classes_charges_three_queries_and_says_so(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    config = config.replace(stages=["moments", "dp_sgd"], moment_components=3)
    result = run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    names = [row["name"] for row in result.report.fields["mechanisms"]]
    assert names == ["moments-mean", "moments-covariance", "moments-components", "dp-sgd"]
    prior = DPCurriculumPipeline.from_pretrained(tmp_path / "out").prior
    released = load_file(RunFolder(tmp_path / "out").released(1, "moments"))
    assert torch.equal(prior.component_offsets, released["component_offsets"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "and those of 3 parts of it, paid for by its three queries" in card
    assert main(["verify", str(tmp_path / "out"), "--local_run"]) == 0


@pytest.mark.parametrize("stages", [["mean", "dp_sgd"], ["moments", "dp_sgd"]])
def test_a_model_of_patches_trains_samples_and_says_so(
    stages: list[str], config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    """With and without a prior. Each training compares its per-image gradients with autograd's before it spends."""
    result = run_curriculum(config.replace(stages=stages, patch_size=2), few_digits, output_dir=tmp_path / "out")
    assert result.pipeline.unet.config.sample_size == 4 and result.pipeline.image_size == (8, 8)
    loaded = DPCurriculumPipeline.from_pretrained(tmp_path / "out")
    assert loaded.config.patch_size == 2
    assert loaded(batch_size=1).images[0].size == (8, 8)
    assert "1x8x8 in patches of 2x2" in (tmp_path / "out" / "README.md").read_text()
    assert main(["verify", str(tmp_path / "out"), "--local_run"]) == 0


def test_colour_and_unlabelled_images_train_one_class(config: CurriculumConfig, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    images = datasets.Dataset.from_dict(
        {"picture": [Image.fromarray(image) for image in pixels]},
        features=datasets.Features({"picture": datasets.Image()}),
    )
    result = run_curriculum(config.replace(num_channels=3), images, output_dir=tmp_path / "out")
    assert result.pipeline.num_classes == 1
    assert result.pipeline(batch_size=1).images[0].mode == "RGB"


def test_with_a_public_size_nothing_that_is_released_but_noise_depends_on_the_rows(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    """One row fewer, and the only image of a class gone: equal files, shapes, events and report."""
    config = config.replace(public_dataset_size=64)
    nine = few_digits.filter(lambda label: label != 9, input_columns="label", keep_in_memory=True)
    reports = []
    for name, rows in (("all", few_digits), ("fewer", few_digits.select(range(63))), ("no nine", nine)):
        reports.append(run_curriculum(config, rows, output_dir=tmp_path / name).report.to_dict())
        assert reports[-1].pop("weights"), "their hash, which is other noise each time"
    assert reports[0] == reports[1] == reports[2]
    assert files_of(tmp_path / "all") == files_of(tmp_path / "fewer") == files_of(tmp_path / "no nine")
    shapes = [
        {name: tensor.shape for name, tensor in weights_of(tmp_path / name).items()} for name in ("all", "fewer")
    ]
    assert shapes[0] == shapes[1]


def test_an_undeclared_size_is_disclosed(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    report = run_curriculum(config, few_digits, output_dir=tmp_path / "out").report.to_dict()
    assert report["protected_dataset"]["num_records"] == 64
    assert "num_records" in report["unprotected_quantities"]


def test_training_without_noise_is_stamped_not_private(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    result = run_curriculum(config.replace(non_private=True), few_digits, output_dir=tmp_path / "out")
    assert not result.report.fields["private"] and result.report.epsilon == float("inf")
    assert "NOT PRIVATE" in (tmp_path / "out" / "README.md").read_text()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    original = DPTrainer.step

    def step_then_act(self: DPTrainer) -> None:
        original(self)
        if self.num_steps_taken == step:
            action()

    monkeypatch.setattr(DPTrainer, "step", step_then_act)


def test_ctrl_c_leaves_a_valid_pipeline_and_charges_what_was_taken(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.replace(num_dp_steps=6, checkpointing_steps=4)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        result = run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    assert not result.finished
    assert result.report.fields["mechanisms"][1]["num_steps"] == 3
    assert len(result.pipeline(batch_size=2).images) == 2
    resumed = run_curriculum(config, few_digits, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
    assert resumed.finished and resumed.report.fields["mechanisms"][1]["num_steps"] == 6
    assert 9.9 <= resumed.report.epsilon <= 10


def crash() -> None:
    raise RuntimeError("power cut")


def test_a_crash_stays_charged_and_the_resumed_run_ends_within_its_target(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.replace(num_dp_steps=6, checkpointing_steps=2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    steps: list[int] = []
    with monkeypatch.context() as patch:
        original = DPTrainer.step
        patch.setattr(DPTrainer, "step", lambda self: (steps.append(self.num_steps_taken), original(self)))
        result = run_curriculum(config, few_digits, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
    # Steps 1 and 2 are in a checkpoint, 3 and 4 were charged and lost: two of six are left.
    assert steps == [2, 3]
    assert result.report.fields["mechanisms"][1]["num_steps"] == 6
    assert result.report.epsilon <= 10


def test_a_lesson_that_crashes_after_its_charge_is_paid_twice_within_the_target(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(teaching, "_save_tensors", lambda *arguments: crash())
        with pytest.raises(RuntimeError, match="power cut"):
            run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    result = run_curriculum(config, few_digits, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
    lesson, hard = result.report.fields["mechanisms"]
    assert lesson["num_steps"] == 2 and hard["num_steps"] == 4
    assert 9.9 <= result.report.epsilon <= 10


def test_mixed_lessons_are_taught_together_and_charged_each(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many steps as one after the other; after a crash at the second release, it alone is paid again."""
    config = config.replace(stages=["mean", "mode", "dp_sgd"], mix_lessons=True)
    save, steps = teaching._save_tensors, []

    def save_once(run: Any, tensors: Any, path: Path) -> None:
        if "mode" in str(path):
            crash()
        save(run, tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(teaching, "_save_tensors", save_once)
        with pytest.raises(RuntimeError, match="power cut"):
            run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(
            pretraining, "edm_loss", lambda *args, **options: (steps.append(1), edm_loss(*args, **options))[1]
        )
        result = run_curriculum(config, few_digits, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
    assert [row["num_steps"] for row in result.report.fields["mechanisms"]] == [1, 2, 4]
    assert len(steps) == 2 * config.pretraining.pretrain_steps
    folder = RunFolder(tmp_path / "out")
    assert not (folder.lesson(1, "mean") / "unet").exists() and (folder.lesson(2, "mode") / "unet").is_dir()
    again = run_curriculum(config, few_digits, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
    assert again.report.to_dict() == result.report.to_dict()


def test_a_lesson_ends_early_where_its_held_out_images_get_no_better(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    """Nothing can be learned at this rate; to take all steps would take hours."""
    config = config.replace(
        pretrain_steps=10**6, pretrain_learning_rate=1e-30, pretrain_patience=1, central_images_per_class=3
    )
    result = run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    assert [row["num_steps"] for row in result.report.fields["mechanisms"]] == [3, 4]


def test_lessons_spend_the_share_that_they_are_given_and_a_resumed_run_the_same(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    config = config.replace(stages=["mean", "mode", "dp_sgd"], lesson_noise_multiplier=None, lesson_budget_share=0.1)
    result = run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    noise = lesson_noise_multiplier(config)
    assert [row["noise_multiplier"] for row in result.report.fields["mechanisms"][:2]] == [noise, noise]
    assert noise != 20 and 9.9 <= result.report.epsilon <= 10
    again = run_curriculum(config, few_digits, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
    assert again.report.to_dict() == result.report.to_dict()


def test_a_finished_run_is_neither_run_nor_charged_again(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    first = run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    before = weights_of(tmp_path / "out")
    again = run_curriculum(config, few_digits, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
    assert again.report.to_dict() == first.report.to_dict()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(tmp_path / "out").items())


def test_resume_refuses_another_mechanism_and_takes_another_runtime(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"--num_dp_steps=5 to be 4"):
        run_curriculum(
            config.replace(num_dp_steps=5), few_digits, output_dir=tmp_path / "out", resume_from_checkpoint="latest"
        )
    run_curriculum(
        config.replace(max_physical_batch_size=4),
        few_digits,
        output_dir=tmp_path / "out",
        resume_from_checkpoint="latest",
    )


def test_what_is_refused_is_refused_before_anything_is_written(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for broken, error in (
        (config.replace(expected_batch_size=65), ValueError),
        (config.replace(target_epsilon=0.1), PrivacyBudgetExceeded),
        (config.replace(stages=["median", "dp_sgd"]), ValueError),
        (config.replace(image_column="picture"), ValueError),
        (config.replace(attention_resolutions=[3]), ValueError),
    ):
        with pytest.raises(error, match="Expected --"):
            run_curriculum(broken, few_digits, output_dir=out)
        assert not out.exists()
    with pytest.raises(ValueError, match="to hold images"):
        run_curriculum(config, few_digits.select([]), output_dir=out)
    assert not out.exists()


def test_wrong_gradients_stop_a_run_before_it_spends(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dp_curriculum.dp_sgd.layer_gradients import LinearLayer
    from dp_curriculum.per_image_gradients import PerImageGradientError

    original = LinearLayer.weight_gradient
    monkeypatch.setattr(LinearLayer, "weight_gradient", lambda *arguments: original(*arguments) * 1.01)
    with pytest.raises(PerImageGradientError, match="weight"):
        run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_self_check_covers_every_parameter(config: CurriculumConfig) -> None:
    unet = build_unet(config.model, resolution=8, num_channels=1, num_classes=10)
    result = check_gradients(unet, config, num_classes=10)
    assert result["num_parameters"] == len(list(unet.parameters()))
    assert result["unverified_parameters"] == [] and result["max_relative_error"] < 1e-4


def test_trackers_get_values_that_are_safe_to_release_only(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_curriculum(config.replace(report_to="tensorboard", pretrain_steps=50), few_digits, output_dir=tmp_path / "out")
    events = sorted(RunFolder(tmp_path / "out").logs.rglob("events.*"))
    assert events
    tags = {tag for path in events for tag in EventAccumulator(str(path)).Reload().Tags()["scalars"]}
    assert tags == {"mean/loss", "dp_sgd/learning_rate", "privacy/epsilon"}


def test_what_is_shown_does_not_tell_how_long_a_step_took(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a step grows with the images that were drawn. What a trial takes at the start depends on none."""
    monkeypatch.setattr(stages, "_step_seconds", lambda run, trainer: 0.2)
    rows, step, shown = digits_dataset().select(range(64)), DPTrainer.step, []
    config = make_config(stages=["dp_sgd"], num_dp_steps=3, num_inference_steps=2, sample_steps=0)
    for seconds in (0.0, 0.3):
        monkeypatch.setattr(DPTrainer, "step", lambda self, seconds=seconds: (time.sleep(seconds), step(self)))
        run_curriculum(config, rows, output_dir=tmp_path / str(seconds))
        shown.append([line for line in re.split("[\r\n]+", capsys.readouterr().err) if "hard stage" in line])
    assert "3/3" in shown[0][-1] and shown[0] == shown[1]


def test_an_empty_folder_is_refused_only_where_the_number_of_images_is_not_declared(
    config: CurriculumConfig, tmp_path: Path
) -> None:
    """Neighbours: a folder with one image that cannot be read, and one with none. A refusal would tell them apart."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1.png").write_bytes(b"junk")
    for name in ("empty", "one"):
        folder = config.replace(train_data_dir=str(tmp_path / name), public_dataset_size=20)
        assert run_curriculum(folder, output_dir=tmp_path / f"{name}-run").finished
    with pytest.raises(ValueError, match="--train_data_dir=.*empty with --dataset_split=train to hold images"):
        run_curriculum(config.replace(train_data_dir=str(tmp_path / "empty")), output_dir=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_result_shows_itself_in_a_notebook(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    result = run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    assert result.folder == tmp_path / "out" and result.sample_sheet == tmp_path / "out" / "samples.png"
    shown = result._repr_html_()
    assert base64.b64encode(result.sample_sheet.read_bytes()).decode() in shown
    assert html.escape(result.report.statement()) in shown and "stopped" not in shown
    assert "stopped before its end" in dataclasses.replace(result, finished=False)._repr_html_()


def test_a_stop_draws_no_sheet_and_a_picture_says_so(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("dp_curriculum.training.run.save_sheet", lambda images, path, columns: drawn.append(path))
    interrupt_at(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    result = run_curriculum(config.replace(sample_steps=0), few_digits, output_dir=tmp_path / "out")
    assert not result.finished and [path.name for path in drawn] == ["after-mean.png"]
    with Image.open(result.sample_sheet) as note:
        assert note.size == (240, 64)
    assert main(["verify", str(result.folder), "--local_run"]) == 0


def test_a_stop_before_anything_is_spent_ends_at_once(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = curriculum.check_gradients

    def interrupted(*given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return check(*given)

    monkeypatch.setattr(curriculum, "check_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt, match="before anything was spent"):
        run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_time_left_of_noisy_steps_comes_from_a_trial(
    config: CurriculumConfig,
    few_digits: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """However long a true step takes, the bar says the same."""
    monkeypatch.setattr(stages, "_step_seconds", lambda run, trainer: 90.0)
    run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    shown = capfd.readouterr().err
    bar = [line for line in shown.replace("\r", "\n").split("\n") if line.startswith("hard stage")]
    steps = config.dp_sgd.num_dp_steps
    assert f"about {(steps - 1) * 1.5:.1f} minutes left" in "".join(bar)
    assert "it/s" not in "".join(bar) and "left" not in bar[-1]
