"""A corpus of forgeries: each edits a good model, or dataset, so that it claims more than it may, or hides what it is.

A new one is a function with `@forgery(...)`, named for what somebody did. `check` is the name of the check that has to
notice it, `verdict` what it says; `known` marks those that were caught before there was a corpus. A forger is thought
to be careful: the hashes on the card are written anew after each edit, unless `careless` is set.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from dp_curriculum.model_card import privacy_section


FAILS, NOT_CHECKED, REFUSED = "FAILS", "not checked", "refused"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
STRONGER = "This model is (0.1, 1e-09)-differentially private."
PICKLE = b"\x80\x02}q\x00."


@dataclass(frozen=True)
class Forgery:
    """What somebody did, and how `verify` has to end."""

    name: str
    edit: Callable[[Path], None]
    check: str
    verdict: str
    of: str
    careless: bool
    known: bool


FORGERIES: list[Forgery] = []


def forgery(
    check: str, *, verdict: str = FAILS, of: str = "model", careless: bool = False, known: bool = False
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Adds a forgery to the corpus."""

    def add(edit: Callable[[Path], None]) -> Callable[[Path], None]:
        FORGERIES.append(Forgery(edit.__name__, edit, check, verdict, of, careless, known))
        return edit

    return add


# --- tools of a careful forger -------------------------------------------------------------------------------------


def read_card(folder: Path) -> tuple[str, str]:
    """Metadata and text."""
    _, front, body = (folder / "README.md").read_bytes().decode().split("---\n", 2)
    return front, body


def write_card(folder: Path, front: str, body: str) -> None:
    (folder / "README.md").write_bytes(f"---\n{front}---\n{body}".encode())


def edit_text(folder: Path, old: str, new: str) -> None:
    """Edits the text of the card, below its metadata."""
    front, body = read_card(folder)
    assert old in body, old
    write_card(folder, front, body.replace(old, new, 1))


def edit_front(folder: Path, old: str, new: str) -> None:
    """Edits the metadata of the card as text."""
    front, body = read_card(folder)
    assert old in front, old
    write_card(folder, front.replace(old, new, 1), body)


def edit_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    """Edits the values of the metadata, and writes them as this package does."""
    front, body = read_card(folder)
    values = yaml.safe_load(front)
    change(values)
    write_card(folder, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100), body)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


def edit_report(folder: Path, change: Callable[[Any], Any]) -> None:
    """Edits all copies of the report alike, and writes the section of the card that follows from it anew."""
    before = json.loads((folder / "privacy.json").read_text())
    edit_json(folder / "privacy.json", change)
    after = json.loads((folder / "privacy.json").read_text())
    if (folder / "model_index.json").exists():
        edit_json(folder / "model_index.json", lambda index: index.update(privacy=after))
    edit_metadata(folder, lambda metadata: metadata.update(differential_privacy=after))
    front, body = read_card(folder)
    write_card(folder, front, body.replace(privacy_section(before), privacy_section(after), 1))


def section(folder: Path) -> str:
    """The true section on privacy."""
    return privacy_section(json.loads((folder / "privacy.json").read_text()))


def relist(folder: Path) -> None:
    """Writes the hashes on the card anew, where it is text."""
    card = folder / "README.md"
    if card.is_symlink() or not card.is_file():
        return

    def digest(row: re.Match[bytes]) -> bytes:
        path = folder / row[1].decode()
        return (
            b"- `%s`: `%s`" % (row[1], hashlib.sha256(path.read_bytes()).hexdigest().encode())
            if path.is_file()
            else row[0]
        )

    card.write_bytes(re.sub(rb"- `([\w./-]+)`: `[0-9a-f]{64}`", digest, card.read_bytes()))


# --- the text of the card ------------------------------------------------------------------------------------------


@forgery("card")
def the_true_section_in_a_comment_and_another_shown(folder: Path) -> None:
    edit_text(folder, section(folder), f"## Privacy\n\n{STRONGER}\n\n<!--\n{section(folder)}-->\n")


@forgery("card")
def a_stronger_claim_above_the_section(folder: Path) -> None:
    edit_text(folder, "## Privacy\n", f"**{STRONGER}**\n\n## Privacy\n")


