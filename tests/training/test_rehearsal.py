"""The end of a run is tried before it begins: what cannot be written is refused when nothing is spent yet."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from dp_curriculum import cli
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.sharing import release
from dp_curriculum.training import finishing, rehearsal
from dp_curriculum.training.curriculum import run_curriculum
from dp_curriculum.training.rehearsal import rehearse_release
from dp_curriculum.training.run import Run


MakeConfig = Callable[..., CurriculumConfig]
ODD = os.fsdecode(b"caf\xe9")  # Latin-1: a folder of an old archive
FLAGS = [
    "--resolution", "8", "--num_channels", "1", "--block_out_channels", "8",
    "--pretrain_steps", "2", "--pretrain_batch_size", "4", "--expected_batch_size", "4", "--num_dp_steps", "2",
    "--num_inference_steps", "1", "--target_delta", "1e-3",
]  # fmt: skip


@pytest.fixture
def rows() -> datasets.Dataset:
    return digits_dataset().select(range(30))


@pytest.fixture
def config(make_config: MakeConfig) -> CurriculumConfig:
    return make_config(num_inference_steps=1, expected_batch_size=30, sample_steps=0)


def image_folder(root: Path, names: list[str]) -> Path:
    for name in names:
        try:
            (root / name).mkdir(parents=True)
        except OSError:
            pytest.skip("this file system has UTF-8 names only")
        for index in range(3):
            Image.new("L", (8, 8), 40 * index).save(root / name / f"{index}.png")
    return root


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- names that no text can hold -----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["cat", ODD], [ODD, *(f"class-{index:02d}" for index in range(24))]], ids=len)
def test_a_class_folder_whose_name_is_no_utf_8_is_refused_before_anything_is_spent(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two classes, and more than a card names one by one."""
    data, out = image_folder(tmp_path / "data", names), tmp_path / "out"
    status = cli.main(["train", *FLAGS, "--train_data_dir", str(data), "--output_dir", str(out)])
    errors = capsys.readouterr().err.splitlines()
    assert status == cli.USAGE_ERROR and not out.exists()
    assert "Expected the class name 'caf\\udce9' to be UTF-8" in errors[-1] and "rename the folder" in errors[-1]


def test_another_text_that_is_no_utf_8_is_refused_too(config: CurriculumConfig, rows: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"the run would write '\\udce9', which is not UTF-8"):
        run_curriculum(config.replace(hub_model_id=ODD), rows, output_dir=out)
    assert not out.exists()


@pytest.mark.parametrize(
    "name", ["Katze, groß", 'quote\'s "both"', "{braces}", "a: b # c", "日本", "-", "null", "e\u0301"]
)
def test_odd_names_that_are_utf_8_are_written_and_read_back(name: str, tmp_path: Path) -> None:
    data, out = image_folder(tmp_path / "data", [name, "plain"]), tmp_path / "out"
    args = ["train", *FLAGS, "--stages", "mean", "--train_data_dir", str(data), "--output_dir", str(out)]
    assert cli.main(args) == 0
    assert name in (out / "README.md").read_text(encoding="utf-8")


def test_a_dataset_may_lie_in_a_folder_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    data, out = image_folder(tmp_path / ODD / "data", ["cat", "dog"]), tmp_path / "out"
    args = [*FLAGS, "--stages", "mean", "--train_data_dir", str(data), "--output_dir", str(out)]
    assert cli.main(["train", *args]) == 0
    assert CurriculumConfig.from_yaml(out / "run" / "config.yaml").data.train_data_dir == str(data)


def test_a_run_in_a_folder_whose_name_is_no_utf_8_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ODD
    status = cli.main(["train", *FLAGS, "--output_dir", str(out)])
    assert status == cli.USAGE_ERROR and not out.exists()
    assert "caf\\udce9' to be UTF-8" in capsys.readouterr().err.splitlines()[-1]


def test_a_path_that_is_no_utf_8_is_told_escaped() -> None:
    """In a process of its own, whose standard output is real: what is told last must not fail."""
    program = "import sys; from dp_curriculum import cli; cli.main([]); print(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, ODD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("caf\\udce9\n"), done.stderr


# --- whatever else fails at the end --------------------------------------------------------------------------------


def broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("this card cannot be rendered")


