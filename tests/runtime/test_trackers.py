"""Trackers: one that would log nothing is refused by name, before anything is read or spent."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType

from dp_curriculum import cli
from dp_curriculum.runtime import trackers
from dp_curriculum.runtime.trackers import check_tracker


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType(name) for name in names])


def test_what_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "tensorboard", "wandb")
    for name in ("none", "tensorboard", "wandb", "all"):
        check_tracker(name)


@pytest.mark.parametrize("name", [str(one) for one in LoggerType.list() if one != "all"])
def test_what_is_not_installed_is_refused_with_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    package = {"comet_ml": "comet-ml"}.get(name, name)
    with pytest.raises(ValueError, match=f"Expected --report_to={name} to be installed: pip install {package}, or"):
        check_tracker(name)


@pytest.mark.parametrize("name", ["wandbb", "", "WANDB", "None", "tensorboard,wandb"])
def test_what_accelerate_does_not_know_is_refused_with_what_it_does(name: str) -> None:
    with pytest.raises(ValueError, match=f"Expected --report_to={name} to be none, all, .*tensorboard.*wandb"):
        check_tracker(name)


def test_all_of_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(ValueError, match="Expected --report_to=all to find a tracker: install one of .*wandb"):
        check_tracker("all")


def test_a_tracker_of_ones_own_that_accelerate_was_told_of_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "my_tracker", tracking.GeneralTracker)
    check_tracker("my_tracker")


def test_no_repository_is_made_for_a_training_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    monkeypatch.setattr("dp_curriculum.commands.train.make_repository", lambda *args, **kwargs: pytest.fail("made"))
    monkeypatch.setattr("dp_curriculum.commands.train.check_token", lambda *args: pytest.fail("asked"))
    args = ["train", "--report_to", "wandb", "--push_to_hub", "True", "--output_dir", str(tmp_path / "out")]
    assert cli.main(args) == cli.USAGE_ERROR


@pytest.mark.parametrize(("name", "named"), [("wandb", "pip install wandb"), ("papyrus", "none, all, ")])
def test_a_training_is_refused_before_it_reads_or_spends(
    name: str,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed(monkeypatch)
    monkeypatch.setattr("dp_curriculum.training.validation.open_images", lambda *args: pytest.fail("data was opened"))
    assert cli.main(["train", "--report_to", name, "--output_dir", str(tmp_path / "out")]) == cli.USAGE_ERROR
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--report_to={name}" in line and named in line
    assert not (tmp_path / "out").exists()
