"""Options of earlier versions: files are read where they mean the same, all else is refused by the new name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.config_history import FIELDS, FLAGS


# The `config.yaml` of a run with the defaults of version 0.1.0's development: every field is written out.
OLD_CONFIG = """\
data:
  dataset_name: digits
  dataset_config_name: null
  train_data_dir: null
  dataset_split: train
  image_column: null
  label_column: null
  resolution: 28
  num_channels: 1
  num_classes: null
  class_names: []
  intensity_range: []
  alpha_background: 1.0
  image_root: null
privacy:
  target_epsilon: 10.0
  target_delta: 1.0e-05
  adjacency: add-or-remove-one
  group_size: 1
  public_dataset_size: null
  non_private: false
curriculum:
  stages:
  - mean
  - dp_sgd
  lesson_budget_share: null
central_images:
  central_images_per_class: 1
  central_sample_rate: 1.0
  central_noise_multiplier: 20.0
  central_resolution: null
  central_max_image_norm: null
  central_center: 0.5
  central_num_bins: 2
  central_median_filter: 3
  central_sharpen: true
moment_images:
  moment_noise_multiplier: 20.0
  moment_resolution: null
  moment_max_image_norm: null
  moment_center: 0.5
  moment_max_residual_norm: null
  moment_own_share: 0.5
  moment_max_rank: 64
frequency_images:
  frequency_noise_multiplier: 25.0
  num_frequencies: 5000
  frequency_length_scale: null
  frequency_resolution: null
  frequency_fit_steps: 600
  frequency_fit_batch_size: 32
  frequency_learning_rate: 0.003
  frequency_images_per_class: 1000
public_images:
  pretrain_dataset_name: null
  pretrain_dataset_config_name: null
  pretrain_dataset_split: train
model:
  block_out_channels:
  - 32
  - 64
  layers_per_block: 1
  attention_resolutions: []
  attention_head_dim: 32
  norm_num_groups: 16
  resnet_time_scale_shift: default
  sigma_data: 0.5773502691896257
pretraining:
  pretrain_steps: 1000
  pretrain_patience: null
  pretrain_batch_size: 64
  mix_lessons: false
  pretrain_learning_rate: 0.0003
  pretrain_ema_decay: 0.999
  pretrain_p_mean: -1.2
  pretrain_p_std: 1.2
  label_dropout: 0.1
  augment_rotation: 10.0
  augment_translation: 0.08
  augment_scaling: 0.1
  augment_shear: 0.1
  augment_flip: false
dp_sgd:
  num_dp_steps: 200
  expected_batch_size: 1024
  noise_multiplicity: 2
  dp_max_grad_norm: 0.001
  dp_learning_rate: 0.001
  dp_warmup_steps: 0
  dp_lr_scheduler: constant
  dp_ema_decay: 0.95
  dp_p_mean: -1.2
  dp_p_std: 1.2
sampler:
  num_inference_steps: 18
  guidance_scale: 1.0
  s_churn: 0.0
  s_tmin: 0.05
  s_tmax: 50.0
  s_noise: 1.0
  sigma_min: 0.002
  sigma_max: 80.0
runtime:
  seed: null
  max_physical_batch_size: 128
  per_image_gradients: auto
  gradient_memory_limit: 2048
  mixed_precision: null
  secret_randomness: auto
  checkpointing_steps: 50
  checkpoints_total_limit: 2
  sample_steps: 50
  report_to: none
  tracker_project_name: dp_curriculum
  push_to_hub: false
  hub_model_id: null
  hub_private_repo: true

