"""
Forty-two inputs that are wrong, hostile or unlucky: where each is tested, and those that are tested nowhere else.

A command ends with a documented status (2 usage, 4 budget or ledger, 5 storage or network, 130 interrupted), in one
line without traceback, and nothing is spent before all that can be refused was refused.
"""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy import hash_chain
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime import checkpointing
from dp_curriculum.training.curriculum import run_curriculum


HERE = Path(__file__).parents[1]

# Input -> tests, as file::test; no file is this one.
WHERE: dict[str, tuple[str, ...]] = {
    "B1 modes of pictures": ("data/test_decoding::test_grey_and_colour_are_converted_to_the_declared_channels",),
    "B2 sizes": ("data/test_decoding::test_other_sizes_are_cropped_to_the_middle_and_resized",),
    "B3 corrupt pictures": (
        "data/test_reading::test_an_unreadable_row_contributes_nothing_and_is_not_seen",
        "test_bad_rows_change_nothing_but_noise",
    ),
    "B4 decompression bombs": ("data/test_reading::test_an_unreadable_row_contributes_nothing_and_is_not_seen",),
    "B5 16 bits, floats, out of range, NaN": (
        "data/test_decoding::test_sixteen_bit_and_float_images_are_scaled_and_bounded",
        "data/test_reading::test_float_images_are_bounded_whatever_they_hold",
    ),
    "B6 EXIF, animations": (
        "data/test_decoding::test_exif_orientation_is_applied",
        "data/test_decoding::test_the_first_frame_of_an_animation_is_the_image",
    ),
    "B7 missing label": ("data/test_reading::test_a_missing_or_unknown_label_contributes_nothing_and_stops_nothing",),
    "B8 label out of range": (
        "data/test_reading::test_a_missing_or_unknown_label_contributes_nothing_and_stops_nothing",
    ),
    "B9 empty class": (
        "lessons/test_central_images::test_an_empty_class_releases_noise_like_any_other",
        "test_bad_rows_change_nothing_but_noise",
    ),
    "B10 one image": ("test_one_image_or_none_is_a_run_like_any_other",),
    "B11 no image": (
        "test_one_image_or_none_is_a_run_like_any_other",
        "training/test_curriculum::test_what_is_refused_is_refused_before_anything_is_written",
    ),
    "B12 several images of a person": (
        "privacy/test_accounting::test_a_group_of_images_has_the_delta_of_a_binomial_mixture",
        "training/test_finishing::test_several_images_of_a_person_are_covered_only_where_asked",
        "data/test_persons::test_a_column_of_another_type_is_refused_by_its_type_alone",
        "data/test_persons::test_values_of_json_lines_speak_for_themselves_alone",
        "data/test_persons::test_one_person_and_none_are_refused_and_nothing_of_a_row_is_said",
        "training/test_person_runs::test_a_run_is_not_resumed_with_other_persons",
    ),
    "B13 a stream": ("data/test_sources::test_a_streaming_dataset_of_the_caller_is_refused",),
    "B14 lessons spend the target": (
        "commands/test_cli::test_too_small_a_budget_names_what_is_spent_and_the_smallest_that_is_feasible",
    ),
    "B15 epsilon": ("commands/test_cli::test_bad_input_ends_in_one_line_and_spends_nothing",),
    "B16 delta": (
        "commands/test_cli::test_bad_input_ends_in_one_line_and_spends_nothing",
        "commands/test_cli::test_a_large_delta_is_warned_about",
    ),
    "B17 no noise, no bound": (
        "training/test_config::test_a_value_out_of_range_is_refused_with_flag_value_and_what_to_do",
        "training/test_curriculum::test_training_without_noise_is_stamped_not_private",
    ),
    "B18 batch above the dataset": (
        "commands/test_cli::test_bad_input_ends_in_one_line_and_spends_nothing",
        "test_a_batch_of_all_images_is_taken_and_one_of_a_single_image_too",
    ),
    "B19 mostly empty draws": ("test_a_batch_of_all_images_is_taken_and_one_of_a_single_image_too",),
    "B20 no copies, no steps": (
        "training/test_config::test_a_value_out_of_range_is_refused_with_flag_value_and_what_to_do",
        "test_what_cannot_be_is_refused_in_one_line",
    ),
    "B21 layers that mix images": (
        "dp_sgd/test_per_image_gradients::test_layers_that_mix_images_are_refused_by_name",
        "dp_sgd/test_per_image_gradients::test_weight_used_outside_of_its_layer_is_refused_by_name",
    ),
    "B22 channels and resolution of the model": (
        "commands/test_cli::test_bad_input_ends_in_one_line_and_spends_nothing",
    ),
    "B23 number of classes": ("test_what_cannot_be_is_refused_in_one_line",),
    "B24 labels at sampling": (
        "commands/test_cli::test_bad_sampling_is_refused",
        "diffusion/test_pipeline_dp_curriculum::test_bad_arguments_are_refused_with_the_valid_range",
    ),
    "B25 no, odd and many samples": (
        "commands/test_cli::test_bad_sampling_is_refused",
        "diffusion/test_pipeline_dp_curriculum::test_odd_batches_are_served",
        "sharing/test_synthetic_dataset::test_no_more_rows_are_held_than_a_group",
    ),
    "B26 disk full at a checkpoint": (
        "runtime/test_checkpointing::test_a_failed_save_leaves_the_old_checkpoint_and_no_litter",
        "test_a_full_disk_at_a_checkpoint_can_be_gone_on_from",
    ),
    "B27 disk full at the ledger": (
        "privacy/test_ledger::test_a_full_disk_stops_the_step_and_leaves_a_ledger_that_opens",
        "test_a_full_disk_at_the_ledger_stops_before_the_step",
    ),
    "B28 killed while saving": (
        "runtime/test_checkpointing::test_a_killed_save_leaves_the_old_or_the_new_checkpoint",
        "privacy/test_ledger::test_a_kill_at_any_moment_charges_what_was_acknowledged_and_at_most_one_block_more",
    ),
    "B29 damaged checkpoint": (
        "runtime/test_checkpointing::test_a_damaged_checkpoint_is_named_and_passed_over",
        "runtime/test_checkpointing::test_any_flipped_bit_is_noticed",
    ),
    "B30 checkpoint of another run": (
        "training/test_curriculum::test_resume_refuses_another_mechanism_and_takes_another_runtime",
        "test_what_does_not_belong_to_the_run_is_refused_and_nothing_is_charged",
    ),
    "B31 ledger tampered with": (
        "privacy/test_ledger::test_a_ledger_that_is_not_as_it_was_written_is_refused",
        "test_what_does_not_belong_to_the_run_is_refused_and_nothing_is_charged",
    ),
    "B32 two processes on a ledger": (
        "privacy/test_ledger::test_a_ledger_is_held_by_one_handle_and_one_process",
        "test_a_ledger_that_is_open_elsewhere_is_refused",
    ),
    "B33 other number of processes": (
        "runtime/test_processes::test_a_run_spends_the_same_on_one_two_and_three_processes_and_may_change_their_number",
    ),
    "B34 a process dies": (
        "runtime/test_processes::test_a_killed_process_ends_the_others_with_one_line_and_stays_charged",
        "runtime/test_processes::test_a_process_that_falls_silent_is_missed",
    ),
    "B35 no right to push": (
        "commands/test_commands_push::test_a_token_that_may_not_write_is_found_before_training",
        "commands/test_commands_push::test_a_push_that_fails_after_training_leaves_the_result_and_says_how_to_go_on",
    ),
    "B36 network lost while pushing": (
        "sharing/test_hub::test_a_network_that_stays_lost_leaves_no_commit_and_the_next_push_succeeds",
    ),
    "B37 push of a run that is not private": (
        "sharing/test_hub::test_a_run_that_is_not_private_sends_nothing",
        "sharing/test_export::test_a_run_that_is_not_private_is_refused_or_stamped",
    ),
    "B38 malicious repository": (
        "sharing/test_published::test_a_malicious_repository_is_caught_and_nothing_is_written_outside",
        "runtime/test_checkpointing::test_a_file_that_the_manifest_does_not_list_is_never_read",
    ),
    "B39 fp16": (
        "commands/test_cli::test_bad_input_ends_in_one_line_and_spends_nothing",
        "runtime/test_processes::test_a_launch_that_breaks_the_guarantee_is_refused_by_name",
    ),
    "B40 no GPU": ("test_an_awkward_machine_is_no_obstacle",),
    "B41 clock, home, names, links": ("test_an_awkward_machine_is_no_obstacle",),
    "B42 Ctrl-C, twice": (
        "runtime/test_stopping::test_the_first_signal_asks_for_a_stop_and_the_second_interrupts",
        "test_interrupts_leave_a_ledger_that_covers_what_was_taken",
    ),
}


