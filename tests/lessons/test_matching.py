"""Public photos that are brought to released moments: the right ones for each class, and the moments themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dp_curriculum import DPCurriculumPipeline
from dp_curriculum.cli import main
from dp_curriculum.closed_form_prior import ClosedFormPrior, lowest, to_frequencies
from dp_curriculum.data.images import to_unit_range
from dp_curriculum.lessons import matching
from dp_curriculum.lessons.matching import match_moments
from dp_curriculum.training.curriculum import run_curriculum


SHAPE, RANK = (3, 20, 20), 12  # 1,200 values: photos


def photo_prior() -> ClosedFormPrior:
    """Two classes, a dark and a bright one, whose low frequencies differ in their covariance."""
    random = torch.Generator().manual_seed(0)
    means = torch.tensor([0.4, 0.6]).view(2, 1, 1, 1).expand(2, *SHAPE).clone()
    factors = 0.15 * torch.randn(2, RANK, RANK, generator=random)
    return ClosedFormPrior.from_moments(means, factors, torch.tensor([6.0, 6.0]))


def draws(prior: ClosedFormPrior, label: int, count: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    normals = torch.randn(count, RANK, generator=random), torch.randn(count, *SHAPE, generator=random)
    return (prior.draw(torch.full((count,), label), *normals) * 255).round().to(torch.uint8)


def coefficients(images: torch.Tensor) -> torch.Tensor:
    return to_frequencies(to_unit_range(images).double()).flatten(1)


def distance(prior: ClosedFormPrior, label: int, images: torch.Tensor) -> float:
    """Of the covariance of the low frequencies of images from the released one, relative."""
    block = lowest(SHAPE, RANK)
    released = coefficients(draws(prior, label, 20_000, seed=9))[:, block].T.cov()
    found = coefficients(images)[:, block].T.cov()
    return float((found - released).norm() / released.norm())


def test_what_is_matched_has_the_released_moments_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of public images of another kind. Their own covariance is the broken twin: it is far from the released one."""
    prior, random = photo_prior(), np.random.RandomState(0)
    smooth = random.randn(3000, 3, 5, 5).repeat(4, axis=2).repeat(4, axis=3)
    public = torch.from_numpy((128 + 40 * smooth).clip(0, 255).astype(np.uint8))
    images, labels = match_moments(public, prior)
    assert images.dtype == torch.uint8 and torch.bincount(labels).tolist() == [750, 750]
    for label, brightness in enumerate((0.4, 0.6)):
        of_class = images[labels == label]
        assert float(to_unit_range(of_class).mean()) == pytest.approx(brightness, abs=0.02)
        assert distance(prior, label, of_class) < 0.25 < distance(prior, label, public)


def test_each_class_takes_the_images_that_suit_it() -> None:
    """The public images are draws of both classes; shuffled scores are the broken twin."""
    prior = photo_prior()
    public = torch.cat([draws(prior, 0, 1500, seed=1), draws(prior, 1, 1500, seed=2)])
    first, second = matching._suited(public, prior)
    assert (first < 1500).float().mean() > 0.95 and (second >= 1500).float().mean() > 0.95
    assert len(first) == 750


def test_one_class_and_few_images_are_enough() -> None:
    prior = photo_prior()
    one = ClosedFormPrior.from_moments(prior.means[:1], prior.factors[:1], prior.variances[:1])
    images, labels = match_moments(draws(prior, 0, 3, seed=1), one)
    assert images.shape == (3, *SHAPE) and labels.tolist() == [0, 0, 0]


def test_no_more_is_kept_than_fits_into_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_MOST_BYTES", 2 * 1200 * 50)
    _, labels = match_moments(draws(photo_prior(), 0, 400, seed=1), photo_prior())
    assert torch.bincount(labels).tolist() == [50, 50]


# --- a prior with photos -------------------------------------------------------------------------------------------


def test_a_prior_draws_its_photos_each_as_often_and_by_their_class(tmp_path: Path) -> None:
    prior = photo_prior()
    photos = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, *SHAPE) * 40
    with_photos = prior.with_photos(photos, torch.tensor([0, 1, 0, 1, 0, 0]))
    with_photos.save_pretrained(tmp_path)
    random = torch.Generator().manual_seed(0)
    for own in (with_photos, ClosedFormPrior.from_pretrained(tmp_path)):
        labels = torch.arange(4000) % 2
        found = own.draw(labels, torch.randn(4000, RANK), torch.randn(4000, *SHAPE, generator=random))
        levels = (found * 255 / 40).round()
        assert (levels == levels[:, :1, :1, :1]).all(), "each is one photo"
        counts = torch.bincount(levels[:, 0, 0, 0].long()[labels == 0], minlength=6)
        assert counts[[1, 3]].sum() == 0 and counts[[0, 2, 4, 5]].min() > 400
    same = [prior.draw(torch.zeros(1).long(), torch.ones(1, RANK), torch.ones(1, *SHAPE)) for _ in range(2)]
    assert torch.equal(*same) and torch.equal(prior.means, with_photos.means)
    assert torch.equal(prior.errors, with_photos.errors)