@pytest.mark.parametrize(
    ("module", "name"),
    [(release, "render_card"), (finishing, "report_text"), (finishing, "hash_weights"), (release, "PrivacyReport")],
)
def test_what_fails_at_the_end_fails_before_the_ledger_is_opened(
    module: Any, name: str, config: CurriculumConfig, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, broken)
    with pytest.raises((RuntimeError, AttributeError)):
        run_curriculum(config, rows, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_for_the_weights_is_told_before_anything_is_spent(
    config: CurriculumConfig, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dp_curriculum.pipeline_dp_curriculum.DPCurriculumPipeline.save_pretrained", full)
    with pytest.raises(OSError, match=f"No space left on device.*{tmp_path / 'out'}"):
        run_curriculum(config, rows, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.replace("group_size: 1", "group_size: 2"),
        lambda card: card.replace("group_size:", "group_size: : :"),
        lambda card: card.replace("---", "+++"),
    ],
    ids=["another value", "no YAML", "no metadata"],
)
def test_a_card_that_reads_back_as_another_is_refused(
    change: Callable[[str], str],
    config: CurriculumConfig,
    rows: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    render = release.render_card

    def wrong(*args: Any, **kwargs: Any) -> str:
        return change(render(*args, **kwargs))

    monkeypatch.setattr(release, "render_card", wrong)
    with pytest.raises(ValueError, match="Refusing to train: README.md would not read back"):
        run_curriculum(config, rows, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_refusal_leaves_the_run_that_was_to_be_replaced(
    config: CurriculumConfig, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_curriculum(config, rows, output_dir=tmp_path / "out")
    before = everything(tmp_path / "out")
    monkeypatch.setattr(release, "render_card", broken)
    for options in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(RuntimeError, match="cannot be rendered"):
            run_curriculum(config, rows, output_dir=tmp_path / "out", **options)
        assert everything(tmp_path / "out") == before


# --- a rehearsal is no run -----------------------------------------------------------------------------------------


def test_the_rehearsal_writes_what_the_run_does_and_leaves_nothing(
    config: CurriculumConfig, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsed: list[set[str]] = []

    def watched(run: Run) -> None:
        unet = run.unet
        state, random = {name: value.clone() for name, value in unet.state_dict().items()}, torch.get_rng_state()
        training = unet.training
        rehearse_release(run)
        assert unet.training == training and torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
        assert not run.folder.root.exists() and run.ledger is None

    def read_back(config: Any, scratch: RunFolder, *args: Any) -> None:
        rehearsed.append({name for name in everything(scratch.root) if not name.startswith("run/")})
        check(config, scratch, *args)

    check = rehearsal._read_back
    monkeypatch.setattr(rehearsal, "_read_back", read_back)
    monkeypatch.setattr("dp_curriculum.training.curriculum.rehearse_release", watched)
    result = run_curriculum(config, rows, output_dir=tmp_path / "out")
    left = {name for name in everything(tmp_path / "out") if not name.startswith("run/")}
    assert rehearsed == [left - {"samples.png", "lesson_mean.png"}]
    with PrivacyLedger.open(result.ledger, create=False) as ledger:
        assert [row["num_steps"] for row in ledger.mechanisms] == [1, 4], "charged once"


@pytest.mark.parametrize(
    "fields", [{"non_private": True}, {"stages": ["mean"]}, {"stages": ["dp_sgd"], "public_dataset_size": 64}], ids=str
)
def test_runs_of_each_kind_pass_it(fields: dict[str, Any], make_config: MakeConfig, rows: Any, tmp_path: Path) -> None:
    config = make_config(num_inference_steps=1, sample_steps=0, **fields)
    assert run_curriculum(config, rows, output_dir=tmp_path / "out").finished


# --- and at the end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "privacy.json", "model_index.json"])
def test_a_file_that_cannot_be_written_at_the_end_is_not_left_empty(
    name: str, config: CurriculumConfig, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up after the rehearsal, in the middle of a file: the old one stays, and resuming writes it."""
    out = tmp_path / "out"
    run_curriculum(config, rows, output_dir=out)
    before, write = everything(out), open

    def half(path: Path, text: str, **options: Any) -> None:
        with write(path, "w", **options) as file:
            file.write(text[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(self: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        half(Path(folder) / "model_index.json", "{" * 20)

    def write_text(path: Path, text: str, **options: Any) -> None:
        half(path, text, **options) if path.name == name else write(path, "w", **options).write(text)

    def strike() -> None:
        monkeypatch.setattr("dp_curriculum.training.curriculum.rehearse_release", lambda run: None)
        monkeypatch.setattr(Path, "write_text", write_text)
        if name == "model_index.json":
            monkeypatch.setattr("dp_curriculum.pipeline_dp_curriculum.DPCurriculumPipeline.save_config", fail)

    strike()
    with pytest.raises(OSError, match=str(out)):
        run_curriculum(config, rows, output_dir=out, resume_from_checkpoint="latest")
    monkeypatch.undo()
    after = everything(out)
    assert {key for key in before if after[key] != before[key]} <= {"run/config.yaml", "run/privacy_ledger.jsonl.head"}
    assert run_curriculum(config, rows, output_dir=out, resume_from_checkpoint="latest").finished