def test_each_input_is_tested_where_the_table_says() -> None:
    assert [name.split()[0] for name in WHERE] == [f"B{number}" for number in range(1, 43)]
    defined: dict[str, set[str]] = {}
    for places in WHERE.values():
        for place in places:
            file, _, name = place.rpartition("::")
            file = file or f"system/{Path(__file__).stem}"
            if file not in defined:
                tree = ast.parse((HERE / f"{file}.py").read_text(encoding="utf-8"))
                defined[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in defined[file], place


# --- runs ------------------------------------------------------------------------------------------------------------

TINY = {
    "num_channels": 1,
    "resolution": 8, "block_out_channels": [8], "pretrain_steps": 2, "pretrain_batch_size": 4,
    "num_dp_steps": 4, "expected_batch_size": 61, "public_dataset_size": 61,
    "num_inference_steps": 2, "sample_steps": 0, "checkpointing_steps": 2, "noise_multiplicity": 2, "seed": 0,
}  # fmt: skip


@pytest.fixture
def config() -> CurriculumConfig:
    return CurriculumConfig().replace(**TINY)


def flags(**fields: Any) -> list[str]:
    values = {**TINY, **fields}
    pairs = ([f"--{name}", *map(str, value if isinstance(value, list) else [value])] for name, value in values.items())
    return [word for pair in pairs for word in pair]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve pictures of two classes."""
    folder, source = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
        for row in range(6):
            Image.fromarray(source.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name / f"{row}.png")
    return folder


@pytest.fixture
def train(pictures: Path) -> Callable[..., int]:
    """Runs the command on the pictures; returns its status."""

    def run(out: Path, *arguments: str, **fields: Any) -> int:
        source = ["--train_data_dir", str(pictures), "--num_channels", "1", "--output_dir", str(out)]
        return main(["train", *flags(**fields), *source, *arguments])

    return run


@pytest.fixture
def one_line(capfd: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Checks that the last command ended in one line of error with these words, and in no traceback."""

    def check(words: str) -> None:
        error = capfd.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("dp-curriculum: error:")]
        assert len(lines) == 1 and words in lines[0], error[-500:]
        assert "Traceback" not in error

    return check