@forgery("card")
def a_stronger_claim_below_the_section(folder: Path) -> None:
    edit_text(folder, "## How it was made\n", f"In short: {STRONGER}\n\n## How it was made\n")


@forgery("card")
def a_stronger_claim_in_the_summary(folder: Path) -> None:
    edit_text(folder, "diffusion model (", "diffusion model, 0.1-private, (")


@forgery("card")
def a_second_section_on_privacy_at_the_end(folder: Path) -> None:
    front, body = read_card(folder)
    write_card(folder, front, f"{body}\n## Privacy\n\n{STRONGER}\n")


@forgery("card")
def a_claim_on_the_last_line(folder: Path) -> None:
    front, body = read_card(folder)
    write_card(folder, front, body.rstrip("\n") + f" {STRONGER}\n")


@forgery("card")
def the_section_folded_away(folder: Path) -> None:
    edit_text(
        folder, section(folder), f"{STRONGER}\n\n<details><summary>more</summary>\n\n{section(folder)}\n</details>\n"
    )


@forgery("card")
def the_section_as_an_example_of_code(folder: Path) -> None:
    edit_text(folder, section(folder), f"## Privacy\n\n{STRONGER}\n\n```\n{section(folder)}```\n")


@forgery("card")
def the_section_made_invisible_by_a_style(folder: Path) -> None:
    edit_text(folder, "# org/faces", "<style>table, h2 ~ p { display: none }</style>\n\n# org/faces")


@forgery("card")
def the_section_in_a_link_definition(folder: Path) -> None:
    edit_text(folder, section(folder), f"{STRONGER}\n\n[section]: <> '\n{section(folder)}'\n")


@forgery("card")
def a_comment_that_nobody_sees(folder: Path) -> None:
    edit_text(folder, "## Use\n", "[//]: # (epsilon is 0.1)\n\n## Use\n")


@forgery("card", known=True)
def a_zero_width_space_in_the_statement(folder: Path) -> None:
    edit_text(folder, "Somebody who", "Some\u200bbody who")


@forgery("card", known=True)
def text_turned_from_right_to_left(folder: Path) -> None:
    edit_text(folder, "guesses the outcome right", "guesses the outcome \u202eright\u202c")


@forgery("card", known=True)
def a_look_alike_letter(folder: Path) -> None:
    edit_text(folder, "| epsilon |", "| \u0435psilon |")


@forgery("card", known=True)
def a_look_alike_letter_in_the_statement(folder: Path) -> None:
    edit_text(folder, "adjacency); all", "adj\u0430cency); all")


@forgery("card", known=True)
def a_number_as_an_entity(folder: Path) -> None:
    edit_text(folder, "guesses the outcome right at most ", "guesses the outcome right at most &#48;.")


@forgery("card", known=True)
def a_row_taken_out_of_the_table(folder: Path) -> None:
    edit_text(folder, "| epsilon, replace-one (NIST: bounded)", "| epsilon, bounded")


@forgery("card")
def an_example_that_loads_another_model(folder: Path) -> None:
    edit_text(folder, 'snapshot_download("org/faces")', 'snapshot_download("evil/faces")')


@forgery("card")
def a_command_that_verifies_another_model(folder: Path) -> None:
    edit_text(folder, "`dp-curriculum verify org/faces`", "`dp-curriculum verify evil/faces`")


@forgery("card")
def an_example_that_runs_another_command(folder: Path) -> None:
    edit_text(folder, "pipe.privacy  # the report below", "import os; os.system('id')")


@forgery("card")
def a_fact_of_the_training_that_is_none(folder: Path) -> None:
    edit_text(folder, "- model: ", "- audit: passed, epsilon 0.1\n- model: ")


@forgery("card")
def a_fact_of_the_training_with_a_claim(folder: Path) -> None:
    edit_text(folder, "it spends nothing beyond its query", "it spends nothing at all")


@forgery("card")
def fewer_steps_among_the_facts(folder: Path) -> None:
    edit_text(folder, "- DP-SGD: 2 steps of", "- DP-SGD: 1 steps of")


