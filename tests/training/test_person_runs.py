"""Whole runs of persons: what is counted, said, saved and refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from dp_curriculum.commands.arguments import config_parser, parse_config
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.privacy.verification import check_schema, verify_report
from dp_curriculum.runtime.processes import process_state
from dp_curriculum.sharing.report_words import check_words
from dp_curriculum.training import validation
from dp_curriculum.training.curriculum import run_curriculum


NUM_PERSONS = 24


@pytest.fixture(autouse=True)
def _processes() -> None:
    """Log lines ask which process they are of."""
    process_state()


def dataset(count: int = NUM_PERSONS, name: str = "patient-{}-of-the-clinic") -> datasets.Dataset:
    """Digits of persons who have one to five each, mixed."""
    owners = [person for person in range(count) for _ in range(1 + person % 5)]
    return digits_dataset().select(range(len(owners))).add_column("person", [name.format(one) for one in owners])


def small(make_config: Any, **fields: Any) -> CurriculumConfig:
    options = {
        "person_column": "person", "stages": ["moments", "dp_sgd"], "expected_batch_size": 6, "num_dp_steps": 2,
        "num_inference_steps": 2, "sample_steps": 0, "checkpointing_steps": 1, "noise_multiplicity": 4,
    }  # fmt: skip
    return make_config(**{**options, **fields})


def test_numbers_are_of_persons(make_config: Any) -> None:
    config, private, plan = validation.validate_data(small(make_config), dataset())
    assert len(private.units) == plan.dataset_size == NUM_PERSONS < len(private) and plan.unit == "person"
    assert plan.dp_sgd is not None and plan.dp_sgd.event.sample_rate == 6 / NUM_PERSONS
    _, private, plan = validation.validate_data(small(make_config, holdout=0.25), dataset(), bytes(32))
    assert plan.dataset_size == 18 and len(private.units) < NUM_PERSONS


def test_a_run_says_persons_everywhere_and_names_none_of_them(
    make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        result = run_curriculum(small(make_config, holdout=0.1), dataset(), output_dir=tmp_path / "run")
    fields = result.report.to_dict()
    assert fields["privacy_unit"]["unit"] == "person" and fields["protected_dataset"]["num_records"] == 22
    assert "one person with all their images and labels" in result.report.statement()
    assert check_schema(fields).holds and check_words(fields).holds
    assert all(check.holds for check in verify_report(fields))
    card = (tmp_path / "run" / "README.md").read_text()
    for words in (
        "norm bound of one person;", "of 6 persons on average", "4 noise draws a person", "the number of persons,",
        "a person who is seen in the images of somebody else", "several persons, together",
        "nobody can find out about any one person", "| persons that change together | 1 |",
    ):  # fmt: skip
        assert words in card, words
    assert "several images of the same person" not in card
    assert "the guarantee is for the person" in caplog.text and "about 0.1 of the persons" in caplog.text
    seen = [caplog.text, *capfd.readouterr()]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    for name in ("patient-0-of-the-clinic", "of-the-clinic"):
        assert not any(name in text for text in seen)
        assert not any(name.encode() in path.read_bytes() for path in files)
    for path in files:  # neither are their numbers: nothing has a value per row or per person
        if path.suffix == ".json":
            assert str(list(range(NUM_PERSONS)))[1:-1] not in json.dumps(json.loads(path.read_text()))


def test_words_of_persons_are_checked(make_config: Any, tmp_path: Path) -> None:
    """A report of persons whose limits are those of images, or the other way, is noticed."""
    fields = run_curriculum(
        small(make_config, stages=["mean"]), dataset(), output_dir=tmp_path / "run"
    ).report.to_dict()
    assert check_words(fields).holds
    images = {**fields, "not_covered": [text for text in fields["not_covered"] if "person" not in text]}
    assert check_words(images).fails
    unit = {**fields["privacy_unit"], "description": "one person"}
    assert check_words({**fields, "privacy_unit": unit}).fails


def test_a_group_is_one_of_persons(make_config: Any) -> None:
    one, three = (validation.validate_data(small(make_config, group_size=size), dataset())[2] for size in (1, 3))
    assert one.dp_sgd is not None and three.dp_sgd is not None
    assert three.dp_sgd.event.noise_multiplier > 2 * one.dp_sgd.event.noise_multiplier


@pytest.mark.parametrize("change", [{"person_column": "other"}, {"person_column": None}, {"person_from": "folder"}])
def test_a_run_is_not_resumed_with_other_persons(make_config: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    config = small(make_config, stages=["mean"])
    rows = dataset().add_column("other", ["x", "y"] * (len(dataset()) // 2))
    run_curriculum(config, rows, output_dir=tmp_path / "run")
    changed = config.replace(**{"person_column": None, **change})
    with pytest.raises(ValueError, match="resuming cannot change the mechanism"):
        run_curriculum(changed, rows, output_dir=tmp_path / "run", resume_from_checkpoint="latest")


def test_one_person_is_refused_unless_their_number_is_declared(make_config: Any, tmp_path: Path) -> None:
    """Declared, a person more or less would show in whether the run begins."""
    alone = dataset(name="one")
    with pytest.raises(ValueError, match="it names one person, who has all rows"):
        run_curriculum(small(make_config, stages=["mean"]), alone, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    declared = small(make_config, stages=["mean"], public_dataset_size=20)
    assert run_curriculum(declared, alone, output_dir=tmp_path / "run").finished


def test_messages_say_persons(make_config: Any) -> None:
    with pytest.raises(ValueError, match="at most the number of persons, 24"):
        validation.validate_data(small(make_config, expected_batch_size=30), dataset())
    with pytest.raises(ValueError, match="at most the number of persons, --public_dataset_size=20"):
        small(make_config, expected_batch_size=30, public_dataset_size=20)


def test_persons_of_a_file_are_not_forgotten_where_another_folder_is_named(tmp_path: Path) -> None:
    """Other columns of its own images are: whom the guarantee is for is no convention of a dataset."""
    (tmp_path / "run.yaml").write_text("data: {dataset_name: org/scans, person_column: who, label_column: kind}\n")
    (tmp_path / "other").mkdir()
    parser = config_parser("train", "")
    given = ["--config", str(tmp_path / "run.yaml"), "--train_data_dir", str(tmp_path / "other")]
    _, config = parse_config(parser, given)
    assert config.data.person_column == "who" and config.data.label_column is None and config.data.unit == "person"
