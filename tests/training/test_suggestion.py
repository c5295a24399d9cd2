"""`plan --suggest`: what it writes for public facts, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.training.cost_estimate import CostEstimate
from dp_curriculum.training.suggestion import Suggestion, suggest


CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
PRESETS = ("mnist-eps1-cpu", "mnist-eps10-cpu", "fashion-mnist-eps1-cpu", "fashion-mnist-eps10-cpu")
SECONDS_PER_ROW = 1 / 240  # of one core, when the presets were measured


def cost(config: CurriculumConfig, seconds_per_row: float = SECONDS_PER_ROW) -> CostEstimate:
    rows = config.dp_sgd.num_dp_steps * config.dp_sgd.expected_batch_size * config.dp_sgd.noise_multiplicity
    return CostEstimate(76_000, 76_000, 1, 0.0, 0.0, 0.0, rows * seconds_per_row, 0.0, 0)


def facts(**fields: Any) -> CurriculumConfig:
    given: dict[str, Any] = {"dataset_name": "org/private", "num_channels": 1, "resolution": 28, "num_classes": 10}
    return CurriculumConfig().replace(**{**given, "target_epsilon": 3.0, "target_delta": 1e-6, **fields})


def suggested(
    size: int = 60_000, hours: float = 2.0, seconds_per_row: float = SECONDS_PER_ROW, **fields: Any
) -> Suggestion:
    config = facts(public_dataset_size=size, **fields)
    return suggest(config, dataset_size=size, hours=hours, measure=lambda tried: cost(tried, seconds_per_row))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_are_what_it_writes(preset: str) -> None:
    """In 43 minutes of the core that they were measured on."""
    config = CurriculumConfig.from_yaml(CONFIGS / f"{preset}.yaml")
    unset = CurriculumConfig()
    given = dataclasses.replace(unset, data=config.data, runtime=config.runtime).replace(
        **{name: getattr(config.privacy, name) for name in ("target_epsilon", "target_delta", "public_dataset_size")}
    )
    rows = config.dp_sgd.num_dp_steps * config.dp_sgd.expected_batch_size * config.dp_sgd.noise_multiplicity
    found = suggest(given, dataset_size=60_000, hours=rows / 240 / 3600 / 0.8, measure=cost)
    assert found.config == config


@pytest.mark.parametrize("preset", ["cifar10-eps1-cpu", "cifar10-eps10-cpu"])
def test_the_presets_of_photos_are_what_it_writes(preset: str) -> None:
    config = CurriculumConfig.from_yaml(CONFIGS / f"{preset}.yaml")
    given = dataclasses.replace(CurriculumConfig(), data=config.data, privacy=config.privacy, runtime=config.runtime)
    assert suggest(given, dataset_size=50_000, hours=2.0, measure=cost).config == config


@pytest.mark.parametrize("preset", ["cifar10-eps1-public-cpu", "cifar10-eps10-public-cpu"])
def test_the_presets_with_public_photos_are_what_it_writes(preset: str) -> None:
    config = CurriculumConfig.from_yaml(CONFIGS / f"{preset}.yaml")
    name = config.public_images.pretrain_dataset_name
    given = dataclasses.replace(CurriculumConfig(), data=config.data, privacy=config.privacy, runtime=config.runtime)
    given = given.replace(stages=["moments", "public"], pretrain_dataset_name=name)
    found = suggest(given, dataset_size=50_000, hours=2.0, measure=cost)
    assert found.config == config and any("tiny-imagenet that suit it" in reason for reason in found.reasons)


@pytest.mark.parametrize(("size", "num_classes"), [(1500, 2), (9000, 2), (1500, 12)])
def test_the_first_that_is_said_to_be_similar_has_about_as_many_images_and_classes(
    size: int, num_classes: int
) -> None:
    config = facts(num_channels=3, resolution=32, num_classes=None)
    found = suggest(config, dataset_size=size, hours=1.0, measure=cost, num_classes=num_classes)
    nearest = found.similar[0]
    assert abs(math.log(nearest.images / size)) < 1 and abs(math.log(nearest.classes / num_classes)) < 1


def test_public_images_are_for_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--pretrain_dataset_name=org/photos to come with photos"):
        suggested(stages=["moments", "public"], pretrain_dataset_name="org/photos")
    options = "--dataset_name org/private --num_channels 3 --resolution 32 --num_classes 2 --public_dataset_size 2000"
    public = ["--pretrain_dataset_name", "org/photos", "--no_estimate", "--target_epsilon", "3"]
    assert main(["plan", "--suggest", str(tmp_path / "with.yaml"), *options.split(), *public]) == 0
    assert CurriculumConfig.from_yaml(tmp_path / "with.yaml").curriculum.stages == ["moments", "public"]


@pytest.mark.parametrize("hours", [0.1, 0.5, 2.0, 12.0, 200.0])
@pytest.mark.parametrize("size", [12_000, 60_000, 1_000_000])
def test_noisy_steps_fill_the_time(size: int, hours: float) -> None:
    options = suggested(size, hours).config.dp_sgd
    taken = cost(suggested(size, hours).config).dp_sgd_seconds
    most = options.noise_multiplicity == 16 and options.num_dp_steps == (480 if size == 12_000 else 960)
    assert taken == pytest.approx(3600 * hours * 0.8, rel=0.2) or most and taken < 3600 * hours
    assert options.expected_batch_size <= size / 4


def test_a_faster_machine_takes_more_rows() -> None:
    slow, fast = (suggested(seconds_per_row=seconds).config.dp_sgd for seconds in (1e-2, 1e-4))
    assert fast.expected_batch_size > slow.expected_batch_size and fast.num_dp_steps > slow.num_dp_steps


@pytest.mark.parametrize(
    ("hours", "epsilon", "channels"),
    [(1.0, 10.0, [8, 16, 32]), (2.0, 10.0, [8, 16, 32]), (4.0, 10.0, [16, 32, 48]), (4.0, 1.0, [8, 16, 32])],
)
def test_the_larger_network_needs_time_and_little_noise(hours: float, epsilon: float, channels: list[int]) -> None:
    def measure(config: CurriculumConfig) -> CostEstimate:
        """A network of twice the channels takes twice the time."""
        return cost(config, SECONDS_PER_ROW * config.model.block_out_channels[0] / 8)

    config = facts(public_dataset_size=60_000, target_epsilon=epsilon)
    found = suggest(config, dataset_size=60_000, hours=hours, measure=measure)
    assert found.config.model.block_out_channels == channels
    assert any("twice the channels" in reason for reason in found.reasons) == (channels[0] == 16)
    assert measure(found.config).dp_sgd_seconds == pytest.approx(3600 * hours * 0.8, rel=0.2)


@pytest.mark.parametrize("fields", [{"num_channels": 3, "resolution": 32}, {"resolution": 64}])
def test_photos_get_the_lesson_alone_with_the_whole_budget(fields: dict[str, Any]) -> None:
    found = suggested(**fields)
    assert found.config.curriculum.stages == ["moments"] and found.config.lesson_share == 1.0
    assert any("photos" in reason for reason in found.reasons)
    assert all(reached.name == "CIFAR-10" for reached in found.similar)


@pytest.mark.parametrize(("size", "epsilon", "share"), [(60_000, 1.0, 0.7), (60_000, 3.0, 0.2), (20_000, 3.0, 0.7)])
def test_the_lesson_gets_most_where_noise_hides_what_steps_see(size: int, epsilon: float, share: float) -> None:
    found = suggested(size, target_epsilon=epsilon)
    assert found.config.lesson_share == share
    assert any(f"lessons get {share:.0%} of the budget" in reason for reason in found.reasons)


@pytest.mark.parametrize(("size", "epsilon", "count"), [(60_000, 3.0, 1), (59_999, 10.0, 1), (60_000, 10.0, 4)])
def test_several_gaussians_are_for_images_and_an_epsilon_with_which_they_were_measured(
    size: int, epsilon: float, count: int
) -> None:
    found = suggested(size, target_epsilon=epsilon)
    assert found.config.lessons.moment_components == count
    assert any("4 Gaussians" in reason for reason in found.reasons) == (count == 4)


def test_few_images_get_the_lesson_alone() -> None:
    assert suggested(9_999).config.curriculum.stages == ["moments"]
    assert suggested(10_000).config.curriculum.stages == ["moments", "dp_sgd"]


@pytest.mark.parametrize("resolution", [8, 28, 30])
def test_any_side_has_a_network(resolution: int) -> None:
    channels = suggested(resolution=resolution).config.model.block_out_channels
    assert resolution % 2 ** (len(channels) - 1) == 0


def test_persons_are_named() -> None:
    assert any("persons" in reason for reason in suggested(20_000, person_column="patient").reasons)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"noise_multiplicity": 4}, "--noise_multiplicity=4 to be left out"),
        ({"stages": ["mean", "dp_sgd"]}, "--stages="),
        ({"lesson_budget_share": 0.3}, "--lesson_budget_share=0.3 to be left out"),
        ({"pretrained_model_name_or_path": "org/model"}, "--pretrained_model_name_or_path=org/model to be left out"),
        ({"num_channels": 3, "resolution": 128}, "--resolution=128 to come with at most 12,288 values"),
    ],
)
def test_choices_of_its_own_and_sizes_that_nobody_measured_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        suggested(**fields)


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_hours_are_a_time(hours: float) -> None:
    with pytest.raises(ValueError, match="--hours="):
        suggested(hours=hours)


def test_the_command_writes_a_configuration_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "photos.yaml"
    options = "--dataset_name org/private --num_channels 3 --resolution 32 --num_classes 2 --public_dataset_size 2000"
    command = ["plan", "--suggest", str(path), *options.split(), "--target_epsilon", "3", "--no_estimate"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "Suggested, because" in said and "What similar datasets reached" in said and str(path) in said
    config = CurriculumConfig.from_yaml(path)
    assert config.curriculum.stages == ["moments"] and config.data.dataset_name == "org/private"
    assert config.privacy.target_epsilon == 3.0 and path.read_text().startswith("# Suggested")
    written = path.read_text()
    for promise in ("target_epsilon: 3.0", "target_delta: ", "adjacency: ", "stages:"):
        assert promise in written, "a later default changes no promise"
    assert "no things" in said
    assert main(command) == 2
    assert "new file" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "resolution"), [(5, 32), (800, 32), (2000, 33)])
def test_the_command_takes_few_images_and_odd_sides(size: int, resolution: int, tmp_path: Path) -> None:
    """The defaults of what it chooses are never in the way."""
    path = tmp_path / "photos.yaml"
    options = f"--dataset_name org/private --num_channels 3 --resolution {resolution} --public_dataset_size {size}"
    command = ["plan", "--suggest", str(path), *options.split(), "--num_classes", "2", "--no_estimate"]
    assert main([*command, "--target_epsilon", "3", "--target_delta", "1e-3"]) == 0
    assert CurriculumConfig.from_yaml(path).curriculum.stages == ["moments"]
