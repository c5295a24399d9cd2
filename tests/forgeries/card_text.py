"""Forgeries of what people read on a card."""

from __future__ import annotations

import re
from pathlib import Path

from forgeries.tools import (
    NOT_CHECKED,
    STRONGER,
    add_owners_part,
    edit_json,
    edit_metadata,
    edit_report,
    edit_text,
    forgery,
    read_card,
    section,
    write_card,
)


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
    edit_text(folder, "12,249 parameters", "12,250 parameters")


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


def measure(folder: Path, name: str, data: str) -> None:
    """A number in the metadata and in a table, as `evaluate` would have it there."""
    metric = {"type": name, "name": f"{name}: {data}", "value": 0.1}
    result = {
        "task": {"type": "unconditional-image-generation"},
        "dataset": {"name": "org/faces", "type": "org/faces"},
        "metrics": [metric],
    }
    edit_report(folder, lambda report: report["protected_dataset"].update(name="org/faces"))
    index = [{"name": "org/faces", "results": [result]}]
    edit_metadata(folder, lambda metadata: metadata.update({"datasets": ["org/faces"], "model-index": index}))
    table = "\n## Measured\n\nWithout a look at a training image.\n\n| | value | data |\n|---|---|---|\n"
    edit_text(folder, "\n## Files\n", f"{table}| {name} | 0.1 | {data} |\n\n## Files\n")


@forgery("card")
def epsilon_among_the_measured_numbers(folder: Path) -> None:
    measure(folder, "epsilon", "trained on 60 generated images, tested on 300 of faces (test)")


@forgery("card")
def a_claim_in_what_a_number_was_measured_on(folder: Path) -> None:
    measure(folder, "fid", "300 of faces (test), so that epsilon is 0.1")


@forgery("card")
def digits_of_another_script_among_the_facts(folder: Path) -> None:
    edit_text(folder, "- lesson mean: 2 steps", "- lesson mean: \u0662 steps")


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
