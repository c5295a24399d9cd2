"""Pushing from the command line, after training or apart; and models in a process that knows nothing of the run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import torch
from hub_server import Hub

from dp_curriculum.cli import main
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.sharing.export import MODEL_FILES, model_files


TINY = [
    *("--resolution", "8", "--block_out_channels", "8"),
    *("--pretrain_steps", "2", "--pretrain_batch_size", "4", "--num_dp_steps", "2", "--expected_batch_size", "1437"),
    *("--num_inference_steps", "2", "--sample_steps", "0", "--push_to_hub", "--hub_model_id", "org/faces"),
]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run-of-patients"))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- the command ---------------------------------------------------------------------------------------------------


def test_push_exports_or_sends_or_both(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "--export_dir", str(tmp_path / "a")]) == 0
    assert files(tmp_path / "a") == set(MODEL_FILES) and not hub.requests
    both = ["--export_dir", str(tmp_path / "b"), "--repo_id", "org/faces", "--public", "--license", "mit"]
    assert main(["push", str(run), *both]) == 0
    assert f"{hub.url}/org/faces" in capsys.readouterr().out
    made = hub.repositories[("model", "org/faces")]
    assert not made.private
    assert {name: made.files[name] for name in MODEL_FILES} == {
        name: (tmp_path / "b" / name).read_bytes() for name in MODEL_FILES
    }


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "Expected --repo_id or --export_dir"),
        (["--repo_id", "other/faces"], 2, "alice may write to alice, org"),
        (["--repo_id", "a b"], 2, "Expected --repo_id=a b to be a Hub id"),
    ],
)
def test_what_cannot_be_pushed_is_said_in_one_line(
    arguments: list[str], status: int, message: str, hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), *arguments]) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_that_is_not_private_needs_the_flag(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "run" / "privacy_ledger.jsonl").unlink()
    assert main(["push", str(run), "--repo_id", "org/faces"]) == 2
    assert "its ledger is missing" in capsys.readouterr().err and not hub.repositories
    assert main(["push", str(run), "--repo_id", "org/faces", "--allow_non_private"]) == 0
    assert b"NOT PRIVATE" in hub.repositories[("model", "org/faces")].files["README.md"]


# --- after training ------------------------------------------------------------------------------------------------


def test_training_pushes_when_it_is_done(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--output_dir", str(tmp_path / "out")]) == 0
    made = hub.repositories[("model", "org/faces")]
    assert set(made.files) == {*model_files(["prior"]), ".gitattributes"} and made.private
    assert f"pushed to     {hub.url}/org/faces" in capsys.readouterr().out
    assert main(["verify", "org/faces"]) == 0


@pytest.mark.parametrize("token", [None, hub_server.READ_TOKEN, hub_server.OTHER_TOKEN])
def test_a_token_that_may_not_write_is_found_before_training(
    token: str | None, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert main(["train", *TINY, "--output_dir", str(tmp_path / "out")]) == 2
    assert "Refusing to push to org/faces" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_noise_is_not_trained_for_sharing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TINY, "--non_private", "--output_dir", str(tmp_path / "out")]) == 2
    assert "Refusing to push a model of --non_private" in capsys.readouterr().err and not hub.requests


def test_a_push_that_fails_after_training_leaves_the_result_and_says_how_to_go_on(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("POST .*/commit/", "drop", times=99)
    out = tmp_path / "out"
    assert main(["train", *TINY, "--output_dir", str(out)]) == 5
    error = capsys.readouterr().err
    line = f"dp-curriculum push {out} --repo_id org/faces"
    assert line in error and DPCurriculumPipeline.from_pretrained(out).privacy["private"]
    hub.faults.clear()
    assert main(line.split()[1:]) == 0
    assert set(hub.repositories[("model", "org/faces")].files) == {*model_files(["prior"]), ".gitattributes"}


# --- in a fresh process --------------------------------------------------------------------------------------------

_SAMPLE = """
import json, sys, torch
pipe.set_progress_bar_config(disable=True)
images = pipe(class_labels=[3, 3, 7], generator=torch.Generator().manual_seed(5), output_type="pt").images
own = sys.modules.get("dp_curriculum") is not None
print("found", json.dumps({"images": images.tolist(), "privacy": pipe.privacy, "own": own}))
"""
_HIDE = "import sys; sys.modules['dp_curriculum'] = None  # as if it were not installed\n"
_LOCAL = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("exported", custom_pipeline="exported/pipeline.py", trust_remote_code=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False], ids=["with this package", "without this package"])
def test_each_snippet_of_the_card_loads_the_model_that_was_trained(
    installed: bool, hub: Hub, finished_run: Path, tmp_path: Path
) -> None:
    """In a new process with an empty cache: the same images for the same generator, and the report."""
    export = ["--export_dir", str(tmp_path / "exported")]
    assert main(["push", str(finished_run), "--repo_id", "org/faces", *export]) == 0
    card = hub.repositories[("model", "org/faces")].files["README.md"].decode()
    ours, without, copied = (block.split("```")[0] for block in card.split("```python\n")[1:])
    assert "trust_remote_code" not in ours + copied
    code = [ours, _SAMPLE, copied, _SAMPLE] if installed else [_HIDE, without, _SAMPLE, _LOCAL, _SAMPLE]
    done = subprocess.run(
        [sys.executable, "-c", "".join(code)],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line.removeprefix("found ")) for line in done.stdout.splitlines() if line.startswith("found ")]
    assert [one["own"] for one in found] == [installed] * 2
    pipe = DPCurriculumPipeline.from_pretrained(finished_run)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[3, 3, 7], generator=torch.Generator().manual_seed(5), output_type="pt").images
    for one in found:
        assert torch.equal(torch.tensor(one["images"]), images)
        assert one["privacy"] == pipe.privacy == json.loads((finished_run / "privacy.json").read_text())
