"""Runs that hold images out: what is trained on, charged, reported, resumed and shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dp_curriculum.cli import main
from dp_curriculum.data import digits_dataset
from dp_curriculum.data.holdout import held_out_part, is_held_out
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.reading import read_images
from dp_curriculum.data.sources import open_rows
from dp_curriculum.privacy.ledger import LedgerTamperedError
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.sharing.export import export_release
from dp_curriculum.sharing.published import check_folder
from dp_curriculum.training import curriculum
from dp_curriculum.training.curriculum import run_curriculum


ROWS, SHARE = 200, 0.3


@pytest.fixture
def config(make_config: Any) -> Any:
    return make_config(holdout=SHARE, num_inference_steps=2, sample_steps=0, num_dp_steps=2)


def rows() -> Any:
    return digits_dataset().select(range(ROWS))


def bytes_of(private: PrivateImages) -> list[bytes]:
    return [image.numpy().tobytes() for image in private.images]


def test_no_stage_gets_a_held_out_image_and_every_constant_is_public(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, stages = [], curriculum.run_stages
    monkeypatch.setattr(curriculum, "run_stages", lambda run: (seen.append(run), stages(run)))
    result = run_curriculum(config, rows(), output_dir=tmp_path / "out")
    folder, (run,) = RunFolder(tmp_path / "out"), seen
    key = folder.holdout_key.read_bytes()
    every = read_images(open_rows(rows(), config.data), config.data)
    assert len(key) == 32 and sorted(bytes_of(run.private) + bytes_of(held_out_part(every, key, SHARE))) == sorted(
        bytes_of(every)
    )
    assert not is_held_out(run.private.images, key, SHARE).any()
    trained_on = round((1 - SHARE) * ROWS)  # a constant, whatever the draw was
    assert run.plan.dataset_size == trained_on
    report = result.report.to_dict()
    assert report["protected_dataset"]["num_records"] == trained_on
    assert report["protected_dataset"]["held_out_share"] == SHARE
    assert report["mechanisms"][-1]["sample_rate"] == pytest.approx(16 / trained_on)
    assert any("held out" in text for text in report["not_covered"])
    assert "held out of the training" in folder.card.read_text()
    assert [check.name for check in check_folder(folder.root, local_run=True) if not check.holds] == []


def test_the_key_does_not_leave_the_machine(config: Any, tmp_path: Path) -> None:
    run_curriculum(config, rows(), output_dir=tmp_path / "out")
    key = RunFolder(tmp_path / "out").holdout_key.read_bytes()
    export_release(tmp_path / "out", tmp_path / "shared")
    for path in (tmp_path / "shared").rglob("*"):
        assert path.is_dir() or not (key in path.read_bytes() or key.hex() in path.read_text(errors="replace"))


def test_a_resumed_run_holds_the_same_images_out_and_another_one_others(config: Any, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    run_curriculum(config, rows(), output_dir=folder.root)
    key = folder.holdout_key.read_bytes()
    run_curriculum(config, rows(), output_dir=folder.root, resume_from_checkpoint="latest")
    assert folder.holdout_key.read_bytes() == key
    folder.holdout_key.write_bytes(bytes(32))
    with pytest.raises(LedgerTamperedError, match="PRIVATE_holdout.key"):
        run_curriculum(config, rows(), output_dir=folder.root, resume_from_checkpoint="latest")
    folder.holdout_key.unlink()
    with pytest.raises(ValueError, match="PRIVATE_holdout.key is missing"):
        run_curriculum(config, rows(), output_dir=folder.root, resume_from_checkpoint="latest")
    run_curriculum(config, rows(), output_dir=folder.root, overwrite_output_dir=True)
    assert folder.holdout_key.read_bytes() not in (key, bytes(32))


def test_a_plan_and_a_training_assume_the_same_number(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--public_dataset_size", "1000", "--holdout", "0.25", "--stages", "mean", "--no_estimate"]
    assert main(["plan", *flags]) == 0
    said = capsys.readouterr().out
    assert "750 images to train on" in said and "held out" in said and "about 0.25 of the images" in said
    public = config.replace(public_dataset_size=1000, holdout=0.25)
    report = run_curriculum(public, rows(), output_dir=tmp_path / "out").report.to_dict()
    assert report["protected_dataset"]["num_records"] == 750
    assert json.loads((tmp_path / "out" / "privacy.json").read_text()) == report