def charged(out: Path) -> int:
    """Steps of DP-SGD in the ledger."""
    with PrivacyLedger.open(RunFolder(out).ledger, create=False) as opened:
        return sum(row["num_steps"] for row in opened.mechanisms if row["name"] == "dp-sgd")


def report(out: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(RunFolder(out).privacy.read_text())
    del fields["weights"]  # hashes of noise
    return fields


def files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_classes": 7}, "--num_classes=7"),
        ({"num_dp_steps": 0}, "--num_dp_steps=0"),
        ({"num_dp_steps": -3}, "--num_dp_steps=-3"),
        ({"noise_multiplicity": -1}, "--noise_multiplicity=-1"),
        ({"expected_batch_size": 0}, "--expected_batch_size=0"),
        ({"dp_max_grad_norm": "inf"}, "--dp_max_grad_norm=inf"),
        ({"dp_max_grad_norm": 0}, "--dp_max_grad_norm=0"),
        ({"target_delta": -0.1}, "--target_delta=-0.1"),
        ({"target_epsilon": "nan"}, "--target_epsilon=nan"),
        ({"seed": "a"}, "--seed"),
        ({"stages": ["mean", "mean"]}, "--stages="),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    fields: dict[str, Any], words: str, tmp_path: Path, train: Callable[..., int], one_line: Callable[[str], None]
) -> None:
    assert train(tmp_path / "out", **fields) == 2
    one_line(words)
    assert not (tmp_path / "out").exists()


