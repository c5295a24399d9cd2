"""`verify` on what was shared: an honest model holds, and each edit, also of a copy, a weight or a word, does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Hub
from safetensors.torch import load_file, save_file

from dp_curriculum.cli import main
from dp_curriculum.export import MODEL_FILES, WEIGHTS, export_release
from dp_curriculum.hub import push_to_hub
from dp_curriculum.published import check_model, check_report


@pytest.fixture(scope="module")
def honest(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "model"
    export_release(finished_run, folder, repo_id="org/faces")
    return folder


@pytest.fixture
def shared(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "shared"))


def verify(*arguments: Any) -> int:
    return main(["verify", *map(str, arguments)])


def failing(folder: Path) -> list[str]:
    files = {name: folder / name for name in MODEL_FILES if (folder / name).is_file()}
    return [check.name for check in check_model(files, all_names=sorted(files)) if not check.holds]


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


def edit_card(folder: Path, change: Callable[[Any], None]) -> None:
    """Edits the YAML of the card as a person would, and leaves the text."""
    opening, block, text = (folder / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(block)
    change(metadata["differential_privacy"])
    (folder / "README.md").write_text(f"{opening}---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n{text}")


def edit_everywhere(folder: Path, change: Callable[[Any], None]) -> None:
    """As somebody edits who knows of all copies of the report."""
    edit_json(folder / "privacy.json", change)
    edit_json(folder / "model_index.json", lambda values: change(values["privacy"]))
    edit_card(folder, change)


def test_an_honest_model_holds_and_the_table_says_so(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(shared) == []
    assert verify(shared) == 0
    printed = capsys.readouterr().out
    names = ("schema", "epsilon (add-or-remove-one)", "epsilon_replace_one", "gdp_mu", "statement", "witness PRV")
    for name in (*names, "witness RDP", "card", "pipe.privacy", "weights (sha256)", "files", "all claims hold"):
        assert name in printed
    assert "FAILS" not in printed


def test_the_folder_of_a_run_holds_whatever_lies_in_it(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(finished_run) == 0
    assert verify(finished_run / "privacy.json") == 0 and verify(finished_run / "README.md") == 0
    assert "FAILS" not in capsys.readouterr().out


def raise_noise(report: Any) -> None:
    report["mechanisms"][1]["noise_multiplier"] *= 1.1


EDITS: dict[str, Callable[[Any], None]] = {
    "epsilon lowered": lambda report: report.update(epsilon=report["epsilon"] * 0.9),
    "sigma raised": raise_noise,
    "sigma as an integer": lambda report: report["mechanisms"][0].update(noise_multiplier=100),
    "a mechanism removed": lambda report: report["mechanisms"].pop(0),
    "steps changed": lambda report: report["mechanisms"][1].update(num_steps=1),
    "delta changed": lambda report: report.update(delta=1e-3),
    "mu lowered": lambda report: report.update(gdp_mu=report["gdp_mu"] * 0.9),
    "replace-one lowered": lambda report: report.update(epsilon_replace_one=report["epsilon"]),
    "target lowered": lambda report: report.update(target_epsilon=1.0),
    "group raised": lambda report: report.update(group_size=5),
    "adjacency edited": lambda report: report.update(adjacency="replace-one"),
    "statement edited": lambda report: report.update(statement=report["statement"].replace("50 %", "60 %")),
    "schema from the future": lambda report: report.update(schema_version="9.9"),
    "claim without a guarantee": lambda report: report.update(private=False),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_each_edit_of_all_copies_at_once_is_caught(edit: Callable[[Any], None], shared: Path) -> None:
    edit_everywhere(shared, edit)
    assert failing(shared) and verify(shared) == 1


PLACES = {
    "privacy.json": lambda folder: edit_json(folder / "privacy.json", raise_noise),
    "card": lambda folder: edit_card(folder, raise_noise),
    "pipe.privacy": lambda folder: edit_json(
        folder / "model_index.json", lambda values: raise_noise(values["privacy"])
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_of_one_copy_is_caught(place: str, shared: Path) -> None:
    PLACES[place](shared)
    found = failing(shared)
    assert found and (place == "privacy.json" or found == [place])


def uncheckable(report: Any) -> None:
    """A number that epsilon does not depend on."""
    report["mechanisms"][1]["clip_norm"] *= 2


@pytest.mark.parametrize("edit", [edit_card, lambda folder, change: edit_json(folder / "privacy.json", change)])
def test_numbers_that_epsilon_does_not_depend_on_are_the_same_in_all_copies(edit: Any, shared: Path) -> None:
    edit(shared, uncheckable)
    assert failing(shared)


@pytest.mark.parametrize(
    ("old", "new"),
    [("| dp-sgd |", "| dp-sgd-x |"), ("Known exactly", "Not known"), ("-differentially private", "-private")],
)
def test_an_edit_of_the_words_of_the_card_is_caught(old: str, new: str, shared: Path) -> None:
    text = (shared / "README.md").read_text()
    opening, block, body = text.split("---\n", 2)
    assert old in body
    (shared / "README.md").write_text(f"{opening}---\n{block}---\n{body.replace(old, new)}")
    assert failing(shared) == ["card"]


def test_swapped_weights_are_caught(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(shared / WEIGHTS)
    tensors["conv_in.weight"] += 1e-3
    save_file(tensors, shared / WEIGHTS, metadata={"format": "pt"})
    assert failing(shared) == ["weights (sha256)"]
    assert verify(shared) == 1
    assert "1 of 13 claims do not hold" in capsys.readouterr().out


def test_weights_that_the_report_does_not_list_are_caught(shared: Path) -> None:
    edit_everywhere(shared, lambda report: report.update(weights={}))
    assert "weights (sha256)" in failing(shared)


def test_weights_of_another_network_or_none_are_caught(shared: Path) -> None:
    edit_json(shared / "unet" / "config.json", lambda values: values.update(block_out_channels=[16]))
    assert failing(shared) == ["weights"]
    (shared / WEIGHTS).unlink()
    assert failing(shared) == ["weights"]


@pytest.mark.parametrize("name", ["README.md", "model_index.json", "unet/config.json"])
@pytest.mark.parametrize("content", [b"", b"---\n", b"\xff\xfe", b"{", b"[" * 100_000, b"---\na: &a [*a]\n---\n"])
def test_a_file_that_cannot_be_read_is_caught(name: str, content: bytes, shared: Path) -> None:
    (shared / name).write_bytes(content)
    assert len(failing(shared)) == 1


def test_a_file_that_is_missing_is_caught(shared: Path) -> None:
    for name in ("README.md", "model_index.json"):
        (shared / name).unlink()
    assert set(failing(shared)) == {"card", "model_index.json"}


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[" * 100_000])
def test_a_report_that_cannot_be_read_is_said_in_one_line(
    content: bytes, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shared / "privacy.json").write_bytes(content)
    assert verify(shared) == 2 == verify(shared / "privacy.json")
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "readable privacy report" in error


def test_what_others_wrote_does_not_reach_the_terminal_unfiltered(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_everywhere(shared, lambda report: report.update(schema_version="\x1b[2J1.0"))
    assert verify(shared) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_a_stamped_model_holds_only_in_that_it_claims_nothing(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / "run" / "privacy_ledger.jsonl").unlink()
    export_release(run, tmp_path / "shared", allow_non_private=True)
    assert failing(tmp_path / "shared") == []
    edit_everywhere(tmp_path / "shared", lambda report: report.update(private=True))
    assert failing(tmp_path / "shared") == ["schema"]


def test_mechanisms_that_cannot_be_accounted_do_not_hold(honest: Path) -> None:
    report = json.loads((honest / "privacy.json").read_text())
    report["mechanisms"][1]["mechanism"] = "subsampled-gaussian"
    assert [check.name for check in check_report(report) if not check.holds] == ["mechanisms"]


# --- from the Hub --------------------------------------------------------------------------------------------------


def test_a_repository_is_verified_without_the_machine_that_trained(
    hub: Hub, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push_to_hub(finished_run, "org/faces", private=False)
    assert verify("org/faces") == 0
    assert "all claims hold" in capsys.readouterr().out
    repository = hub.repositories[("model", "org/faces")]
    honest = repository.commits[-1][0]
    report = json.loads(repository.files["privacy.json"])
    report["epsilon"] *= 0.9
    repository.add({**repository.files, "privacy.json": json.dumps(report).encode()})
    assert verify("org/faces") == 1
    assert verify("org/faces", "--revision", honest) == 0


def malicious(shared: Path, **changes: bytes | None) -> dict[str, bytes]:
    files = {name: (shared / name).read_bytes() for name in MODEL_FILES}
    for name, content in changes.items():
        if content is None:
            del files[name]
        else:
            files[name] = content
    return files


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unet/diffusion_pytorch_model.bin": b"\x80\x02}q\x00."}, "also 'unet/diffusion_pytorch_model.bin'"),
        ({WEIGHTS: b"\x80\x02}q\x00." * 10}, "to be a safetensors file"),
        ({WEIGHTS: (2**50).to_bytes(8, "little") + bytes(100)}, "with a header of at most 10 MiB"),
        ({"../../../evil.json": b"{}"}, "also '../../../evil.json'"),
        ({"unet/../../evil.py": b"raise SystemExit"}, "also 'unet/../../evil.py'"),
        ({WEIGHTS: None}, "missing"),
    ],
    ids=["pickle beside", "pickle inside", "huge header", "traversal", "traversal inside", "no weights"],
)
def test_a_malicious_repository_is_caught_and_nothing_is_written_outside(
    changes: dict[str, Any],
    said: str,
    hub: Hub,
    shared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.put("org/evil", malicious(shared, **changes))
    before = {path for path in tmp_path.rglob("*") if "hub-cache" not in path.parts}
    assert verify("org/evil") == 1
    assert said in capsys.readouterr().out
    assert {path for path in tmp_path.rglob("*") if "hub-cache" not in path.parts} == before
    assert not any("evil.json" in request or "evil.py" in request for request in hub.requests)


def test_what_is_nowhere_is_said_in_one_line(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("org/nowhere", "no where", "nowhere.json", "a/b/c"):
        assert verify(name) == 2
    assert capsys.readouterr().err.count("\n") == 4


def test_a_hub_that_fails_is_an_error_of_the_network(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.fail("GET", "drop", times=99)
    assert verify("org/faces") == 5
    assert "the Hub could not be used" in capsys.readouterr().err
