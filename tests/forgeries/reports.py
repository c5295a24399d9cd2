"""Forgeries of numbers and words of a report."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forgeries.tools import (
    NOT_CHECKED,
    REFUSED,
    STRONGER,
    edit_json,
    edit_metadata,
    edit_report,
    edit_report_text,
    edit_text,
    forgery,
    read_card,
    section,
)


@forgery("privacy report")
def a_key_twice_in_the_report(folder: Path) -> None:
    edit_report_text(folder, '"epsilon": ', '"epsilon": 0.1,\n  "epsilon": ')


@forgery("privacy report")
def a_key_twice_deep_in_the_report(folder: Path) -> None:
    edit_report_text(folder, '"clip_norm": ', '"clip_norm": 0.1,\n      "clip_norm": ')


@forgery("privacy report")
def a_key_twice_in_two_spellings(folder: Path) -> None:
    edit_report_text(folder, '"epsilon": ', '"\\u0065psilon": 0.1,\n  "epsilon": ')


@forgery("privacy report", known=True)
def not_a_number_in_the_report(folder: Path) -> None:
    edit_report_text(folder, '"target_epsilon": 10.0', '"target_epsilon": NaN')


@forgery("privacy report", known=True)
def a_number_beyond_all_floats(folder: Path) -> None:
    edit_report_text(folder, '"target_epsilon": 10.0', '"target_epsilon": 1e999')


@forgery("", verdict=REFUSED, known=True)
def a_report_in_another_encoding(folder: Path) -> None:
    text = (folder / "privacy.json").read_text()
    (folder / "privacy.json").write_bytes(text.encode("utf-16"))


@forgery("", verdict=REFUSED, known=True)
def no_report_at_all(folder: Path) -> None:
    (folder / "privacy.json").unlink()
    edit_metadata(folder, lambda metadata: metadata.pop("differential_privacy"))


def set_report(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_report(folder, lambda report: report.update(values))


@forgery("mechanisms")
def no_mechanism_and_epsilon_0(folder: Path) -> None:
    edit_report(folder, forget_mechanisms)
    edit_text(
        folder,
        "from easy to hard under one privacy budget: first on noisy aggregates of the private images, then "
        "on the images themselves with DP-SGD (the method of [DP-FETA](https://arxiv.org/abs/2504.01395))",
        "on nothing yet",
    )
    edit_text(folder, re.search(r"- DP-SGD: .*\n", read_card(folder)[1])[0], "")  # type: ignore[index]
    edit_metadata(
        folder,
        lambda metadata: metadata.update(tags=[tag for tag in metadata["tags"] if tag not in ("dp-sgd", "opacus")]),
    )


def forget_mechanisms(report: Any, *, epsilon: float = 0.0) -> None:
    report.update(
        dict.fromkeys(("epsilon", "epsilon_add_or_remove_one", "epsilon_replace_one", "gdp_mu"), epsilon),
        mechanisms=[],
        statement=re.sub(r"\([\d.]+, ", f"({epsilon:g}, ", re.sub(r"most [\d.]+ %", "most 50 %", report["statement"])),
    )


@forgery("epsilon (add-or-remove-one)")
def epsilon_below_zero_by_its_sign(folder: Path) -> None:
    edit_report(folder, lambda report: forget_mechanisms(report, epsilon=-0.0))


@forgery("schema", known=True)
def epsilon_as_text(folder: Path) -> None:
    edit_json(folder / "privacy.json", lambda report: report.update(epsilon="0.1"))


@forgery("schema", known=True)
def epsilon_as_a_truth_value(folder: Path) -> None:
    edit_json(folder / "privacy.json", lambda report: report.update(epsilon=True))


@forgery("epsilon (add-or-remove-one)", known=True)
def epsilon_as_a_whole_number(folder: Path) -> None:
    edit_report(folder, lambda report: report.update(epsilon=10))


@forgery("schema", known=True)
def delta_of_one(folder: Path) -> None:
    edit_json(folder / "privacy.json", lambda report: report.update(delta=1))


@forgery("schema", known=True)
def steps_below_zero(folder: Path) -> None:
    edit_report(folder, lambda report: report["mechanisms"][1].update(num_steps=-2))


@forgery("mechanisms", known=True)
def steps_in_parts(folder: Path) -> None:
    edit_report(folder, lambda report: report["mechanisms"][1].update(num_steps=2.0))


@forgery("schema", known=True)
def more_steps_than_anybody_takes(folder: Path) -> None:
    edit_report(folder, lambda report: report["mechanisms"][1].update(num_steps=10**15))


@forgery("epsilon (add-or-remove-one)", known=True)
def more_noise_than_there_was(folder: Path) -> None:
    edit_report(folder, lambda report: report["mechanisms"][1].update(noise_multiplier=1e300))


@forgery("epsilon (add-or-remove-one)", known=True)
def a_mechanism_left_out(folder: Path) -> None:
    edit_report(folder, lambda report: report["mechanisms"].pop(0))


@forgery("schema", known=True)
def hashes_in_capitals(folder: Path) -> None:
    edit_report(folder, lambda r: r.update(weights={name: value.upper() for name, value in r["weights"].items()}))


@forgery("weights (sha256)", known=True)
def no_hash_of_the_weights(folder: Path) -> None:
    edit_report(folder, lambda report: report.update(weights={}))


@forgery("statement", verdict=NOT_CHECKED)
def a_version_that_nobody_knows_with_a_statement_of_its_own(folder: Path) -> None:
    def invent(report: Any) -> None:
        report["implementation"]["version"] = "0.0.1"
        report["statement"] += " In truth nothing about any image can be found out at all."

    edit_report(folder, invent)
    edit_text(folder, "| adjacency |", "| real epsilon | 0.1 |\n| adjacency |")


@forgery("card", verdict=NOT_CHECKED)
def a_version_that_nobody_knows_with_a_card_of_its_own(folder: Path) -> None:
    edit_report(folder, lambda report: report["implementation"].update(version="99.0"))
    edit_text(folder, section(folder), f"## Privacy\n\n{STRONGER}\n\n<!--\n{section(folder)}-->\n")


@forgery("words of the report", verdict=NOT_CHECKED)
def a_version_that_nobody_knows_and_nothing_else(folder: Path) -> None:
    edit_report(folder, lambda report: report["implementation"].update(version="0.0.1"))


@forgery("statement", verdict=NOT_CHECKED)
def a_version_with_a_look_alike_digit(folder: Path) -> None:
    edit_report(folder, lambda report: report["implementation"].update(version="0.1.\uff10"))


@forgery("statement", verdict=NOT_CHECKED)
def another_package(folder: Path) -> None:
    edit_report(folder, lambda report: report["implementation"].update(package="dp-curriculum"))


@forgery("statement", known=True)
def a_version_that_nobody_knows_with_other_numbers(folder: Path) -> None:
    def invent(report: Any) -> None:
        report["implementation"]["version"] = "0.0.1"
        report["statement"] = report["statement"].replace("1e-05)", "1e-09)")

    edit_report(folder, invent)


@forgery("statement", known=True)
def a_look_alike_letter_in_every_copy_of_the_statement(folder: Path) -> None:
    edit_report(folder, lambda r: r.update(statement=r["statement"].replace("right", "r\u0456ght")))


@forgery("statement", known=True)
def a_sentence_more_in_every_copy_of_the_statement(folder: Path) -> None:
    edit_report(folder, lambda r: r.update(statement=f"{r['statement']} {STRONGER}"))


@forgery("statement")
def a_claim_in_what_claims_nothing(folder: Path) -> None:
    """A report that is not private, so that no number is computed, with the sentence of one that is."""

    def take_back(report: Any) -> None:
        report.update(dict.fromkeys(("epsilon", "epsilon_add_or_remove_one", "epsilon_replace_one", "gdp_mu")))
        report.update(private=False, not_private_reasons=["on request"], statement=STRONGER)
        report["accounting"]["assumptions_met"] = False

    edit_report(folder, take_back)


def words(name: str, change: Callable[[Any], Any]) -> None:
    """A forgery of one sentence of the report, in all of its copies."""

    def edit(folder: Path) -> None:
        edit_report(folder, change)

    edit.__name__ = name
    forgery("words of the report")(edit)


WORDS: dict[str, Callable[[Any], Any]] = {
    "limits_left_out": lambda r: r.update(not_covered=[]),
    "one_limit_left_out": lambda r: r["not_covered"].remove("several images of the same person, together"),
    "a_limit_that_praises": lambda r: r["not_covered"].append(f"nothing else: {STRONGER}"),
    "a_limit_twice": lambda r: r["not_covered"].append(r["not_covered"][0]),
    "published_facts_left_out": lambda r: r.update(unprotected_quantities=["num_records"]),
    "a_published_fact_with_markup": lambda r: r["unprotected_quantities"].append("nothing](https://evil.example)"),
    "tuning_that_is_covered": lambda r: r["hyperparameter_tuning"].update(covered=True),
    "a_note_on_tuning": lambda r: r["hyperparameter_tuning"].update(note="all runs are accounted for"),
    "a_person_with_one_image": lambda r: r["privacy_unit"].update(max_records_per_person=1),
    "the_final_model_alone": lambda r: r.update(release="final-model"),
    "nobody_saw_the_images": lambda r: r.update(trust_model="nobody has seen the images"),
    "no_access_to_the_data": lambda r: r.update(data_accesses="none"),
    "another_composition": lambda r: r["accounting"].update(composition="none is needed"),
    "other_assumptions": lambda r: r["accounting"].update(assumptions=["none"]),
    "another_unit": lambda r: r["privacy_unit"].update(description="all images of the world"),
    "a_mechanism_with_cells_in_its_name": lambda r: r["mechanisms"][0].update(name="mean | nothing | none | 999"),
    "a_mechanism_with_a_line_break": lambda r: r["mechanisms"][0].update(name="mean\n"),
    "mechanisms_in_another_order": lambda r: r["mechanisms"].reverse(),
    "public_data_with_markup": lambda r: r.update(public_data=[{"name": "a/b | x |\n# h", "role": "pretraining"}]),
    "public_data_for_something_else": lambda r: r.update(public_data=[{"name": "a/b", "role": "all of it"}]),
    "a_dataset_that_is_a_sentence": lambda r: r["protected_dataset"].update(name="public images, nobody's"),
    "gradients_that_were_not_checked": lambda r: r["implementation"].update(verified_per_image_gradients=False),
    "a_generator_with_a_line_break": lambda r: r["randomness"].update(generator="chacha20\n| epsilon | 0.1 |"),
    "a_version_that_certifies": lambda r: r["accounting"].update(version="0.6.0 (epsilon is 0.1)"),
    "a_generator_with_a_claim": lambda r: r["randomness"].update(generator="chacha20 (epsilon: 0.1)"),
    "a_novel_as_a_generator": lambda r: r["randomness"].update(generator=STRONGER * 9),
}
for _name, _change in WORDS.items():
    words(_name, _change)
