"""Forgeries of the metadata of a card."""

from __future__ import annotations

import re
from pathlib import Path

from forgeries.tools import (
    NOT_CHECKED,
    edit_front,
    edit_metadata,
    edit_report,
    forgery,
    read_card,
    write_card,
)


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
