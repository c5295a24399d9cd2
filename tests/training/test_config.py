"""Configurations: what they refuse and how they say it, and that YAML, flags and `replace` mean the same fields."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig, read_yaml
from dp_curriculum.diffusion.edm import build_unet


FIELDS = [field.name for section in CurriculumConfig.sections().values() for field in dataclasses.fields(section)]
NAN, INF = math.nan, math.inf

REFUSED: list[tuple[str, Any]] = [
    ("resolution", 3),
    ("num_channels", 2),
    ("num_classes", 0),
    *[("target_epsilon", value) for value in (0.0, -1.0, INF, NAN)],
    *[("target_delta", value) for value in (0.0, 1.0, -0.1, NAN)],
    ("adjacency", "substitute"),
    ("group_size", 0),
    ("public_dataset_size", 0),
    *[("stages", value) for value in ([], ["mean", "mean"], ["dp_sgd", "mean"])],
    *[("lesson_budget_share", value) for value in (0.0, 1.0, -0.1, NAN)],
    ("central_images_per_class", 0),
    *[("central_sample_rate", value) for value in (0.0, 1.5, NAN)],
    *[("lesson_noise_multiplier", value) for value in (0.0, INF, NAN)],
    *[("lesson_resolution", value) for value in (0, 29)],
    *[("lesson_max_image_norm", value) for value in (0.0, INF)],
    *[("background_level", value) for value in (-0.1, 1.1, NAN)],
    *[("block_out_channels", value) for value in ([], [0], [16, -16])],
    ("layers_per_block", 0),
    ("pretrain_steps", -1),
    ("pretrain_batch_size", 0),
    ("pretrain_patience", 0),
    *[("pretrain_learning_rate", value) for value in (0.0, NAN)],
    *[("pretrain_p_mean", value) for value in (INF, NAN)],
    *[("label_dropout", value) for value in (-0.1, 1.0)],
    ("augmentation", "rotate"),
    ("num_dp_steps", 0),
    *[("expected_batch_size", value) for value in (0, -5)],
    ("noise_multiplicity", 0),
    *[("dp_max_grad_norm", value) for value in (0.0, INF, NAN)],
    ("dp_learning_rate", 0.0),
    ("dp_warmup_steps", -1),
    *[("dp_ema_decay", value) for value in (-0.1, 1.0)],
    *[("dp_p_mean", value) for value in (-INF, NAN)],
    *[("trainable", value) for value in ("some", "lora", "attention", "bias_norm")],  # a network that nothing trained
    *[("lora_rank", value) for value in (0, 4)],  # without --trainable lora
    ("lora_alpha", 2.0),
    ("lora_target_modules", ["to_q"]),
    ("num_inference_steps", 0),
    *[("guidance_scale", value) for value in (-1.0, NAN)],
    ("s_churn", -1.0),
    ("max_physical_batch_size", 0),
    ("per_image_gradients", "ghost"),
    ("gradient_memory_limit", -1),
    *[("mixed_precision", value) for value in ("fp16", "fp8")],
    ("secret_randomness", "seeded"),
    ("checkpointing_steps", 0),
    ("checkpoints_total_limit", 0),
    ("sample_steps", -1),
]

WRONG_TYPES: list[tuple[str, Any]] = [
    ("target_epsilon", "ten"),
    ("target_epsilon", True),
    ("target_epsilon", None),
    ("target_epsilon", [10]),
    ("resolution", 28.5),
    ("resolution", "28 pixels"),
    ("resolution", True),
    ("resolution", INF),
    ("dataset_name", None),
    ("dataset_name", ["digits"]),
    ("dataset_name", {"name": "digits"}),
    ("mixed_precision", True),
    ("non_private", 1),
    ("non_private", "true"),
    ("block_out_channels", 32),
    ("block_out_channels", "32, 64"),
    ("block_out_channels", [32.5]),
    ("block_out_channels", [True]),
    ("stages", "mean"),
    ("stages", [["mean"]]),
    ("stages", [None]),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_a_value_out_of_range_is_refused_with_flag_value_and_what_to_do(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        CurriculumConfig().replace(**{name: value})
    message = str(caught.value)
    assert re.match(rf"Expected --{name}={re.escape(str(value))} (to|in) \S+", message), message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=str)
def test_a_value_of_another_type_is_refused_and_never_converted(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^Expected --{name}=.* to be of type \S.*\.$"):
        CurriculumConfig().replace(**{name: value})


def test_resolution_must_be_halved_by_every_level_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"--resolution=30 to be a multiple of 4: --block_out_channels=\[32, 32"):
        CurriculumConfig().replace(resolution=30, block_out_channels=[32, 32, 32])
    assert CurriculumConfig().replace(resolution=32, block_out_channels=[32, 32, 32]).model.total_downsampling == 4


@pytest.mark.parametrize(
    ("channels", "attention", "groups", "head"),
    [
        ([32, 64], [], 16, 32),
        ([16, 48], [], 8, 32),
        ([16, 48], [14], 8, 16),
        ([64, 64], [14], 16, 32),
        ([32, 64, 128], [32, 16], 16, 32),
        ([8], [], 4, 8),
        ([40, 80], [], 10, 32),  # 16 groups do not divide 40 channels
        ([20, 30], [], 5, 30),
        ([3, 5], [], 1, 5),
    ],
)
def test_groups_and_heads_follow_from_the_channels(
    channels: list[int], attention: list[int], groups: int, head: int
) -> None:
    model = CurriculumConfig().replace(block_out_channels=channels, attention_resolutions=attention).model
    assert (model.norm_num_groups, model.attention_head_dim) == (groups, head)
    sides = [28 // 2**level for level in range(len(channels))]
    unet = build_unet(
        replace(model, attention_resolutions=attention and sides[-1:]), resolution=28, num_channels=1, num_classes=2
    )
    output = unet(torch.zeros(1, 1, 28, 28), torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.long)).sample
    assert output.shape == (1, 1, 28, 28)


def test_batch_larger_than_the_public_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--expected_batch_size=1024 to be at most .*--public_dataset_size=1000"):
        CurriculumConfig().replace(public_dataset_size=1000)
    CurriculumConfig().replace(public_dataset_size=1024)
    # Without a hard stage there is no batch to be too large.
    CurriculumConfig().replace(public_dataset_size=1000, stages=["mean"])


def test_yaml_round_trip_keeps_every_field(tmp_path: Path) -> None:
    config = CurriculumConfig().replace(
        dataset_name="org/faces",
        train_data_dir="my images",
        label_column="none",
        num_classes=7,
        target_epsilon=0.1 + 0.2,
        target_delta=1e-7,
        adjacency="replace-one",
        public_dataset_size=60_000,
        non_private=True,
        stages=["mode", "mean", "dp_sgd"],
        lesson_resolution=7,
        block_out_channels=[32, 48, 64],
        attention_resolutions=[7],
        mixed_precision="bf16",
        seed=3,
    )
    config.to_yaml(tmp_path / "config.yaml")
    assert CurriculumConfig.from_yaml(tmp_path / "config.yaml") == config
    assert CurriculumConfig.from_dict(config.to_dict()) == config
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) == set(CurriculumConfig.sections())


def test_defaults_survive_yaml(tmp_path: Path) -> None:
    CurriculumConfig().to_yaml(tmp_path / "config.yaml")
    assert CurriculumConfig.from_yaml(tmp_path / "config.yaml") == CurriculumConfig()


def test_yaml_scalars_mean_what_a_person_writes(tmp_path: Path) -> None:
    """YAML 1.1 reads `1e-5` as a string and a bare `no` as false."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "privacy: {target_epsilon: 1, target_delta: 1e-5}\n"
        "runtime: {mixed_precision: no, seed: null, max_physical_batch_size: 64.0}\n"
        "data:\n"
        "curriculum: {stages: [mean]}\n"
    )
    config = CurriculumConfig.from_yaml(path)
    assert config.privacy.target_delta == 1e-5
    assert isinstance(config.privacy.target_epsilon, float) and config.privacy.target_epsilon == 1
    assert config.runtime.mixed_precision == "no" and config.runtime.seed is None
    assert isinstance(config.runtime.max_physical_batch_size, int) and config.runtime.max_physical_batch_size == 64
    assert config.curriculum.lessons == ["mean"] and config.data == CurriculumConfig().data