def test_a_class_without_a_photo_is_refused() -> None:
    with pytest.raises(ValueError, match="none of class 1"):
        photo_prior().with_photos(torch.zeros(2, *SHAPE, dtype=torch.uint8), torch.tensor([0, 0]))
    prior = photo_prior().with_photos(torch.zeros(2, *SHAPE, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="from 0 to 1"):
        prior.draw(torch.tensor([2]), torch.zeros(1, RANK), torch.zeros(1, *SHAPE))


# --- a run ---------------------------------------------------------------------------------------------------------


def photos(count: int, seed: int) -> list[Image.Image]:
    random = np.random.RandomState(seed)
    smooth = 128 + 50 * random.randn(count, 5, 5, 3).repeat(4, axis=1).repeat(4, axis=2)
    return [Image.fromarray(pixels) for pixels in smooth.clip(0, 255).astype(np.uint8)]


@pytest.fixture
def private() -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    return datasets.Dataset.from_dict({"image": photos(40, 0), "label": [0, 1] * 20}, features=features)


def of_photos(make_config: Any, tmp_path: Path, **fields: Any) -> Any:
    public = tmp_path / "public"
    if not public.exists():
        public.mkdir()
        rows = datasets.Dataset.from_dict(
            {"image": photos(30, 1)}, features=datasets.Features({"image": datasets.Image()})
        )
        rows.to_parquet(public / "train.parquet")
    return make_config(
        **{
            "resolution": 20, "num_channels": 3, "stages": ["moments", "public"], "pretrain_steps": 0,
            "pretrain_dataset_name": str(public), "num_inference_steps": 1, "lesson_budget_share": None, "seed": 0,
            **fields,
        }
    )  # fmt: skip


def test_a_run_draws_from_public_photos_and_its_card_says_so(
    make_config: Any, private: datasets.Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    result = run_curriculum(of_photos(make_config, tmp_path), private, output_dir=folder)
    prior = DPCurriculumPipeline.from_pretrained(folder).prior
    assert prior.config.num_photos == 60 and torch.bincount(prior.photo_labels).tolist() == [30, 30]
    drawn = result.pipeline(class_labels=["cat"], output_type="pt").images
    nearest = (to_unit_range(prior.photos[prior.photo_labels == 0]) - drawn).abs().amax(dim=(1, 2, 3)).min()
    assert nearest < 0.1, "the photo, and noise of the lowest level"
    assert "60 are in the model, moved to the released moments" in (folder / "README.md").read_text()
    assert main(["verify", str(folder), "--local_run"]) == 0
    assert main(["push", str(folder), "--export_dir", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_resumed_run_has_the_same_photos(make_config: Any, private: datasets.Dataset, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"stages": ["moments", "public", "dp_sgd"], "lesson_budget_share": 0.5, "num_dp_steps": 1}
    config = of_photos(make_config, tmp_path, pretrain_steps=1, **fields)
    first = run_curriculum(config, private, output_dir=tmp_path / "run").pipeline.prior
    again = run_curriculum(config, private, output_dir=tmp_path / "run", resume_from_checkpoint="latest")
    assert torch.equal(first.photos, again.pipeline.prior.photos)


@pytest.mark.parametrize(
    ("fields", "num_photos"), [({"pretrain_dataset_matching": "none", "pretrain_steps": 1}, 0), ({}, 60)], ids=str
)
def test_matching_can_be_left_out(
    fields: dict[str, Any], num_photos: int, make_config: Any, private: datasets.Dataset, tmp_path: Path
) -> None:
    config = of_photos(make_config, tmp_path, **fields)
    result = run_curriculum(config, private, output_dir=tmp_path / "run")
    assert result.pipeline.prior.config.num_photos == num_photos


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pretrain_dataset_matching": "colours"}, "to be moments or none"),
        ({"pretrain_dataset_matching": "moments", "resolution": 8}, "after moments in closed form"),
        ({"pretrain_dataset_matching": "moments", "shortcut": "pretrain", "pretrain_steps": 1}, "in closed form"),
        ({"shortcut": "pretrain"}, "nothing would be learned"),
        ({"pretrain_steps": -1}, "pretrain_steps"),
    ],
    ids=str,
)
def test_what_cannot_be_matched_is_refused(
    fields: dict[str, Any], words: str, make_config: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        of_photos(make_config, tmp_path, **fields)
