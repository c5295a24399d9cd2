"""Words of a report: what this version writes of any run, no limit less and no sentence more."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dp_curriculum.sharing.report_words import check_words, is_hub_id


EXAMPLE = Path(__file__).parents[2] / "model_cards" / "example.privacy.json"


def report() -> dict[str, Any]:
    return json.loads(EXAMPLE.read_text(encoding="utf-8"))


def test_the_words_of_an_honest_report_hold_and_those_of_another_version_are_not_checked() -> None:
    honest = report()
    assert check_words(honest).holds
    older = copy.deepcopy(honest)
    older["implementation"]["version"] = "0.0.1"
    older["not_covered"] = []
    assert check_words(older).verdict == "not checked"


@pytest.mark.parametrize("field", ["not_covered", "unprotected_quantities"])
def test_a_limit_that_is_left_out_or_made_up_is_noticed(field: str) -> None:
    honest = report()
    for index, limit in enumerate(honest[field]):
        edited = {**honest, field: [*honest[field][:index], *honest[field][index + 1 :]]}
        found = check_words(edited)
        assert found.fails and found.computed == f"{field} without {limit!r}"
    for more in ("nothing else", honest[field][0]):
        assert check_words({**honest, field: [*honest[field], more]}).fails


def test_the_limits_follow_the_unit() -> None:
    """Of a person with five images: what they have in common is covered, and the sentence must not be there."""
    person = {**report(), "group_size": 5}
    person["privacy_unit"] = {**person["privacy_unit"], "max_records_per_person": 5}
    assert "with 'several images of the same person, together'" in check_words(person).computed
    person["not_covered"] = [text for text in person["not_covered"] if "same person" not in text]
    assert check_words(person).holds
    assert check_words({**person, "group_size": 4}).fails


def test_a_number_of_images_may_be_disclosed_or_public() -> None:
    honest = report()
    names = [name for name in honest["unprotected_quantities"] if name != "num_records"]
    for listed in (names, ["num_records", *names]):
        assert check_words({**honest, "unprotected_quantities": listed}).holds


@pytest.mark.parametrize(
    ("name", "is_one"), [("org/model", True), ("model", True), ("a b", False), ("org/m\n", False), ("a/b/c", False)]
)
def test_the_name_of_a_repository(name: str, is_one: bool) -> None:
    assert is_hub_id(name) is is_one
