"""What a plan says to expect: signal over noise from public constants, compared with what queries release."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.lessons import moment_images
from dp_curriculum.lessons.lesson import TYPICAL_CONTRAST
from dp_curriculum.lessons.moment_images import query_moments
from dp_curriculum.lessons.planned import plan_lessons
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.training.outlook import compare_budgets, describe_prospects, prospects, warn_of_noise
from dp_curriculum.training.plan import plan_budget


MakeConfig = Callable[..., CurriculumConfig]
ROWS, CLASSES = 4000, 2


def found(config: CurriculumConfig, num_parameters: int | None = None, rows: int = ROWS) -> list[Any]:
    plan = plan_budget(config, dataset_size=rows, num_classes=CLASSES)
    return prospects(config, plan, num_parameters)


def test_the_noise_is_that_of_the_query(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images are grey: what is released of the means beside it is noise. It is looked at in 14 pixels per side."""

    def untouched(coefficients: torch.Tensor, noise: torch.Tensor, *, frequencies: torch.Tensor) -> Any:
        return coefficients, torch.zeros_like(coefficients)

    monkeypatch.setattr(moment_images, "denoised_means", untouched)
    config = make_config(stages=["moments"], lesson_noise_multiplier=3.0, resolution=28)
    grey = PrivateImages(torch.full((ROWS, 1, 28, 28), 0.5), torch.arange(ROWS) % CLASSES, ("a", "b"))
    ((planned,),) = plan_lessons(config)
    released = query_moments(
        grey.images, grey.labels, planned.mechanisms, num_classes=CLASSES, public_dataset_size=ROWS,  # type: ignore[arg-type]
        generator=SecretGenerator(),
    )  # fmt: skip
    noise = float((F.interpolate(released.means, size=14, mode="area") - 0.5).std())
    assert TYPICAL_CONTRAST / found(config)[0].signal_to_noise == pytest.approx(noise, rel=0.3)


@pytest.mark.parametrize("stage", ["mean", "mode", "moments", "frequency"])
def test_twice_the_images_are_twice_the_signal_and_more_noise_is_less(stage: str, make_config: MakeConfig) -> None:
    config = make_config(stages=[stage])
    (once,), (twice,) = found(config), found(config, rows=2 * ROWS)
    assert twice.signal_to_noise == pytest.approx(2 * once.signal_to_noise)
    (noisier,) = found(config.replace(lesson_noise_multiplier=40.0))
    assert noisier.signal_to_noise == pytest.approx(once.signal_to_noise / 2)


def test_a_step_is_bounded_by_gradients_that_all_point_the_same_way(make_config: MakeConfig) -> None:
    config = make_config(stages=["dp_sgd"], expected_batch_size=100)
    plan = plan_budget(config, dataset_size=ROWS, num_classes=CLASSES)
    assert plan.dp_sgd is not None
    clip, noise = plan.dp_sgd.clip_norm, plan.dp_sgd.event.noise_multiplier
    (step,) = prospects(config, plan, 10_000)
    assert step.signal_to_noise == pytest.approx(100 * clip / (noise * clip * math.sqrt(10_000)))
    assert prospects(config, plan, None) == []


def test_a_lesson_of_noise_is_said_to_be_one_with_what_would_do(make_config: MakeConfig) -> None:
    config = make_config(stages=["moments"], resolution=32, num_channels=3, lesson_noise_multiplier=5.6)
    plan = plan_budget(config, dataset_size=2001, num_classes=10)
    (heading, line) = describe_prospects(config, plan, prospects(config, plan, None))
    assert "below 1" in heading
    assert "at 2,001 images, 10 classes and epsilon 10 this lesson will be noise" in line
    enough = int(line.split("it takes about ")[1].split(" ")[0].replace(",", ""))
    larger = plan_budget(config, dataset_size=enough, num_classes=10)
    assert all(prospect.is_clear for prospect in prospects(config, larger, None))