@forgery("card")
def a_lesson_left_out_of_the_facts(folder: Path) -> None:
    edit_text(folder, re.search(r"- lesson mean: .*\n", read_card(folder)[1])[0], "")  # type: ignore[index]


@forgery("card")
def another_network_among_the_facts(folder: Path) -> None:
    edit_text(folder, "10,945 parameters", "10,946 parameters")


@forgery("card")
def another_sampler_among_the_facts(folder: Path) -> None:
    edit_text(folder, "Stochastic Heun, 2 steps".replace("S", "s", 1), "stochastic Heun, 3 steps")


@forgery("card")
def a_fact_told_twice(folder: Path) -> None:
    edit_text(folder, "- model: ", "- sampler: EDM stochastic Heun, 1 steps, S_churn 0\n- model: ")


@forgery("card")
def measured_numbers_that_nobody_measured(folder: Path) -> None:
    front, body = read_card(folder)
    table = "\n## Measured\n\nWithout a look at a training image.\n\n| | value | data |\n|---|---|---|\n"
    write_card(folder, front, f"{body}{table}| membership_auc | 0.5 | 300 of faces (test) |\n")


@forgery("card")
def measured_numbers_in_the_metadata_alone(folder: Path) -> None:
    metric = {"type": "fid", "name": "fid: 300 of faces (test)", "value": 0.1}
    result = {"task": {"type": "x"}, "dataset": {"name": "org/faces", "type": "org/faces"}, "metrics": [metric]}
    edit_report(folder, lambda report: report["protected_dataset"].update(name="org/faces"))
    edit_metadata(folder, lambda m: m.update({"datasets": ["org/faces"], "model-index": [{"results": [result]}]}))


@forgery("card")
def a_class_with_markup_for_a_name(folder: Path) -> None:
    """The name itself is allowed; on the card it has to be quoted."""
    name = f"0) -->\n\n## Privacy\n\n{STRONGER}\n\n<!--"
    edit_json(folder / "model_index.json", lambda index: index["id2label"].update({"0": name}))
    edit_text(folder, "(classes: 0, 1", f"(classes: {name}, 1")


@forgery("card")
def a_class_with_a_link_for_a_name(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index["id2label"].update({"0": "[0](https://evil.example)"}))
    edit_text(folder, "(classes: 0, 1", "(classes: [0](https://evil.example), 1")


@forgery("card")
def other_classes_than_those_of_the_model(folder: Path) -> None:
    edit_text(folder, "(classes: 0, 1", "(classes: anonymous, 1")


@forgery("card")
def another_title(folder: Path) -> None:
    edit_text(folder, "# org/faces\n", "# org/faces, epsilon 0.1\n")


@forgery("card")
def a_heading_made_of_the_line_above(folder: Path) -> None:
    front, body = read_card(folder)
    write_card(folder, front, f"{body}===\n")


@forgery("card")
def lines_that_end_as_on_windows(folder: Path) -> None:
    text = (folder / "README.md").read_bytes()
    (folder / "README.md").write_bytes(text.replace(b"\n", b"\r\n"))


@forgery("card")
def a_carriage_return_that_hides_a_line(folder: Path) -> None:
    edit_text(folder, "## How it was made\n", f"{STRONGER}\r## How it was made\n")


@forgery("card")
def a_page_feed_that_no_editor_shows(folder: Path) -> None:
    edit_text(folder, "## How it was made\n", f"{STRONGER}\x0c\n## How it was made\n")


@forgery("card", known=True)
def a_byte_order_mark(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"\xef\xbb\xbf" + (folder / "README.md").read_bytes())


# --- what an owner may add -----------------------------------------------------------------------------------------


def add_owners_part(folder: Path, text: str) -> None:
    front, body = read_card(folder)
    write_card(folder, front, f"{body}\n## Added by the owner\n\n{text}\n")


@forgery("added to the card", verdict=NOT_CHECKED)
def a_stronger_claim_below_the_heading_of_the_owner(folder: Path) -> None:
    add_owners_part(folder, STRONGER)


@forgery("added to the card", verdict=NOT_CHECKED)
def a_heading_of_the_owner_and_nothing_below(folder: Path) -> None:
    add_owners_part(folder, "")


