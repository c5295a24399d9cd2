"""`verify` on what was shared: an honest model holds, and each edit, also of a copy, a weight or a word, does not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel
from hub_server import Hub
from safetensors.torch import load_file, save_file

import dp_curriculum
from dp_curriculum import pipeline_dp_curriculum
from dp_curriculum.cli import main
from dp_curriculum.data import digits_dataset
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.runtime.hashing import hash_file
from dp_curriculum.sharing import published_files
from dp_curriculum.sharing.export import MODEL_FILES, WEIGHTS, export_release
from dp_curriculum.sharing.hub import push_to_hub
from dp_curriculum.sharing.published import check_model, check_report
from dp_curriculum.training.curriculum import run_curriculum


HASHES = "other files (sha256)"


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
    """Names of the checks that fail; of the hashes of small files only where nothing else does."""
    files = {name: folder / name for name in MODEL_FILES if (folder / name).is_file()}
    found = [check.name for check in check_model(files) if not check.holds]
    return [name for name in found if name != HASHES] or found


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
    names = ["schema", "epsilon (add-or-remove-one)", "epsilon_replace_one", "gdp_mu", "statement", "witness PRV"]
    names += ["witness RDP", "words of the report", "card", "pipe.privacy", "model_index.json", "weights (sha256)"]
    for name in (*names, "pipeline.py", "samples.png", HASHES, "files", "all claims hold"):
        assert name in printed
    assert "FAILS" not in printed


def test_the_folder_of_a_run_holds_whatever_lies_in_it(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(finished_run, "--local_run") == 0
    assert verify(finished_run / "privacy.json") == 0 and verify(finished_run / "README.md") == 0
    assert "FAILS" not in capsys.readouterr().out


def test_the_folder_of_a_run_is_one_by_a_flag_alone(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(finished_run) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line.startswith("FAILS")] == ["files"]
    assert printed[-1].endswith("also holds the files of a run: if it is your own run, add --local_run.")


def test_the_ledger_of_a_run_of_ones_own_is_checked(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for each reason that `not_private_reasons` knows, beside all that is checked of anybody's."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run-of-patients"))
    with PrivacyLedger.open(run / "run" / "privacy_ledger.jsonl") as ledger:
        ledger.reserve(GaussianEvent(1.0), stage="central-images-mean", clip_norm=1.0)
        ledger.mark_not_private("noise was fixed")
    assert verify(run / "README.md") == 0 and verify(run, "--local_run") == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS")]
    assert "noise was fixed" in rows[0] and "lists other mechanisms than its ledger" in rows[1]
    assert len(rows) == 5, "and it was not said how that was executed"
    (run / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert verify(run, "--local_run") == 1
    assert "also 'unet/diffusion_pytorch_model.bin'" in capsys.readouterr().out


def test_a_run_of_ones_own_that_claims_nothing_holds_in_that(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(non_private=True, num_inference_steps=1, sample_steps=0)
    run_curriculum(config, digits_dataset().select(range(61)), output_dir=tmp_path / "run")
    assert verify(tmp_path / "run", "--local_run") == 0
    assert "no guarantee is claimed" in capsys.readouterr().out


def test_names_of_classes_with_markup_stay_names(make_config: Any, tmp_path: Path) -> None:
    """From the columns of a dataset to the cards of a model and of a dataset, which hold and have no line more."""
    names = ["a|b", "<!-- c", "--> d\n\n## Privacy\n\nIt is (0, 0)-private.", "[e](https://evil.example)", "`f`"]
    data = digits_dataset().filter(lambda label: label < 5, input_columns="label").select(range(30))
    data = data.cast_column("label", ClassLabel(names=[*names, *"ghijk"]))
    config = make_config(num_inference_steps=1, sample_steps=0, expected_batch_size=30, num_dp_steps=1)
    run_curriculum(config, data, output_dir=tmp_path / "run")
    export_release(tmp_path / "run", tmp_path / "model", repo_id="org/letters")
    made = ["--num_images", "10", "--output_dir", str(tmp_path / "made")]
    assert main(["synthesize", str(tmp_path / "model"), *made]) == 0
    for folder in ("model", "made"):
        assert verify(tmp_path / folder) == 0
        text = (tmp_path / folder / "README.md").read_text().split("---\n", 2)[2]
        assert text.count("\n## Privacy\n") == 1 and r"`--> d\u000a\u000a## Privacy" in text


def test_a_flag_for_a_run_needs_one(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (shared, shared / "README.md", "org/faces"):
        assert verify(place, "--local_run") == 2
    assert capsys.readouterr().err.count("--local_run") == 3


def test_a_snapshot_of_the_cache_is_a_folder_like_any(shared: Path, tmp_path: Path) -> None:
    """`snapshot_download` makes links into the cache; a link to another place is no file of the repository."""
    snapshot, blobs = tmp_path / "models--org--faces" / "snapshots" / "abc", tmp_path / "models--org--faces" / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(MODEL_FILES):
        shutil.copyfile(shared / name, blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(number))
    assert verify(snapshot) == 0
    (snapshot / "samples.png").unlink()
    (snapshot / "samples.png").symlink_to(shared / "samples.png")
    assert verify(snapshot) == 1


def test_a_file_that_is_too_large_is_not_read(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (shared / "README.md").open("ab") as card:
        card.truncate(2**20 + 1)
    assert verify(shared) == 2 == verify(shared / "README.md")
    assert capsys.readouterr().err.count("Expected README.md to have at most 1,048,576 bytes") == 2


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
    assert "1 of 18 claims do not hold" in capsys.readouterr().out


def test_weights_that_the_report_does_not_list_are_caught(shared: Path) -> None:
    edit_everywhere(shared, lambda report: report.update(weights={}))
    assert "weights (sha256)" in failing(shared)


def test_weights_of_another_network_or_none_are_caught(shared: Path) -> None:
    edit_json(shared / "unet" / "config.json", lambda values: values.update(block_out_channels=[16]))
    assert failing(shared) == ["card", "weights"]  # the card tells the number of parameters
    (shared / WEIGHTS).unlink()
    assert failing(shared) == ["card", "weights", "files"]


@pytest.mark.parametrize("name", ["README.md", "model_index.json", "unet/config.json"])
@pytest.mark.parametrize("content", [b"", b"---\n", b"\xff\xfe", b"{", b"[" * 100_000, b"---\na: &a [*a]\n---\n"])
def test_a_file_that_cannot_be_read_is_caught(name: str, content: bytes, shared: Path) -> None:
    (shared / name).write_bytes(content)
    assert len(failing(shared)) == 1


def test_a_file_that_is_missing_is_caught(shared: Path) -> None:
    for name in ("README.md", "model_index.json"):
        (shared / name).unlink()
    assert set(failing(shared)) == {"card", "model_index.json", "files"}


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


def test_a_card_has_to_name_the_repository_that_it_lies_in(
    hub: Hub, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody who copies a repository, card and all, sends readers elsewhere."""
    hub.put("evil/faces", malicious(shared))
    assert verify("evil/faces") == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS")]
    assert "of evil/faces" in row and "of 'org/faces'" in row