"""

# Section, name, value that loads, value that does not, and what the refusal says.
REMOVED: list[tuple[str, str, Any, Any, str]] = [
    ("pretraining", "pretrain_ema_decay", 0.999, 0.99, "always 0.999"),
    ("pretraining", "pretrain_p_std", 1.2, 1.0, "--pretrain_p_mean"),
    ("pretraining", "augment_rotation", 10, 5.0, "--augmentation"),
    ("pretraining", "augment_translation", 0.08, 0.0, "--augmentation"),
    ("pretraining", "augment_scaling", "1e-1", "much", "--augmentation"),
    ("pretraining", "augment_shear", 0.1, None, "--augmentation"),
    ("dp_sgd", "dp_p_std", "1.2", 1.0, "--dp_p_mean"),
    ("dp_sgd", "dp_lr_scheduler", "constant", "cosine", "--dp_warmup_steps"),
    ("model", "sigma_data", 3**-0.5, 0.5, "square root of 1/3"),
    ("model", "attention_head_dim", 32, 8, "--block_out_channels"),
    ("model", "norm_num_groups", 16, 8, "--block_out_channels"),
    ("sampler", "s_tmin", 0.05, 0.0, "--s_churn"),
    ("sampler", "s_tmax", 50, 80.0, "--s_churn"),
    ("sampler", "s_noise", 1, 1.003, "--s_churn"),
    ("sampler", "sigma_min", 2e-3, 0.01, "always 0.002"),
    ("sampler", "sigma_max", 80, True, "always 80"),
    ("runtime", "tracker_project_name", "dp_curriculum", "mine", "named dp_curriculum"),
    ("runtime", "hub_private_repo", True, "yes", "--public"),
    ("central_images", "central_num_bins", 2, 3, "always 2"),
    ("central_images", "central_median_filter", 3, 5, "--no_central_post_process"),
    ("central_images", "central_sharpen", True, False, "--no_central_post_process"),
    ("moment_images", "moment_own_share", 0.5, 1.0, "always 0.5"),
    ("moment_images", "moment_max_rank", 64, 32, "always 64"),
    ("frequency_images", "num_frequencies", 5000, 100, "always 5000"),
    ("frequency_images", "frequency_fit_steps", 600, 6, "always 600"),
    ("frequency_images", "frequency_fit_batch_size", 32, 6, "always 32"),
    ("frequency_images", "frequency_learning_rate", "3e-3", 1.0, "always 0.003"),
    ("frequency_images", "frequency_images_per_class", 1000, 6, "always 1000"),
]
MOVED = [
    ("pretraining", "mix_lessons", "curriculum", True),
    ("pretraining", "label_dropout", "model", 0.2),
    ("curriculum", "lesson_budget_share", "privacy", 0.2),
    ("central_images", "central_images_per_class", "lessons", 3),
    ("central_images", "central_sample_rate", "lessons", 0.2),
    ("moment_images", "moment_max_residual_norm", "lessons", 0.2),
    ("frequency_images", "frequency_length_scale", "lessons", 0.2),
]
# What each kind of lesson had for itself.
SHARED = {
    "central_noise_multiplier": "--lesson_noise_multiplier",
    "moment_noise_multiplier": "--lesson_noise_multiplier",
    "frequency_noise_multiplier": "--lesson_noise_multiplier",
    "central_resolution": "--lesson_resolution",
    "moment_resolution": "--lesson_resolution",
    "frequency_resolution": "--lesson_resolution",
    "central_max_image_norm": "--lesson_max_image_norm",
    "moment_max_image_norm": "--lesson_max_image_norm",
    "central_center": "--background_level",
    "moment_center": "--background_level",
}
removed = pytest.mark.parametrize(
    ("section", "name", "kept", "other", "words"), REMOVED, ids=[name for _, name, *_ in REMOVED]
)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command with status 2 ends in."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_every_row_is_tested() -> None:
    shared = {f"{name.partition('_')[0]}_images.{name}" for name in SHARED}
    assert {f"{section}.{name}" for section, name, *_ in [*REMOVED, *MOVED]} | shared == set(FIELDS)


def test_no_removed_name_is_a_field_and_every_new_place_is_one() -> None:
    fields = {f"{section}.{name}" for section, names in CurriculumConfig().to_dict().items() for name in names}
    assert not fields & set(FIELDS)
    assert {former.moved_to for former in FIELDS.values() if former.moved_to is not None} <= fields


def test_a_whole_configuration_of_before_means_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(OLD_CONFIG)
    config = CurriculumConfig.from_yaml(tmp_path / "config.yaml")
    runtime = {"max_physical_batch_size": 128, "gradient_memory_limit": 2048}  # defaults of then, as values
    assert config == CurriculumConfig().replace(
        num_channels=1, stages=["mean", "dp_sgd"], lesson_noise_multiplier=20.0, resnet_time_scale_shift="default",
        **runtime,
    )  # fmt: skip
    model = config.model
    assert (model.attention_head_dim, model.norm_num_groups, model.label_dropout) == (32, 16, 0.1)
    assert config.pretraining.augmentation == "affine" and config.runtime.public is False
    config.to_yaml(tmp_path / "again.yaml")
    assert CurriculumConfig.from_yaml(tmp_path / "again.yaml") == config


@removed
def test_a_removed_flag_is_refused_and_the_new_one_named(
    section: str, name: str, kept: Any, other: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ([f"--{name}", f"{kept}"], [f"--{name}={kept}"], [f"--{name.replace('_', '-')}", f"{kept}"]):
        message = refusal(capsys, "train", "--output_dir", "out", *flag)
        assert f"--{name} was removed: " in message and words in message


@removed
def test_a_file_is_read_where_it_means_the_same(section: str, name: str, kept: Any, other: Any, words: str) -> None:
    assert CurriculumConfig.from_dict({section: {name: kept}}) == CurriculumConfig()


@removed
def test_a_file_is_refused_where_it_means_something_else(
    section: str,
    name: str,
    kept: Any,
    other: Any,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({section: {name: other}}))
    message = refusal(capsys, "plan", "--config", str(tmp_path / "config.yaml"))
    assert f"--{name}={other} was removed: " in message and words in message
    # A run that has ended is still checked and shared.
    assert CurriculumConfig.from_yaml(tmp_path / "config.yaml", finished=True) == CurriculumConfig()


@removed
def test_replace_refuses_a_removed_name(section: str, name: str, kept: Any, other: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"--{name} was removed: .*{words}"):
        CurriculumConfig().replace(**{name: kept})


@pytest.mark.parametrize(("before", "name", "after", "value"), MOVED)
def test_a_moved_field_is_read_where_it_was_and_keeps_its_flag(
    before: str, name: str, after: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = CurriculumConfig().replace(**{name: value})
    assert expected.to_dict()[after][name] == value
    for values in ({before: {name: value}}, {after: {name: value}}, {before: {name: value}, after: {name: value}}):
        assert CurriculumConfig.from_dict(values) == expected
    with pytest.raises(ValueError, match=rf"{before}.{name}={value} to be left out beside {after}.{name}=0"):
        CurriculumConfig.from_dict({before: {name: value}, after: {name: 0}})
    assert main(["plan", "--no_estimate", f"--{name}", str(value)]) == 0


@pytest.mark.parametrize(
    ("amounts", "expected"),
    [
        ((10, 0.08, 0.1, 0.1), "affine"),
        ((0, 0.03, "5e-2", 0.0), "shift"),
        ((0, 0, 0, 0), "none"),
        ((10, 0.03, 0.05, 0), None),
        ((0, 0.03, 0.05, False), None),
    ],
)
def test_augmentations_of_before(amounts: tuple[Any, ...], expected: str | None) -> None:
    names = ("augment_rotation", "augment_translation", "augment_scaling", "augment_shear")
    old = {"pretraining": {**dict(zip(names, amounts)), "augment_flip": True}}
    if expected is None:
        with pytest.raises(
            ValueError, match="augment_rotation=.* was removed: use --augmentation none, shift or affine"
        ):
            CurriculumConfig.from_dict(old)
    else:
        assert CurriculumConfig.from_dict(old) == CurriculumConfig().replace(augmentation=expected, augment_flip=True)
        old["pretraining"]["augmentation"] = {"affine": "shift"}.get(expected, "affine")
        with pytest.raises(ValueError, match="to be left out beside pretraining.augmentation="):
            CurriculumConfig.from_dict(old)


@pytest.mark.parametrize(("name", "successor"), SHARED.items())
def test_what_a_lesson_had_for_itself_is_refused_as_a_flag(
    name: str, successor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--{name} was removed: use {successor}." in refusal(capsys, "plan", f"--{name}", "7")
    with pytest.raises(ValueError, match=f"--{name} was removed: use {successor}"):
        CurriculumConfig().replace(**{name: 7})


def test_a_preset_of_before_means_the_same() -> None:
    moments = {"moment_noise_multiplier": 25, "moment_center": 0, "moment_max_image_norm": 6.5}
    old = {
        "curriculum": {"stages": ["moments", "dp_sgd"]},
        "moment_images": {**moments, "moment_max_residual_norm": 3, "moment_resolution": 12},
        "central_images": {"central_noise_multiplier": 3.0},  # of a lesson that is not among the stages
    }
    expected = {"stages": ["moments", "dp_sgd"], "lesson_noise_multiplier": 25, "background_level": 0}
    expected |= {"lesson_max_image_norm": 6.5, "moment_max_residual_norm": 3, "lesson_resolution": 12}
    assert CurriculumConfig.from_dict(old) == CurriculumConfig().replace(**expected)
    shared = {**old, "curriculum": {"stages": ["moments", "dp_sgd"], "lesson_budget_share": 0.1}}
    with_share = {**expected, "lesson_noise_multiplier": None, "lesson_budget_share": 0.1}
    assert CurriculumConfig.from_dict(shared) == CurriculumConfig().replace(**with_share)


def test_a_file_without_stages_meant_the_mean() -> None:
    config = CurriculumConfig.from_dict({"central_images": {"central_noise_multiplier": 4, "central_resolution": 8}})
    assert config == CurriculumConfig().replace(
        stages=["mean", "dp_sgd"], lesson_noise_multiplier=4, lesson_resolution=8
    )


def test_lessons_that_differ_in_what_they_share_now_are_refused() -> None:
    old: dict[str, Any] = {"curriculum": {"stages": ["mean", "frequency", "dp_sgd"]}}
    old["central_images"] = {"central_noise_multiplier": 4}
    with pytest.raises(ValueError, match="central_noise_multiplier=4 was removed: use --lesson_noise_multiplier"):
        CurriculumConfig.from_dict(old)
    old["frequency_images"] = {"frequency_noise_multiplier": 4}
    assert CurriculumConfig.from_dict(old).privacy.lesson_noise_multiplier == 4


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_was_private_is_not_public(private: bool) -> None:
    config = CurriculumConfig.from_dict({"runtime": {"hub_private_repo": private}})
    assert config == CurriculumConfig().replace(public=not private)


def test_the_flag_that_made_a_repository_public_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "as public with --public" in refusal(capsys, "train", "--output_dir", "out", "--no_hub_private_repo")


@pytest.mark.parametrize(
    ("channels", "attention", "groups", "head"), [([16, 48], [14], 8, 16), ([8], [], 4, 8), ([64, 64], [14], 16, 32)]
)
def test_what_follows_from_the_channels_of_the_file_may_stand_in_it(
    channels: list[int], attention: list[int], groups: int, head: int
) -> None:
    shape = {"block_out_channels": channels, "attention_resolutions": attention}
    derived = {"norm_num_groups": groups, "attention_head_dim": head}
    assert CurriculumConfig.from_dict({"model": {**shape, **derived}}) == CurriculumConfig().replace(**shape)
    for name, value in derived.items():
        with pytest.raises(ValueError, match=rf"--{name}={value // 2} was removed: .* --block_out_channels"):
            CurriculumConfig.from_dict({"model": {**shape, **derived, name: value // 2}})


def test_reading_changes_nothing_that_it_is_given() -> None:
    values = yaml.safe_load(OLD_CONFIG)
    before = copy.deepcopy(values)
    CurriculumConfig.from_dict(values)
    assert values == before


def test_an_old_name_in_another_section_is_unknown() -> None:
    with pytest.raises(ValueError, match="Unknown field of section 'model'"):
        CurriculumConfig.from_dict({"model": {"dp_p_std": 1.2}})


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command in FLAGS for flag in FLAGS[command]])
def test_a_flag_of_a_command_is_refused(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, command, "out", f"--{flag}")
    assert f"--{flag} was removed: {FLAGS[command][flag]}." in message


def test_what_stands_after_two_dashes_is_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "was removed" not in refusal(capsys, "sample", "--output_dir", "out", "--", "--sigma_data")


def test_fp16_is_not_offered_and_refused_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "--mixed_precision {no,bf16}" in " ".join(shown.split()) and "fp16" not in shown
    assert "the loss scaling of fp16 breaks the clipping bound" in refusal(capsys, "plan", "--mixed_precision", "fp16")