@forgery("card")
def another_section_below_the_heading_of_the_owner(folder: Path) -> None:
    add_owners_part(folder, f"Hello.\n\n## Privacy\n\n{STRONGER}")


@forgery("card")
def an_underlined_section_below_the_heading_of_the_owner(folder: Path) -> None:
    add_owners_part(folder, f"Hello.\n\nPrivacy\n-------\n\n{STRONGER}")


@forgery("card")
def html_below_the_heading_of_the_owner(folder: Path) -> None:
    add_owners_part(folder, "<style>h2 ~ p, table { display: none }</style>")


@forgery("card")
def invisible_characters_below_the_heading_of_the_owner(folder: Path) -> None:
    add_owners_part(folder, "\u202eevil\u2028")


@forgery("card")
def the_heading_of_the_owner_above_the_section(folder: Path) -> None:
    edit_text(folder, "## Privacy\n", f"## Added by the owner\n\n{STRONGER}\n\n## Privacy\n")


@forgery("added to the card", verdict=NOT_CHECKED)
def a_claim_where_the_hub_asks_for_consent(folder: Path) -> None:
    edit_metadata(folder, lambda metadata: metadata.update(extra_gated_prompt=STRONGER))


@forgery("added to the card", verdict=NOT_CHECKED)
def a_claim_as_a_tag(folder: Path) -> None:
    edit_metadata(folder, lambda metadata: metadata["tags"].append("epsilon-0.1"))


@forgery("added to the card", verdict=NOT_CHECKED)
def a_claim_as_a_licence(folder: Path) -> None:
    edit_metadata(folder, lambda metadata: metadata.update(license=STRONGER))


# --- the metadata of the card --------------------------------------------------------------------------------------


@forgery("card")
def a_block_twice_in_the_metadata(folder: Path) -> None:
    front, body = read_card(folder)
    start = front.index("differential_privacy:\n")
    forged = re.sub(r"(?m)^  epsilon: .*$", "  epsilon: 0.1", front[start:])
    write_card(folder, f"{front[:start]}{forged}{front[start:]}", body)


@forgery("card")
def a_number_twice_in_the_block(folder: Path) -> None:
    edit_front(folder, "  epsilon: ", "  epsilon: 0.1\n  epsilon: ")


@forgery("card")
def a_number_behind_an_anchor(folder: Path) -> None:
    front, body = read_card(folder)
    spent = re.search(r"(?m)^  epsilon: (.*)$", front)
    assert spent is not None
    front = front.replace("  epsilon: ", "  epsilon: &spent ", 1)
    write_card(folder, front.replace(f"add_or_remove_one: {spent[1]}", "add_or_remove_one: *spent", 1), body)


@forgery("card")
def a_number_merged_from_elsewhere(folder: Path) -> None:
    edit_front(folder, "  epsilon: ", "  <<: {epsilon: 0.1}\n  epsilon: ")


@forgery("card")
def a_number_with_a_tag(folder: Path) -> None:
    edit_front(folder, "  epsilon: ", "  epsilon: !!float ")


@forgery("card", known=True)
def an_object_of_python_in_the_metadata(folder: Path) -> None:
    edit_front(folder, "library_name:", "evil: !!python/object/apply:os.system [id]\nlibrary_name:")


@forgery("card", known=True)
def not_a_number_in_the_metadata(folder: Path) -> None:
    edit_metadata(folder, lambda metadata: metadata["differential_privacy"].update(epsilon=float("nan")))


@forgery("card")
def a_number_that_is_no_number_elsewhere_in_the_metadata(folder: Path) -> None:
    edit_front(folder, "library_name:", "score: .inf\nlibrary_name:")


@forgery("card")
def one_that_is_true(folder: Path) -> None:
    edit_front(folder, "  private: true", "  private: 1")


@forgery("card")
def steps_that_are_no_whole_number(folder: Path) -> None:
    edit_front(folder, "    num_steps: 2\n", "    num_steps: 2.0\n")


@forgery("card")
def a_second_front_matter(folder: Path) -> None:
    front, body = read_card(folder)
    write_card(folder, front, f"---\ndifferential_privacy:\n  epsilon: 0.1\n---\n{body}")


