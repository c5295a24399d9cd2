"""The report: numbers from the ledger alone, wording, what it may publish, and reading it back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from dp_curriculum.privacy import accounting
from dp_curriculum.privacy.accounting import GaussianEvent, compute_epsilon
from dp_curriculum.privacy.execution import Execution
from dp_curriculum.privacy.ledger import PrivacyLedger, PrivacyReport, ReportFacts
from dp_curriculum.privacy.privacy_report import CLAIMS, SCHEMA_VERSION
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.privacy.verification import check_schema, verify_report


EASY = GaussianEvent(5.0, sample_rate=0.1, num_steps=5)
HARD = GaussianEvent(2.0, sample_rate=0.05, num_steps=100)


def report(folder: Path, *events: GaussianEvent, reason: str | None = None, **options: Any) -> PrivacyReport:
    with PrivacyLedger.open(folder / "privacy_ledger.jsonl") as ledger:
        for event in events:
            ledger.reserve(event, stage="dp-sgd", clip_norm=1.0)
        if reason is not None:
            ledger.mark_not_private(reason)
        return PrivacyReport.from_ledger(ledger, **{"target_delta": 1e-5, **options})


def test_anyone_can_recompute_epsilon_from_the_listed_mechanisms(tmp_path: Path) -> None:
    fields = report(tmp_path, EASY, HARD, target_epsilon=3).to_dict()
    events = [GaussianEvent(r["noise_multiplier"], r["sample_rate"], r["num_steps"]) for r in fields["mechanisms"]]
    assert fields["epsilon"] == compute_epsilon(events, fields["delta"], adjacency=fields["adjacency"])
    assert fields["epsilon_add_or_remove_one"] == fields["epsilon"]
    assert fields["epsilon_replace_one"] == compute_epsilon(events, fields["delta"], adjacency="replace-one")
    assert 0 < fields["epsilon"] < fields["epsilon_replace_one"] and 0 < fields["gdp_mu"] < 1
    assert (fields["private"], fields["delta"], fields["target_epsilon"]) == (True, 1e-5, 3.0)
    assert fields["adjacency"] == "add-or-remove-one" and fields["group_size"] == 1
    accountant = {"accountant": "pld", "library": "dp-accounting", "discretization": accounting.DISCRETIZATION}
    assert accountant.items() <= fields["accounting"].items()


@pytest.mark.parametrize("options", [{"adjacency": "replace-one"}, {"group_size": 2}])
def test_the_report_follows_the_relation_that_is_asked_for(tmp_path: Path, options: dict[str, Any]) -> None:
    spent = report(tmp_path, HARD, **options)
    assert spent.epsilon == compute_epsilon([HARD], 1e-5, **options) > compute_epsilon([HARD], 1e-5)
    assert options.items() <= spent.to_dict().items()


def test_the_report_is_plain_json_and_yaml(tmp_path: Path) -> None:
    fields = report(tmp_path, EASY, facts=ReportFacts(public_data=({"name": "org/data"},))).to_dict()
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert yaml.safe_load(yaml.safe_dump(fields)) == fields


def test_a_changed_copy_does_not_change_the_report(tmp_path: Path) -> None:
    spent = report(tmp_path, EASY)
    spent.to_dict()["mechanisms"][0]["num_steps"] = 0
    assert spent.to_dict()["mechanisms"][0]["num_steps"] == 5


def test_the_statement_is_formal_then_plain(tmp_path: Path) -> None:
    """One Gaussian of mu 1: epsilon 4.3772 at delta 1e-5, rounded up; a guess is right with probability Phi(1 / 2)."""
    assert report(tmp_path, GaussianEvent(1.0)).statement() == (
        "The training is (4.378, 1e-05)-differentially private with respect to adding or removing one image with its "
        "label (add-or-remove-one adjacency); all that it releases is covered, unless listed as not covered. In "
        "plain words: suppose that a coin toss decided whether one image was used. Somebody who sees all that was "
        "released, and knows every other training image, guesses the outcome right at most 69.2 % of the time, "
        "against 50 % for guessing blindly."
    )
    assert 100 * stats.norm.cdf(0.5) == pytest.approx(69.146, abs=1e-3)


@pytest.mark.parametrize("adjacency", ["add-or-remove-one", "replace-one"])
@pytest.mark.parametrize("published", [True, False])
def test_a_published_number_of_images_is_left_out_of_the_claim(
    published: bool, adjacency: Any, tmp_path: Path
) -> None:
    """Whoever knows all others and the number would know whether one was added; replacing does not change it."""
    facts = ReportFacts(num_records=61, unprotected_quantities=("num_records",)) if published else ReportFacts()
    found = report(tmp_path, GaussianEvent(1.0), adjacency=adjacency, facts=facts)
    assert ("except for the exact number of images, and knows" in found.statement()) == (
        published and adjacency == "add-or-remove-one"
    )
    assert all(check.holds for check in verify_report(found.to_dict()))


def test_the_statement_names_relation_and_group(tmp_path: Path) -> None:
    text = report(tmp_path, GaussianEvent(4.0), adjacency="replace-one", group_size=2).statement()
    assert "with respect to replacing 2 images of one person with their labels (replace-one adjacency)" in text
    assert "a coin toss decided which of two versions of 2 images of one person were used" in text
    assert "at most 69.2 % of the time" in text


def test_a_run_that_released_nothing_private_says_so_in_numbers(tmp_path: Path) -> None:
    spent = report(tmp_path)
    assert spent.epsilon == 0 and spent.statement().startswith("The training is (0, 1e-05)-differentially private")
    assert "at most 50 % of the time" in spent.statement()


@pytest.mark.parametrize(
    ("events", "reason", "said"),
    [
        ([EASY], "fixed test noise", "fixed test noise"),
        ([GaussianEvent(0.0, 0.1, 3)], None, "stage 'dp-sgd' adds no noise"),
        ([GaussianEvent(0.0, 0.1, 3)], "on request", "on request; stage 'dp-sgd' adds no noise"),
    ],
)
def test_a_run_without_guarantee_claims_no_number(
    tmp_path: Path, events: list[GaussianEvent], reason: str | None, said: str
) -> None:
    spent = report(tmp_path, *events, reason=reason)
    fields = spent.to_dict()
    assert spent.statement() == f"NOT PRIVATE: {said}. What was released carries no privacy guarantee."
    assert spent.epsilon == math.inf and not fields["private"]
    assert {fields[name] for name in CLAIMS} == {None} and fields["accounting"]["assumptions_met"] is False
    assert fields["not_private_reasons"] == said.split("; ")
    assert "differentially private" not in json.dumps(fields)
    assert spent.without_guarantee() == spent


def test_claims_that_are_taken_back_leave_no_number(tmp_path: Path) -> None:
    """As a model is stamped that is pushed although something was found against it."""
    private = report(tmp_path, EASY, target_epsilon=3)
    stamped = private.without_guarantee("the ledger is missing", "the ledger is missing")
    fields = stamped.to_dict()
    assert stamped.epsilon == math.inf and not fields["private"] and {fields[name] for name in CLAIMS} == {None}
    assert stamped.statement() == (
        "NOT PRIVATE: the ledger is missing. What was released carries no privacy guarantee."
    )
    assert fields["mechanisms"] == private.to_dict()["mechanisms"]
    assert private.to_dict()["private"] is True and private.to_dict()["accounting"]["assumptions_met"] is True


def test_facts_are_published_as_given(tmp_path: Path) -> None:
    facts = ReportFacts(
        max_images_per_person=3,
        dataset_id="org/private",
        num_records=60000,
        num_records_is_public=True,
        unprotected_quantities=("image resolution",),
        not_covered=("side channels",),
        public_data=({"name": "org/public", "role": "pretraining"},),
        implementation={"commit": "abc"},
    )
    fields = report(tmp_path, EASY, facts=facts).to_dict()
    assert fields["privacy_unit"]["max_records_per_person"] == 3
    assert fields["protected_dataset"] == {"name": "org/private", "role": "training", "num_records": 60000}
    assert fields["unprotected_quantities"] == ["image resolution"] and fields["not_covered"] == ["side channels"]
    assert fields["public_data"] == [{"name": "org/public", "role": "pretraining"}]
    assert {"package": "dp_curriculum", "commit": "abc"}.items() <= fields["implementation"].items()
    assert fields["hyperparameter_tuning"]["covered"] is False


def test_a_number_of_images_that_is_neither_public_nor_disclosed_is_not_published() -> None:
    with pytest.raises(ValueError, match="Expected num_records to be public"):
        ReportFacts(num_records=60000)
    disclosed = ReportFacts(num_records=60000, unprotected_quantities=("num_records",))
    assert disclosed.to_dict()["protected_dataset"]["num_records"] == 60000
    silent = ReportFacts().to_dict()
    assert "num_records" not in silent["protected_dataset"]
    assert silent["privacy_unit"]["max_records_per_person"] == "unknown"


@pytest.mark.parametrize("reason", [None, "fixed test noise"])
def test_a_report_read_back_is_the_one_that_was_written(tmp_path: Path, reason: str | None) -> None:
    written = report(tmp_path, EASY, reason=reason)
    file = tmp_path / "privacy.json"
    file.write_text(json.dumps(written.to_dict()), encoding="utf-8")
    assert PrivacyReport.from_file(file) == written


NOT_REPORTS = ["", "{", "[]", "3", "{}", "\x00", '{"private": true, "epsilon": null, "delta": 1e-5}']


@pytest.mark.parametrize("text", NOT_REPORTS)
def test_a_file_that_holds_no_report_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "privacy.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^Expected .*privacy\.json' to hold a privacy report: .*\.$") as caught:
        PrivacyReport.from_file(file)
    assert "\n" not in str(caught.value)


def test_a_missing_or_unreadable_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Expected a privacy report at .*: No such file or directory\.$"):
        PrivacyReport.from_file(tmp_path / "privacy.json")
    with pytest.raises(ValueError, match=r"^Expected a privacy report at .*: Is a directory\.$"):
        PrivacyReport.from_file(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="^Expected .* to hold a privacy report"):
        PrivacyReport.from_file(tmp_path / "binary")


# --- persons ---------------------------------------------------------------------------------------------------------


def persons_report(folder: Path, **options: Any) -> dict[str, Any]:
    randomness = SecretGenerator().describe()
    computed = Execution(randomness=randomness, device="cpu", precision="float64", gradients="not taken")
    with PrivacyLedger.open(folder / "ledger.jsonl") as ledger:
        ledger.reserve(GaussianEvent(5.0, 1.0, 2), stage="mean", clip_norm=1.0, execution=computed)
        facts = ReportFacts(unit="person", num_records=30, unprotected_quantities=("num_records",))
        return PrivacyReport.from_ledger(ledger, target_delta=1e-5, facts=facts, **options).to_dict()


def test_a_guarantee_for_persons_says_so_in_words_and_fields(tmp_path: Path) -> None:
    fields = persons_report(tmp_path)
    assert fields["privacy_unit"]["unit"] == "person" and fields["schema_version"] == SCHEMA_VERSION == "1.1"
    assert fields["privacy_unit"]["max_records_per_person"] == "any"
    statement = fields["statement"]
    assert "adding or removing one person with all their images and labels" in statement
    assert "decided whether one person took part" in statement and "all images of every other person" in statement
    assert "except for the exact number of persons," in statement
    assert "a person counts once in all classes together" in fields["accounting"]["composition"]
    assert check_schema(fields).holds and all(check.holds for check in verify_report(fields))


def test_a_group_of_persons_is_one_of_families(tmp_path: Path) -> None:
    fields = persons_report(tmp_path, group_size=4, adjacency="replace-one")
    assert "replacing 4 persons with all their images" in fields["statement"]
    assert "which of two versions of 4 persons took part" in fields["statement"]
    assert all(check.holds for check in verify_report(fields))


def test_words_for_persons_do_not_hold_of_images(tmp_path: Path) -> None:
    """A report of images that says persons in its sentence, or the other way, is noticed."""
    persons = persons_report(tmp_path)
    images = {**persons, "privacy_unit": {**persons["privacy_unit"], "unit": "image"}}
    (statement,) = [check for check in verify_report(images) if check.name == "statement"]
    assert statement.fails
    assert check_schema(images).fails  # any number of images per person is covered only where persons are the unit
    assert check_schema({**persons, "schema_version": "1.0"}).fails