def test_other_budgets_are_compared_and_one_that_does_not_suffice_is_said(make_config: MakeConfig) -> None:
    config = make_config(stages=["mean", "dp_sgd"], lesson_noise_multiplier=2.0)
    plan = plan_budget(config, dataset_size=ROWS, num_classes=CLASSES)
    lines = list(compare_budgets(config, plan, 1000))
    assert lines[1].split() == ["epsilon", "lesson", "mean", "noisy", "step"]
    assert [line.split()[0] for line in lines[2:]] == ["1", "3", "10"]
    assert "the lessons alone would spend more" in lines[2] and "(" in lines[4]
    assert list(compare_budgets(config.replace(non_private=True), plan, 1000)) == []


def test_a_plan_prints_what_to_expect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--block_out_channels", "8", "--resolution", "8", "--num_channels", "3", "--num_dp_steps", "2"]
    public = ["--dataset_name", "org/photos", "--public_dataset_size", "2001", "--num_classes", "10"]
    assert main(["plan", *tiny, *public, "--lesson_noise_multiplier", "20"]) == 0
    said = capsys.readouterr().out
    for words in ("What to expect", "lesson moments", "noisy step", "other budgets", "will be noise", "estimate"):
        assert words in said
    assert main(["plan", *tiny, *public, "--lesson_noise_multiplier", "20", "--no_estimate"]) == 0
    said = capsys.readouterr().out
    assert "lesson moments" in said and "noisy step" not in said and "other budgets" not in said


@pytest.mark.parametrize(
    ("options", "named", "unnamed"),
    [
        ({"stages": ["moments"]}, "--lesson_noise_multiplier", "--lesson_resolution"),
        ({"stages": ["mean"]}, "--lesson_resolution", "--lesson_budget_share"),
        ({"stages": ["mean"], "lesson_noise_multiplier": None}, "--lesson_budget_share", "--lesson_noise_multiplier"),
    ],
)
def test_advice_names_options_that_act_on_the_lesson(
    options: dict[str, Any], named: str, unnamed: str, make_config: MakeConfig
) -> None:
    config = make_config(**{"lesson_noise_multiplier": 1000.0, "target_epsilon": 0.01, **options})
    plan = plan_budget(config, dataset_size=ROWS, num_classes=CLASSES)
    (warning,) = warn_of_noise(config, plan, 100)
    assert "this lesson will be noise" in warning and named in warning and unnamed not in warning
    assert ", or the stage public in its place" in warning


def test_a_clear_lesson_is_not_warned_of(make_config: MakeConfig) -> None:
    config = make_config(stages=["moments"], lesson_noise_multiplier=1.0)
    assert not list(warn_of_noise(config, plan_budget(config, dataset_size=10**6, num_classes=CLASSES), 100))


@pytest.mark.parametrize(("resolution", "said"), [(28, "will show the classes"), (32, "colours and textures")])
def test_a_clear_lesson_of_photos_promises_no_things(resolution: int, said: str, make_config: MakeConfig) -> None:
    config = make_config(stages=["moments"], num_channels=3 if resolution == 32 else 1, resolution=resolution)
    plan = plan_budget(config, dataset_size=100_000, num_classes=CLASSES)
    (line,) = [line for line in describe_prospects(config, plan, prospects(config, plan, None)) if "moments" in line]
    assert said in line


@pytest.mark.parametrize(
    ("fields", "is_told"),
    [
        ({"resolution": 32}, True),
        ({"resolution": 16}, False),
        ({"resolution": 32, "stages": ["moments"]}, False),
        ({"resolution": 32, "shortcut": "pretrain"}, False),
        ({"resolution": 32, "non_private": True}, False),
    ],
)
def test_who_trains_noisy_steps_on_photos_is_told_what_was_measured(
    fields: dict[str, Any], is_told: bool, make_config: MakeConfig
) -> None:
    config = make_config(
        **{"num_channels": 3, "stages": ["moments", "dp_sgd"], "lesson_noise_multiplier": None} | fields
    )
    plan = plan_budget(config, dataset_size=10**6, num_classes=CLASSES)
    for lines in (describe_prospects(config, plan, prospects(config, plan, 100)), warn_of_noise(config, plan, 100)):
        assert any("without dp_sgd in --stages" in line for line in lines) == is_told