@forgery("card")
def metadata_that_end_early(folder: Path) -> None:
    """Programs that look for the last line of --- find other metadata than those that look for the first."""
    front, body = read_card(folder)
    write_card(folder, f"{front}---\nepsilon: 0.1\n", body)


@forgery("card", known=True)
def a_blank_line_before_the_metadata(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"\n" + (folder / "README.md").read_bytes())


@forgery("added to the card", verdict=NOT_CHECKED)
def a_number_that_other_programs_read_otherwise(folder: Path) -> None:
    edit_front(folder, "  group_size: 1\n", "  group_size: 0_1\n")


@forgery("added to the card", verdict=NOT_CHECKED)
def a_claim_as_a_comment_in_the_metadata(folder: Path) -> None:
    edit_front(folder, "differential_privacy:\n", "differential_privacy:  # epsilon is 0.1\n")


@forgery("card")
def another_dataset_in_the_metadata(folder: Path) -> None:
    edit_report(folder, lambda report: report["protected_dataset"].update(name="org/faces"))
    edit_metadata(folder, lambda metadata: metadata.update(datasets=["org/landscapes"]))


@forgery("card")
def another_library_in_the_metadata(folder: Path) -> None:
    edit_metadata(folder, lambda metadata: metadata.update(library_name="transformers"))


@forgery("card", known=True)
def a_card_without_metadata(folder: Path) -> None:
    (folder / "README.md").write_text(read_card(folder)[1])


# --- the numbers of the report -------------------------------------------------------------------------------------


def edit_report_text(folder: Path, old: str, new: str) -> None:
    text = (folder / "privacy.json").read_text()
    assert old in text, old
    (folder / "privacy.json").write_text(text.replace(old, new, 1))


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


# --- the words of the report ---------------------------------------------------------------------------------------


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


# --- the other files -----------------------------------------------------------------------------------------------