def test_the_code_of_a_repository_is_downloaded_compared_and_never_run(
    hub: Hub, shared: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trap = tmp_path / "it-ran"
    code = f"open({str(trap)!r}, 'w')\n".encode()
    hub.put("org/faces", malicious(shared, **{"pipeline.py": code + (shared / "pipeline.py").read_bytes()}))
    assert verify("org/faces") == 1 and not trap.exists()
    failed = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS")]
    assert failed == ["pipeline.py", HASHES]
    hub.sizes["pipeline.py"] = 2**21
    assert verify("org/faces") == 2


def test_images_of_a_dataset_are_compared_by_the_hash_that_the_hub_keeps(
    hub: Hub, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["--num_images", "3", "--output_dir", str(tmp_path / "made"), "--push_to_hub", "org/numbers"]
    assert main(["synthesize", str(finished_run), *made]) == 0
    options = ("org/numbers", "--repo_type", "dataset")
    assert verify(*options) == 0
    assert not any("parquet" in request for request in hub.requests if "resolve" in request)
    repository = hub.repositories[("dataset", "org/numbers")]
    shard = "data/train-00000-of-00001.parquet"
    repository.add({**repository.files, shard: b"PAR1 the training images"})
    assert verify(*options) == 1
    assert f"'{shard}' is another" in capsys.readouterr().out
    repository.add({**repository.files, "numbers.py": b"raise SystemExit"})
    assert verify(*options) == 1
    assert "also 'numbers.py'" in capsys.readouterr().out


def test_a_released_version_is_known_by_the_hash_of_its_code(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another version's code is compared with the table of releases; its words are not checked."""
    edit_everywhere(shared, lambda report: report["implementation"].update(version="0.0.9"))
    for table, verdict in (
        ({}, "not checked"),
        ({"0.0.9": hash_file(shared / "pipeline.py")}, "holds"),
        ({"0.0.9": "0" * 64}, "FAILS"),
    ):
        monkeypatch.setattr(published_files, "released_pipelines", lambda table=table: table)
        verify(shared)
        (row,) = [line for line in capsys.readouterr().out.splitlines() if "  pipeline.py  " in line]
        assert row.startswith(verdict)


def test_the_table_of_releases_is_of_versions_and_hashes() -> None:
    """A release adds its line; what is there for this version is the file that is installed."""
    table = published_files.released_pipelines()
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in table)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in table.values())
    ours = hash_file(Path(str(pipeline_dp_curriculum.__file__)))
    assert table.get(dp_curriculum.__version__, ours) == ours


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
