"""Verification: an honest report holds, and a report with any number edited does not."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

import pytest

from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.execution import UNKNOWN
from dp_curriculum.privacy.privacy_report import CLAIMS, PrivacyReport, ReportFacts, no_guarantee
from dp_curriculum.privacy.verification import (
    Check,
    check_schema,
    events_of_report,
    not_checked,
    report_schema,
    verify_report,
)


class Ledger:
    """What a report is computed from: a full release, and a sampled one. Batches of all rows are quick to account."""

    not_private_reasons: tuple[str, ...] = ()
    execution = UNKNOWN
    tuning = None

    def __init__(self, sample_rate: float) -> None:
        self.events = (GaussianEvent(6.0, 1.0, 1), GaussianEvent(8.0, sample_rate, 4))
        self.mechanisms = [
            {
                "name": name,
                "mechanism": "gaussian" if event.sample_rate == 1 else "subsampled-gaussian",
                "sampling": "none" if event.sample_rate == 1 else "poisson",
                "sample_rate": event.sample_rate,
                "noise_multiplier": event.noise_multiplier,
                "clip_norm": 1.0,
                "num_steps": event.num_steps,
            }
            for name, event in zip(("central-images-mean", "dp-sgd"), self.events)
        ]


@functools.cache
def honest(adjacency: Any = "add-or-remove-one", group_size: int = 1, sample_rate: float = 0.5) -> str:
    report = PrivacyReport.from_ledger(
        Ledger(sample_rate),
        target_delta=1e-5,
        target_epsilon=10.0,
        adjacency=adjacency,
        group_size=group_size,
    )
    return json.dumps(report.to_dict())


def report(**options: Any) -> dict[str, Any]:
    """A fresh copy, as read from a file."""
    return json.loads(honest(**options))


@pytest.mark.parametrize(
    "options", [{}, {"adjacency": "replace-one"}, {"group_size": 3}], ids=["plain", "replace-one", "group"]
)
def test_an_honest_report_holds(options: dict[str, Any]) -> None:
    checks = verify_report(report(**options))
    assert all(check.holds for check in checks)
    assert {check.name.split(" ")[0] for check in checks} == {*CLAIMS, "statement"}
    assert checks[0].claimed == str(report(**options)["epsilon"])


EDITS: list[tuple[str, Any]] = [
    *[(name, factor) for name in CLAIMS for factor in (0.9, 1.1)],
    ("delta", 2.0),
    ("delta", 0.5),
    ("group_size", 2),
    ("target_epsilon", 0.01),
    *[(f"mechanisms/{row}/noise_multiplier", factor) for row in (0, 1) for factor in (0.5, 2.0)],
    *[(f"mechanisms/{row}/num_steps", 2.0) for row in (0, 1)],
    ("mechanisms/1/num_steps", 0.5),
    ("mechanisms/1/sample_rate", 1.5),
    ("mechanisms/1/sample_rate", 0.5),
]


@pytest.mark.parametrize(("path", "factor"), EDITS, ids=str)
def test_each_edited_number_is_caught(path: str, factor: float) -> None:
    edited = report(sample_rate=0.5 if "sample_rate" in path else 1.0)
    *parents, key = path.split("/")
    place: Any = edited
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[key] = type(place[key])(place[key] * factor)
    assert not all(check.holds for check in verify_report(edited))


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("value", [None, "1.0", math.nan, math.inf, 0, True])
def test_a_claim_that_is_no_number_does_not_hold(name: str, value: Any) -> None:
    assert not all(check.holds for check in verify_report({**report(sample_rate=1.0), name: value}))


@pytest.mark.parametrize("value", [None, 5, "num_records", ["num_records"], {"num_records": 1}])
def test_a_statement_that_does_not_fit_what_is_unprotected_does_not_hold_and_nothing_raises(value: Any) -> None:
    honest = report(sample_rate=1.0)
    fits = ("num_records" in honest["unprotected_quantities"]) == (value == ["num_records"])
    assert all(check.holds for check in verify_report({**honest, "unprotected_quantities": value})) == fits


def test_an_edited_adjacency_is_caught() -> None:
    edited = {**report(sample_rate=1.0), "adjacency": "replace-one"}
    assert not all(check.holds for check in verify_report(edited))
    replaced = {**report(adjacency="replace-one", sample_rate=1.0), "adjacency": "add-or-remove-one"}
    assert not all(check.holds for check in verify_report(replaced))


def test_a_left_out_repeated_or_noiseless_mechanism_is_caught() -> None:
    claims = report(sample_rate=1.0)
    rows = claims["mechanisms"]
    for edited in ([rows[0]], [rows[1]], [], [*rows, rows[1]], [rows[0], {**rows[1], "noise_multiplier": 0.0}]):
        assert not all(check.holds for check in verify_report({**claims, "mechanisms": edited}))
    assert all(check.holds for check in verify_report({**claims, "mechanisms": rows[::-1]})), "order spends nothing"


def test_a_report_without_guarantee_holds_only_in_that_it_says_so() -> None:
    reasons = ["the ledger is missing"]
    bare = {**report(), "private": False, "not_private_reasons": reasons, "statement": no_guarantee(reasons)}
    check, statement = verify_report(bare)
    assert check.holds and check.claimed == "no" and "no guarantee" in check.computed and statement.holds
    for said in (report()["statement"], bare["statement"].replace("no privacy", "every privacy"), ""):
        assert verify_report({**bare, "statement": said})[1].fails
    older = {**bare, "implementation": {**bare["implementation"], "version": "0.0.1"}}
    assert verify_report(older)[1].holds
    assert verify_report({**older, "statement": "NOT PRIVATE: as said then."})[1].verdict == "not checked"
    assert verify_report({**older, "statement": report()["statement"]})[1].fails
    for value in (None, 0, "", []):
        assert not all(check.holds for check in verify_report({**report(), "private": value}))
    without = report()
    del without["private"]
    assert not all(check.holds for check in verify_report(without))


def edited_mechanism(**changes: Any) -> dict[str, Any]:
    edited = report()
    edited["mechanisms"][1] |= changes
    return edited


def without(key: str) -> dict[str, Any]:
    edited = report()
    del edited["mechanisms"][1][key]
    return edited


@pytest.mark.parametrize(
    ("edited", "message"),
    [
        ([1, 2], "Expected a privacy report to be a mapping"),
        ({"private": True}, "to list its mechanisms"),
        ({**report(), "mechanisms": None}, "to list its mechanisms"),
        ({**report(), "mechanisms": ["dp-sgd"]}, "to list its mechanisms"),
        (without("noise_multiplier"), "to list its mechanisms: KeyError 'noise_multiplier'"),
        (edited_mechanism(mechanism="laplace"), "mechanism 'dp-sgd' to be subsampled-gaussian with Poisson sampling"),
        (edited_mechanism(mechanism="gaussian"), "mechanism 'dp-sgd' to be subsampled-gaussian"),
        (edited_mechanism(sampling="shuffle"), "mechanism 'dp-sgd' to be subsampled-gaussian with Poisson sampling"),
        (edited_mechanism(sampling="none"), "mechanism 'dp-sgd' to be subsampled-gaussian with Poisson sampling"),
        (edited_mechanism(sample_rate=1.5), "sample_rate=1.5"),
        (edited_mechanism(noise_multiplier="0.9"), "to list its mechanisms"),
        (edited_mechanism(noise_multiplier=-1.0), "noise_multiplier=-1.0"),
        (edited_mechanism(num_steps=0), "num_steps=0"),
        ({**report(), "delta": None}, "delta=None in the report to be a number"),
        ({**report(), "delta": 1.0}, "delta=1.0"),
        ({**report(), "adjacency": "none"}, "adjacency='none'"),
        ({**report(), "group_size": 0}, "group_size=0"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(edited: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        verify_report(edited)
    assert "\n" not in str(caught.value)


def test_events_are_those_of_the_ledger() -> None:
    assert events_of_report(report()) == Ledger(0.5).events
    original = report(sample_rate=1.0)
    verify_report(copy.deepcopy(original))
    assert original == report(sample_rate=1.0)


# --- the sentence and the schema -----------------------------------------------------------------------------------


def test_an_edited_sentence_is_caught() -> None:
    claims = report(sample_rate=1.0)
    statement = claims["statement"]
    number = statement.split("(")[1].split(",")[0]
    guessed = statement.split("at most ")[1].split(" %")[0]
    edits = {f"({number}": "(0.5", "1e-05)": "1e-09)", f"{guessed} %": "50.1 %", "one image": "all images"}
    for old, new in edits.items():
        edited = {**claims, "statement": statement.replace(old, new)}
        assert edited != claims
        assert not all(check.holds for check in verify_report(edited)), old


@pytest.mark.parametrize("writer", [{"version": "0.0.1"}, {"version": "0.1.0 "}, {"package": "other"}], ids=str)
def test_a_sentence_of_another_version_is_held_to_its_numbers_and_not_checked_beyond(writer: dict[str, str]) -> None:
    claims = report(sample_rate=1.0)
    claims["implementation"] |= writer
    reworded = {**claims, "statement": claims["statement"].replace("In plain words: suppose", "Suppose")}
    for version in (claims, reworded):
        found = {check.verdict: check.name for check in verify_report(version)}
        assert found.keys() == {"holds", "not checked"} and found["not checked"] == "statement"
    edited = {**claims, "statement": claims["statement"].replace("1e-05)", "1e-09)")}
    assert [check.name for check in verify_report(edited) if check.fails] == ["statement"]


def test_epsilon_0_needs_public_data() -> None:
    """Weights that no mechanism paid for were trained on public images, or somebody left a mechanism out."""
    ledger = Ledger(1.0)
    ledger.events, ledger.mechanisms = (), []  # type: ignore[assignment]
    public = ({"name": "org/data", "role": "pretraining"},)
    for data in ((), public):
        facts = ReportFacts(public_data=data)
        checks = verify_report(PrivacyReport.from_ledger(ledger, target_delta=1e-5, facts=facts).to_dict())
        assert [check.name for check in checks if check.fails] == ([] if data else ["mechanisms"])


def test_what_is_not_checked_neither_holds_nor_fails() -> None:
    check = not_checked("card", "of 0.0.1", "this is 0.1.0")
    assert (check.holds, check.fails, check.verdict) == (False, False, "not checked")
    assert [Check("a", "", "", holds).verdict for holds in (True, False)] == ["holds", "FAILS"]


@pytest.mark.parametrize("options", [{}, {"adjacency": "replace-one"}, {"group_size": 3}], ids=str)
def test_an_honest_report_follows_the_schema(options: dict[str, Any]) -> None:
    check = check_schema(report(**options))
    assert check.holds and check.claimed == "1.0"
    assert set(report(**options)) == set(report_schema()["required"])
    assert set(report_schema()["properties"]) == {*report_schema()["required"], "dataset_spending"}


def test_a_report_without_guarantee_follows_the_schema_and_must_give_a_reason(tmp_path: Any) -> None:
    path = tmp_path / "privacy.json"
    path.write_text(honest())
    bare = PrivacyReport.from_file(path).without_guarantee("the ledger is missing").to_dict()
    assert check_schema(bare).holds
    assert not check_schema({**bare, "not_private_reasons": []}).holds
    assert not check_schema({**bare, "epsilon": 1.0}).holds


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"schema_version": "0.9"}, "schema_version"),
        ({"schema_version": None}, "schema_version"),
        ({"private": "yes"}, "private"),
        ({"epsilon": None}, "epsilon"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"delta": 1.0}, "delta"),
        ({"delta": "1e-5"}, "delta"),
        ({"adjacency": "none"}, "adjacency"),
        ({"flavor": "pure"}, "flavor"),
        ({"mechanisms": [{}]}, "mechanisms/0"),
        ({"mechanisms": "none"}, "mechanisms"),
        ({"weights": {"../../x.safetensors": "0" * 64}}, "weights"),
        ({"weights": {"unet/a.bin": "0" * 64}}, "weights"),
        ({"weights": {"unet/a.safetensors": "0"}}, "weights/unet/a.safetensors"),
        ({"randomness": {"secret": False}}, "randomness/secret"),
        ({"not_private_reasons": ["noise was fixed"]}, "not_private_reasons"),
        ({"signed_by": "somebody"}, "the report"),
    ],
    ids=str,
)
def test_what_does_not_follow_the_schema_is_named(changes: dict[str, Any], place: str) -> None:
    check = check_schema({**report(), **changes})
    assert not check.holds and check.computed.startswith(f"{place}: ") and "\n" not in check.computed


@pytest.mark.parametrize("value", [None, [], 3, "text", {}, {"private": True}], ids=str)
def test_what_is_no_report_does_not_follow_the_schema(value: Any) -> None:
    assert not check_schema(value).holds


def test_each_missing_field_is_noticed() -> None:
    for name in report_schema()["required"]:
        edited = report()
        del edited[name]
        assert not check_schema(edited).holds, name