@forgery("files")
def an_empty_configuration_of_a_run(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("")


@forgery("files")
def a_run_with_a_pickle_beside(folder: Path) -> None:
    an_empty_configuration_of_a_run(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(PICKLE)


@forgery("pipeline.py")
def other_code_in_the_pipeline(folder: Path) -> None:
    path = folder / "pipeline.py"
    path.write_text(path.read_text() + "\nimport os\nos.system('id')\n")


@forgery("pipeline.py")
def the_pipeline_missing(folder: Path) -> None:
    (folder / "pipeline.py").unlink()


@forgery("pipeline.py", verdict=NOT_CHECKED)
def other_code_in_the_pipeline_of_a_version_that_nobody_knows(folder: Path) -> None:
    other_code_in_the_pipeline(folder)
    edit_report(folder, lambda report: report["implementation"].update(version="0.0.1"))


@forgery("model_index.json")
def a_pipeline_from_the_code_of_the_repository(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index.update(_class_name=["pipeline", "Evil"]))


@forgery("model_index.json")
def a_network_from_the_code_of_the_repository(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index.update(unet=["pipeline", "Evil"]))


@forgery("model_index.json")
def one_component_more(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index.update(safety_checker=["evil", "Evil"]))


@forgery("model_index.json")
def one_component_more_of_a_version_that_nobody_knows(folder: Path) -> None:
    edit_report(folder, lambda report: report["implementation"].update(version="0.0.1"))
    edit_json(folder / "model_index.json", lambda index: index.update(safety_checker=["evil", "Evil"]))


@forgery("model_index.json")
def a_claim_as_a_version_of_diffusers(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index.update(_diffusers_version=STRONGER))


@forgery("model_index.json")
def fewer_names_of_classes(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index["id2label"].pop("9"))
    edit_text(folder, "8, 9)", "8)")


@forgery("model_index.json")
def sampling_with_text(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index["sampling"].update(s_tmin="evil"))


@forgery("model_index.json")
def a_key_twice_in_the_index(folder: Path) -> None:
    path = folder / "model_index.json"
    path.write_text(
        path.read_text().replace('"_class_name"', '"_class_name": ["pipeline", "Evil"],\n  "_class_name"', 1)
    )


@forgery("pipe.privacy")
def one_that_is_true_in_the_index(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index["privacy"].update(private=1))


@forgery("weights")
def a_key_twice_in_the_network(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(path.read_text().replace('"act_fn"', '"act_fn": "gelu",\n  "act_fn"', 1))


@forgery("weights")
def a_network_with_code(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.update(auto_map={"AutoModel": "pipeline.Evil"}))


@forgery("weights")
def a_network_that_takes_all_day_to_build(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.update(layers_per_block=10**9))


@forgery("weights", known=True)
def a_network_of_another_kind(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.update(_class_name="UNet2DConditionModel"))


@forgery("other files (sha256)", careless=True)
def a_network_with_another_activation(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.update(act_fn="gelu"))


@forgery("other files (sha256)", careless=True)
def a_scheduler_with_another_sigma(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", lambda config: config.update(sigma_data=0.1))


@forgery("other files (sha256)", careless=True)
def another_picture(folder: Path) -> None:
    data = (folder / "samples.png").read_bytes()
    pixels = zlib.compress(bytes(9 * 9))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")]
    (folder / "samples.png").write_bytes(data[:8] + b"".join(map(png_chunk, chunks)))


def png_chunk(chunk: tuple[bytes, bytes]) -> bytes:
    kind, data = chunk
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@forgery("samples.png")
def a_picture_that_is_a_page(folder: Path) -> None:
    (folder / "samples.png").write_bytes(b"<svg onload='alert(1)'/>")


@forgery("samples.png")
def a_picture_with_a_text_in_it(folder: Path) -> None:
    data = (folder / "samples.png").read_bytes()
    (folder / "samples.png").write_bytes(data[:33] + png_chunk((b"tEXt", b"claim\0epsilon 0.1")) + data[33:])


@forgery("samples.png")
def a_picture_with_something_after_its_end(folder: Path) -> None:
    (folder / "samples.png").write_bytes((folder / "samples.png").read_bytes() + b"PK\x03\x04")


@forgery("samples.png")
def no_picture(folder: Path) -> None:
    (folder / "samples.png").unlink()


@forgery("weights (sha256)", known=True)
def other_weights(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_in.weight"] += 1e-3
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@forgery("weights", known=True)
def a_tensor_more(folder: Path) -> None:
    import torch

    save_file({**load_file(folder / WEIGHTS), "faces": torch.zeros(2, 8, 8)}, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    edit_report(folder, lambda report: report.update(weights={WEIGHTS: digest}))


@forgery("weights")
def a_tensor_twice_in_the_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    row = b'"conv_in.bias":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},'
    header = b"{" + row + data[9 : 8 + length].rstrip(b" ")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    edit_report(folder, lambda report: report.update(weights={WEIGHTS: digest}))


@forgery("weights", known=True)
def weights_under_another_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet" / "model.safetensors")


@forgery("weights", known=True)
def weights_in_parts(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")


def add_file(name: str, content: bytes = b"") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return edit


for _name, _file in {
    "a_pickle_beside_the_weights": "unet/diffusion_pytorch_model.bin",
    "another_copy_of_the_weights": "unet/diffusion_pytorch_model.fp16.safetensors",
    "a_card_in_small_letters": "readme.md",
    "a_hidden_file": ".hidden",
    "code_beside_the_network": "unet/unet.py",
    "a_module_of_the_repository": "evil.py",
    "a_card_in_another_folder": ".github/README.md",
    "a_file_among_those_of_a_download": ".cache/evil.py",
}.items():
    _edit = add_file(_file, PICKLE)
    _edit.__name__ = _name
    forgery("files", known=_file != ".cache/evil.py")(_edit)


@forgery("files")
def a_card_that_is_a_link(folder: Path) -> None:
    outside = folder.parent / "elsewhere.md"
    shutil.copyfile(folder / "README.md", outside)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(outside)


@forgery("files")
def a_folder_that_is_a_link(folder: Path) -> None:
    outside = folder.parent / "elsewhere"
    shutil.move(folder / "unet", outside)
    (outside / "diffusion_pytorch_model.bin").write_bytes(PICKLE)
    (folder / "unet").symlink_to(outside, target_is_directory=True)


@forgery("files")
def a_link_to_nowhere(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.bin").symlink_to(folder.parent / "nowhere")


@forgery("other files (sha256)", verdict=NOT_CHECKED)
def no_list_of_files_on_the_card(folder: Path) -> None:
    front, body = read_card(folder)
    write_card(folder, front, body.partition("\n## Files\n")[0])


@forgery("other files (sha256)")
def a_list_without_one_file(folder: Path) -> None:
    row = re.search(r"- `scheduler/.*\n", read_card(folder)[1])
    assert row is not None
    edit_text(folder, row[0], "")


@forgery("other files (sha256)")
def a_list_with_a_file_that_is_not_there(folder: Path) -> None:
    edit_text(folder, "- `model_index.json`", f"- `audit.json`: `{'0' * 64}`\n- `model_index.json`")


# --- datasets ------------------------------------------------------------------------------------------------------

SHARD = "data/train-00000-of-00001.parquet"


@forgery("other files (sha256)", of="dataset", careless=True)
def other_images(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"PAR1 the training images PAR1")


@forgery("files", of="dataset")
def one_file_of_images_more(folder: Path) -> None:
    shutil.copyfile(folder / SHARD, folder / "data" / "train-00001.parquet")


@forgery("files", of="dataset")
def images_in_two_ways(folder: Path) -> None:
    shutil.copyfile(folder / SHARD, folder / "data" / "train-00000-of-00002.parquet")


@forgery("files", of="dataset")
def no_images(folder: Path) -> None:
    (folder / SHARD).unlink()


@forgery("files", of="dataset")
def a_script_that_loads_it(folder: Path) -> None:
    (folder / f"{folder.name}.py").write_text("import os\nos.system('id')\n")


@forgery("files", of="dataset")
def a_model_in_the_clothes_of_a_dataset(folder: Path) -> None:
    (folder / "unet").mkdir()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(PICKLE)


@forgery("card", of="dataset")
def a_true_section_of_a_dataset_in_a_comment(folder: Path) -> None:
    edit_text(folder, section(folder), f"## Privacy\n\n{STRONGER}\n\n<!--\n{section(folder)}-->\n")


@forgery("card", of="dataset")
def a_stronger_claim_on_a_dataset(folder: Path) -> None:
    edit_text(folder, "The model drew every one of them", f"{STRONGER} The model drew every one of them")


@forgery("card", of="dataset")
def a_class_of_a_dataset_with_markup(folder: Path) -> None:
    edit_text(folder, "classes (0, 1", "classes (0 <!-- x -->, 1")


@forgery("card", of="dataset")
def a_class_of_a_dataset_that_leaves_its_quotes(folder: Path) -> None:
    edit_text(folder, "classes (0, 1", f"classes (``0`` {STRONGER} ``0``, 1")


@forgery("card", of="dataset")
def another_size_of_images(folder: Path) -> None:
    edit_text(folder, "8x8 pixels", "9x9 pixels")


@forgery("card", of="dataset")
def other_files_in_the_metadata_of_a_dataset(folder: Path) -> None:
    path = "https://evil.example/*.parquet"
    edit_metadata(folder, lambda metadata: metadata["configs"][0]["data_files"][0].update(path=path))


@forgery("card", of="dataset")
def a_model_with_another_address(folder: Path) -> None:
    edit_text(
        folder,
        "generated by a model that was trained with",
        "generated by a model, [org/faces](https://huggingface.co/evil/faces), that was trained with",
    )


@forgery("card", of="dataset")
def a_way_of_making_that_is_none(folder: Path) -> None:
    edit_text(folder, "- guidance scale: 1.0", "- guidance scale: 1.0, epsilon 0.1")


@forgery("added to the card", of="dataset", verdict=NOT_CHECKED)
def a_claim_of_the_owner_of_a_dataset(folder: Path) -> None:
    add_owners_part(folder, STRONGER)


@forgery("privacy report", of="dataset")
def a_key_twice_in_the_report_of_a_dataset(folder: Path) -> None:
    edit_report_text(folder, '"epsilon": ', '"epsilon": 0.1,\n  "epsilon": ')


@forgery("statement", of="dataset", verdict=NOT_CHECKED)
def a_dataset_of_a_version_that_nobody_knows(folder: Path) -> None:
    edit_report(folder, lambda report: report["implementation"].update(version="0.0.1"))