def test_unknown_names_are_refused_and_the_known_ones_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown section 'dpsgd' .*expected one of .*dp_sgd"):
        CurriculumConfig.from_dict({"dpsgd": {}})
    with pytest.raises(ValueError, match=r"section 'privacy'.*'epsilon'.*target_epsilon"):
        CurriculumConfig.from_dict({"privacy": {"epsilon": 1}})
    with pytest.raises(ValueError, match=r"Unknown field 'epsilon'.*target_epsilon"):
        CurriculumConfig().replace(epsilon=1)
    (tmp_path / "config.yaml").write_text("privacy: {1: 2, epsilon: 3}\n")
    with pytest.raises(ValueError, match=r"Unknown field of section 'privacy'"):
        CurriculumConfig.from_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize("text", ["privacy: 3\n", "- privacy\n", "privacy\n", "privacy: {\n"])
def test_yaml_that_is_not_sections_of_fields_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^Expected --config=\S+config.yaml to .*") as caught:
        read_yaml(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


def test_empty_yaml_is_the_defaults_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert CurriculumConfig.from_yaml(tmp_path / "empty.yaml") == CurriculumConfig()
    with pytest.raises(ValueError, match=r"--config=\S+missing.yaml to exist: give the path"):
        CurriculumConfig.from_yaml(tmp_path / "missing.yaml")


def test_replace_changes_one_field_of_a_copy() -> None:
    config = CurriculumConfig()
    changed = config.replace(target_epsilon=1, seed=5, block_out_channels=[48])
    assert (changed.privacy.target_epsilon, changed.runtime.seed, changed.model.block_out_channels) == (1.0, 5, [48])
    assert config == CurriculumConfig()
    assert changed.replace(target_epsilon=10.0, seed=None, block_out_channels=[32, 64]) == config


def test_configurations_are_frozen_and_take_keywords_only() -> None:
    config = CurriculumConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.privacy.target_epsilon = 1.0  # type: ignore[misc]
    for section in CurriculumConfig.sections().values():
        with pytest.raises(TypeError):
            section("digits")


def test_every_field_name_is_unique_over_the_sections() -> None:
    assert len(FIELDS) == len(set(FIELDS))


def test_every_field_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    flags = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert set(FIELDS) <= flags
    for section in CurriculumConfig.sections().values():
        for field in dataclasses.fields(section):
            assert field.metadata["help"].strip(), field.name
