"""The corpus of forgeries: none ends in "all claims hold", and the untouched model and dataset do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forgeries import FORGERIES, REFUSED, Forgery, relist

from dp_curriculum.cli import main
from dp_curriculum.privacy import witnesses
from dp_curriculum.sharing.export import export_release


@pytest.fixture(scope="module")
def good(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and a dataset as they are shared."""
    folder = tmp_path_factory.mktemp("good")
    export_release(finished_run, folder / "model", repo_id="org/faces")
    made = ["--num_images", "3", "--output_dir", str(folder / "dataset")]
    assert main(["synthesize", str(folder / "model"), *made]) == 0
    return {"model": folder / "model", "dataset": folder / "dataset"}


@pytest.fixture(autouse=True, scope="module")
def _each_witness_is_asked_once() -> Iterator[None]:
    """Most forgeries leave the mechanisms alone, and a witness takes half of the time of a verification."""
    ask, known = witnesses._epsilon_of, {}

    def ask_once(accountant: Any, events: Any, delta: float) -> float | None:
        question = (type(accountant), tuple(events), delta)
        if question not in known:
            known[question] = ask(accountant, events, delta)
        return known[question]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(witnesses, "_epsilon_of", ask_once)
        yield


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_nobody_touched_holds(kind: str, good: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Also with its hashes written anew, as the corpus does: that changes nothing."""
    before = (good[kind] / "README.md").read_bytes()
    relist(good[kind])
    assert (good[kind] / "README.md").read_bytes() == before
    assert main(["verify", str(good[kind])]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("\nall claims hold\n") and "FAILS" not in printed and "not checked" not in printed


@pytest.mark.parametrize("forged", FORGERIES, ids=lambda forged: forged.name)
def test_a_forgery_is_noticed_by_the_check_that_is_there_for_it(
    forged: Forgery, good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(good[forged.of], tmp_path / "shared"))
    forged.edit(folder)
    if not forged.careless:
        relist(folder)
    status = main(["verify", str(folder)])
    printed, error = capsys.readouterr()
    assert "all claims hold" not in printed
    if forged.verdict == REFUSED:
        assert status == 2 and error.count("\n") == 1
        return
    rows = [line for line in printed.splitlines() if line.startswith(forged.verdict)]
    assert any(line.removeprefix(forged.verdict).strip().startswith(f"{forged.check}  ") for line in rows), printed
    assert status == (1 if any(line.startswith("FAILS") for line in printed.splitlines()) else 3)


ELSEWHERE = {
    "other_classes_than_those_of_the_model",
    "another_network_among_the_facts",
    "another_sampler_among_the_facts",
}
ON_THE_CARD = [
    forged for forged in FORGERIES if forged.of == "model" and forged.check == "card" and forged.verdict == "FAILS"
]


@pytest.mark.parametrize("forged", ON_THE_CARD, ids=lambda forged: forged.name)
def test_a_forged_card_does_not_hold_by_itself_either(
    forged: Forgery, good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the files beside it, but for what they alone know."""
    folder = Path(shutil.copytree(good["model"], tmp_path / "shared"))
    forged.edit(folder)
    status = main(["verify", str(folder / "README.md")])
    assert (status == 0) == (forged.name in ELSEWHERE), capsys.readouterr().out
    assert status == 0 or "all claims hold" not in capsys.readouterr().out


def test_the_corpus_is_as_large_as_it_was() -> None:
    """It grows: a forgery that was found once stays."""
    assert len(FORGERIES) >= 180 and len({forged.name for forged in FORGERIES}) == len(FORGERIES)