# --- rows ------------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def dataset(pictures: list[bytes | None], labels: list[int | None]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    images = [None if picture is None else {"bytes": picture, "path": None} for picture in pictures]
    columns = {"image": images, "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)


def bad_rows() -> datasets.Dataset:
    """Every kind of bad row, and no row of the last class."""
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures: list[bytes | None] = [
        *(encoded(grey.convert(mode), "TIFF") for mode in ("1", "P", "RGB", "RGBA", "CMYK", "LA", "I;16", "F")),
        encoded(grey.resize((100, 3))),
        encoded(grey, "JPEG", exif=exif),
        encoded(grey, "GIF", save_all=True, append_images=[grey.rotate(90)]),
        encoded(grey)[:60],
        b"\x80\x04cos\nsystem\n",
        b"",
        None,
    ]
    labels: list[int | None] = [0, 1] * 20
    return dataset([*pictures, *[encoded(grey)] * 4], [*labels[: len(pictures)], None, -1, 0, 1])


def test_bad_rows_change_nothing_but_noise(
    config: CurriculumConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same report, files and lines as from as many good rows of all classes."""
    rows = bad_rows()
    good = dataset(
        [encoded(Image.new("L", (8, 8), 128))] * len(rows), [0, 1, 2] * (len(rows) // 3) + [0] * (len(rows) % 3)
    )
    seen = []
    for name, source in (("bad", rows), ("good", good)):
        run_curriculum(config, source, output_dir=tmp_path / name)
        lines = capfd.readouterr()
        seen.append((report(tmp_path / name), files(tmp_path / name), lines.out))
        assert "rror" not in lines.err and "arning" not in lines.err
    assert seen[0] == seen[1]


def test_one_image_or_none_is_a_run_like_any_other(config: CurriculumConfig, tmp_path: Path) -> None:
    """Where the number of images is declared. Where it is not, an empty dataset is refused."""
    seen = []
    for count in (0, 1, 30):
        out = tmp_path / str(count)
        result = run_curriculum(config, digits_dataset().select(range(count)), output_dir=out)
        assert result.finished and len(result.pipeline(batch_size=2).images) == 2
        seen.append((report(out), files(out)))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("batch", [61, 1])
def test_a_batch_of_all_images_is_taken_and_one_of_a_single_image_too(
    batch: int, config: CurriculumConfig, tmp_path: Path
) -> None:
    """A third of the draws of one expected image are empty. Less than one cannot be asked for."""
    result = run_curriculum(
        config.replace(expected_batch_size=batch, stages=["dp_sgd"], num_dp_steps=2),
        digits_dataset().select(range(61)),
        output_dir=tmp_path / "out",
    )
    (mechanism,) = result.report.fields["mechanisms"]
    assert (mechanism["sample_rate"], mechanism["num_steps"]) == (batch / 61, 2) and result.report.epsilon <= 10


# --- storage, ledger and interruptions -------------------------------------------------------------------------------


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_a_checkpoint_can_be_gone_on_from(
    tmp_path: Path, train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, one_line: Callable[[str], None]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_file", full_disk)
        assert train(out) == 5
    one_line("No space left on device")
    assert charged(out) == 2 and not list(RunFolder(out).checkpoints.glob("*"))
    assert train(out, "--resume_from_checkpoint", "latest") == 0
    assert charged(out) == 4 and report(out)["epsilon"] <= 10


def test_a_full_disk_at_the_ledger_stops_before_the_step(
    tmp_path: Path, train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, one_line: Callable[[str], None]
) -> None:
    out, steps, lines, write = tmp_path / "out", [], [], hash_chain._write_all

    def write_until_full(fd: int, data: bytes) -> None:
        lines.extend([data] * (b'"dp-sgd"' in data))
        if len(lines) > 1:  # the first is that of the rehearsal
            full_disk()
        write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(DPTrainer, "step", lambda self: steps.append(1))
        patch.setattr(hash_chain, "_write_all", write_until_full)
        assert train(out) == 5
    one_line("No space left on device")
    assert not steps and charged(out) == 0
    assert train(out, "--resume_from_checkpoint", "latest") == 0 and charged(out) == 4


def edited_ledger(out: Path) -> None:
    path = RunFolder(out).ledger
    path.write_text(path.read_text().replace('"num_steps": 2', '"num_steps": 1', 1))


def older_ledger(out: Path) -> None:
    path = RunFolder(out).ledger
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))


def no_ledger(out: Path) -> None:
    for path in RunFolder(out).ledger.parent.glob("privacy_ledger*"):
        path.unlink()


def torn_config(out: Path) -> None:
    RunFolder(out).config.write_text("privacy: {target_epsilon")


@pytest.mark.parametrize(
    ("change", "fields", "status", "words"),
    [
        (edited_ledger, {}, 4, "was edited at line"),
        (older_ledger, {}, 4, "was cut short or replaced by an older copy"),
        (no_ledger, {}, 4, "is missing"),
        (torn_config, {}, 2, "to be YAML"),
        (None, {"dp_max_grad_norm": 0.5}, 2, "--dp_max_grad_norm=0.5 to be 0.001"),
        (None, {"target_epsilon": 20}, 2, "--target_epsilon=20.0 to be 10.0"),
    ],
)
def test_what_does_not_belong_to_the_run_is_refused_and_nothing_is_charged(
    change: Callable[[Path], None] | None, fields: dict[str, Any], status: int, words: str, tmp_path: Path,
    train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, one_line: Callable[[str], None],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert train(out) == 0
    if change is not None:
        change(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(DPTrainer, "step", lambda self: pytest.fail("a step was taken"))
    assert train(out, "--resume_from_checkpoint", "latest", **fields) == status
    one_line(words)
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if not path.name.endswith(".lock")} == {
        path: content for path, content in before.items() if not path.name.endswith(".lock")
    }


def test_a_ledger_that_is_open_elsewhere_is_refused(
    tmp_path: Path, train: Callable[..., int], one_line: Callable[[str], None]
) -> None:
    out = tmp_path / "out"
    assert train(out) == 0
    with PrivacyLedger.open(RunFolder(out).ledger, create=False):
        assert train(out, "--resume_from_checkpoint", "latest") == 4
    one_line("another process holds this privacy ledger")


@pytest.mark.parametrize("times", [1, 2])
def test_interrupts_leave_a_ledger_that_covers_what_was_taken(
    times: int, tmp_path: Path, train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first the step is finished, and what is there can be used; the second ends at once. Both go on."""
    out, step, taken = tmp_path / "out", DPTrainer.step, []

    def step_with_signals(self: DPTrainer) -> None:
        step(self)
        taken.append(1)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(DPTrainer, "step", step_with_signals)
        assert train(out) == 130
    assert len(taken) == 1 <= charged(out) == times  # the block of two stays charged where it ended at once
    assert (out / "model_index.json").exists() is (times == 1)
    assert train(out, "--resume_from_checkpoint", "latest") == 0
    assert charged(out) == 4 and report(out)["epsilon"] <= 10


def test_an_awkward_machine_is_no_obstacle(
    tmp_path: Path, train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU, a home that cannot be written, a clock that is wrong, a link, spaces and letters of all kinds."""
    (tmp_path / "file").write_text("")
    (tmp_path / "ein Ordner, größer").mkdir()
    link = tmp_path / "l i n k"
    link.symlink_to(tmp_path / "ein Ordner, größer", target_is_directory=True)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    clock = iter(range(2**31, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = link / "ü b e r"
    assert train(out) == 0 and train(out, "--resume_from_checkpoint", "latest") == 0
    assert (tmp_path / "ein Ordner, größer" / "ü b e r" / "README.md").is_file()
    assert report(out)["randomness"]["mode"] == "secure"
    assert main(["verify", str(out), "--local_run"]) == 0
    assert os.listdir(tmp_path / "ein Ordner, größer") == ["ü b e r"]
