"""Datasets of generated images: as planned, whole or continued, in constant memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from diffusers import EDMEulerScheduler
from PIL import Image

from dp_curriculum.closed_form_prior import ClosedFormPrior
from dp_curriculum.config import ModelConfig
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.sharing import synthetic_dataset
from dp_curriculum.sharing.synthetic_dataset import MANIFEST, SynthesisOptions, network_rate, plan_labels, synthesize


Read = Callable[[Path], datasets.Dataset]


@pytest.fixture
def pipeline(finished_run: Path) -> DPCurriculumPipeline:
    return DPCurriculumPipeline.from_pretrained(finished_run)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def load(folder: Path) -> datasets.Dataset:
        files = sorted(map(str, (folder / "data").glob("train-*.parquet")))
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))

    return load


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "data").iterdir()}


def pixels(rows: datasets.Dataset) -> list[bytes]:
    return [row["image"].tobytes() for row in rows]


# --- which images --------------------------------------------------------------------------------------------------


def test_classes_take_turns_or_follow_a_public_prior() -> None:
    assert plan_labels(SynthesisOptions(num_images=7), 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    options = SynthesisOptions(num_images=10, label_prior=(1.0, 0.0, 3.0))
    labels = plan_labels(options, 3)
    assert np.bincount(labels, minlength=3).tolist() == [3, 0, 7] or np.bincount(labels).tolist() == [2, 0, 8]
    assert labels.tolist() == plan_labels(options, 3).tolist() != sorted(labels)
    assert np.bincount(plan_labels(SynthesisOptions(num_images=1000, label_prior=(0.2, 0.3, 0.5)), 3)).tolist() == [
        *(200, 300, 500)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "--num_images=0"),
        ({"num_images": 5, "images_per_shard": 0}, "--images_per_shard=0"),
        *[({"num_images": 5, "label_prior": p}, "--label_prior") for p in ((0.0, 0.0), (-1.0, 2.0), (np.nan, 1.0))],
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {message}"):
        SynthesisOptions(**options)  # type: ignore[arg-type]


def test_a_prior_of_other_classes_or_no_batch_is_refused(pipeline: DPCurriculumPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one weight for each of the 10 classes"):
        synthesize(pipeline, tmp_path / "a", SynthesisOptions(num_images=5, label_prior=(1.0, 1.0)))
    with pytest.raises(ValueError, match="--batch_size=0"):
        synthesize(pipeline, tmp_path / "a", SynthesisOptions(num_images=5), batch_size=0)
    assert not (tmp_path / "a").exists()


# --- what is written -----------------------------------------------------------------------------------------------


def test_images_and_labels_are_read_back_as_such(pipeline: DPCurriculumPipeline, read: Read, tmp_path: Path) -> None:
    done = synthesize(pipeline, tmp_path / "a", SynthesisOptions(num_images=25, images_per_shard=10), batch_size=4)
    assert done.names == tuple(f"data/train-0000{shard}-of-00003.parquet" for shard in range(3))
    assert all((tmp_path / "a" / name).is_file() for name in done.names)
    rows = read(tmp_path / "a")
    assert isinstance(rows.features["image"], datasets.Image)
    assert rows.features["label"] == datasets.ClassLabel(names=[str(index) for index in range(10)])
    assert rows["label"] == [index % 10 for index in range(25)]
    image = rows[3]["image"]
    assert isinstance(image, Image.Image) and image.mode == "L" and image.size == (8, 8)
    # A batch of another size may round a pixel to the next grey level, so this is the batch of the dataset.
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    expected = pipeline(class_labels=[0, 1, 2, 3], generator=generators).images[3]
    assert image.tobytes() == expected.tobytes()


def test_batches_and_files_do_not_change_an_image(pipeline: DPCurriculumPipeline, read: Read, tmp_path: Path) -> None:
    synthesize(pipeline, tmp_path / "a", SynthesisOptions(num_images=9, images_per_shard=4), batch_size=2)
    synthesize(pipeline, tmp_path / "b", SynthesisOptions(num_images=9), batch_size=9)
    # The network may round its last bit differently in another batch: at most one grey level.
    for ours, theirs in zip(read(tmp_path / "a"), read(tmp_path / "b"), strict=True):
        difference = np.asarray(ours["image"], int) - np.asarray(theirs["image"], int)
        assert abs(difference).max() <= 1 and ours["label"] == theirs["label"]
    synthesize(pipeline, tmp_path / "c", SynthesisOptions(num_images=9, seed=1), batch_size=9)
    assert pixels(read(tmp_path / "c")) != pixels(read(tmp_path / "b"))


# --- going on ------------------------------------------------------------------------------------------------------


def test_an_interrupted_dataset_is_gone_on_with_and_is_the_same(
    pipeline: DPCurriculumPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SynthesisOptions(num_images=20, images_per_shard=6)
    synthesize(pipeline, tmp_path / "whole", options, batch_size=3)
    generate, made = synthetic_dataset._generate, []

    def interrupted(*arguments: object) -> object:
        made.append(arguments[1])
        if len(made) == 4:
            raise KeyboardInterrupt
        return generate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(synthetic_dataset, "_generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesize(pipeline, tmp_path / "parts", options, batch_size=3)
    names = {name for name in contents(tmp_path / "parts") if not name.startswith(".tmp-")}
    assert names == {"train-00000-of-00004.parquet"}
    synthesize(pipeline, tmp_path / "parts", options, batch_size=3)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    # The first file, two batches of the second before the interruption, and the 14 images that were left.
    assert sum(len(batch) for batch in made) == 6 + 2 * 3 + 14


def test_a_finished_dataset_is_left_as_it_is(pipeline: DPCurriculumPipeline, tmp_path: Path) -> None:
    options = SynthesisOptions(num_images=5)
    assert synthesize(pipeline, tmp_path / "a", options).images_per_second is not None
    before = contents(tmp_path / "a")
    assert synthesize(pipeline, tmp_path / "a", options).images_per_second is None
    assert contents(tmp_path / "a") == before


def test_a_folder_of_another_dataset_or_other_things_is_refused(
    pipeline: DPCurriculumPipeline, tmp_path: Path
) -> None:
    synthesize(pipeline, tmp_path / "a", SynthesisOptions(num_images=5))
    for options in (SynthesisOptions(num_images=6), SynthesisOptions(num_images=5, seed=1)):
        with pytest.raises(ValueError, match="it is of another model or other options"):
            synthesize(pipeline, tmp_path / "a", options)
    with torch.no_grad():
        pipeline.unet.conv_in.weight += 1
    with pytest.raises(ValueError, match="it is of another model or other options"):
        synthesize(pipeline, tmp_path / "a", SynthesisOptions(num_images=5))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="to be a new or empty folder"):
        synthesize(pipeline, tmp_path / "b", SynthesisOptions(num_images=5))
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine.txt"]


# --- memory and rate -----------------------------------------------------------------------------------------------


def test_no_more_rows_are_held_than_a_group(
    pipeline: DPCurriculumPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic_dataset, "_ROW_GROUP", 8)
    held: list[int] = []
    from_pylist = synthetic_dataset.pyarrow.Table.from_pylist

    class Table:
        @staticmethod
        def from_pylist(rows: list[object], schema: object) -> object:
            held.append(len(rows))
            return from_pylist(rows, schema=schema)

    monkeypatch.setattr(synthetic_dataset.pyarrow, "Table", Table)
    (name,) = synthesize(pipeline, tmp_path / "a", SynthesisOptions(num_images=30), batch_size=4).names
    assert held == [8, 8, 8, 6]
    metadata = pyarrow.parquet.read_metadata(tmp_path / "a" / name)
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == held


def test_the_network_alone_is_called_as_often_as_an_image_takes(
    pipeline: DPCurriculumPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Size] = []
    forward = pipeline.unet.forward

    def counted(sample: torch.Tensor, *arguments: object, **options: object) -> object:
        calls.append(sample.shape)
        return forward(sample, *arguments, **options)

    monkeypatch.setattr(pipeline.unet, "forward", counted)
    pipeline.set_progress_bar_config(disable=True)
    for options in (SynthesisOptions(num_images=1, num_inference_steps=4, guidance_scale=g) for g in (1.0, 2.0)):
        calls.clear()
        pipeline(class_labels=[0, 1], num_inference_steps=4, guidance_scale=options.guidance_scale)
        sampled = list(calls)
        calls.clear()
        assert network_rate(pipeline, options, 2) > 0
        assert calls[1:] == sampled  # one more to warm up


def test_what_is_kept_of_a_try_is_public(pipeline: DPCurriculumPipeline, tmp_path: Path) -> None:
    synthesize(pipeline, tmp_path / "a", SynthesisOptions(num_images=5))
    kept = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert kept["num_images"] == 5 and len(kept["model"]) == 64
    assert {path.name for path in (tmp_path / "a").iterdir()} == {MANIFEST, "data"}
    shutil.rmtree(tmp_path / "a")


def test_another_prior_is_another_model() -> None:
    """A dataset of one must not be continued with the other, whose network is the same."""
    unet = build_unet(ModelConfig(block_out_channels=[8]), resolution=8, num_channels=1, num_classes=2, has_prior=True)
    priors = [ClosedFormPrior(2, 1, 8, 1), ClosedFormPrior(2, 1, 8, 1)]
    priors[1].means.fill_(0.4)
    found = {
        synthetic_dataset._fingerprint(DPCurriculumPipeline(unet, EDMEulerScheduler(), prior=prior))
        for prior in priors
    }
    assert len(found) == 2
