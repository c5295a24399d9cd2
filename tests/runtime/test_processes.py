"""Several processes: one draw and one noise for all of them, one that writes, and all end where one is lost."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from ranks import environment, free_port, results_of, run_ranks, start_ranks
from torch import Tensor

from dp_curriculum import cli
from dp_curriculum.commands import sample, synthesize
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages, digits_dataset
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.evaluation.evaluation import sample_images
from dp_curriculum.lessons.pretraining import pretrain
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime import processes
from dp_curriculum.runtime.processes import (
    COLLECTIVE_TIMEOUT,
    check_launch,
    ignored_requests,
    jointly,
    missing_processes,
    process_state,
)
from dp_curriculum.training.curriculum import run_curriculum


pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*")
NUM_ROWS, DIVISOR = 12, 5.0
TWO_AND_THREE = (2, 3)


class ChosenRows(SecretGenerator):
    """Draws the rows that a test names, and counts the draws of noise."""

    def __init__(self, rows: Any) -> None:
        super().__init__()
        self.rows, self.num_noise_draws = list(rows), 0

    def poisson_sample(self, num_rows: int, sample_rate: float) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.int64)

    def gaussian(self, shape: Any, std: float, **options: Any) -> Tensor:
        self.num_noise_draws += 1
        return super().gaussian(shape, std, **options)


def rows_as_noise(trainer: DPTrainer) -> None:
    """Diffusion noise that hangs on the row alone, so that it is the same in whatever process the row is."""

    def normals(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        copies, generator = trainer.config.dp_sgd.noise_multiplicity, torch.Generator().manual_seed(0)
        levels = torch.randn(copies, NUM_ROWS, generator=generator)[:, rows].flatten()
        noise = torch.randn(copies, NUM_ROWS, 1, 8, 8, generator=generator)[:, rows].flatten(0, 1)
        return torch.ones(len(rows)), levels, noise

    trainer._diffusion_normals = normals  # type: ignore[method-assign]


@pytest.fixture
def config(make_config: Any) -> CurriculumConfig:
    return make_config(
        noise_multiplicity=2, dp_max_grad_norm=1.0, num_dp_steps=4, checkpointing_steps=2, sample_steps=0,
        num_inference_steps=2, seed=0, public_dataset_size=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def few_digits() -> datasets.Dataset:
    return digits_dataset().select(range(64))


def take_steps(
    config: CurriculumConfig, rows: Any, rank: int, num_processes: int, *, noise_multiplier: float, steps: int = 1
) -> tuple[Tensor, Tensor, int]:
    """The released sums of some steps, the weights after them, and how often this process drew noise."""
    accelerator = processes_accelerator() if num_processes > 1 else None
    assert accelerator is None or accelerator.num_processes == num_processes
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (NUM_ROWS, 1, 8, 8), generator=generator, dtype=torch.uint8)
    private = PrivateImages(images, torch.arange(NUM_ROWS) % 3, ("a", "b", "c"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_unet(config.model, resolution=8, num_channels=1, num_classes=3)
    secret = ChosenRows(rows)
    trainer = DPTrainer(
        unet, private, config, noise_multiplier=noise_multiplier, sample_rate=0.5, divisor=DIVISOR, secret=secret,
        process_index=rank, num_processes=num_processes,
    )  # fmt: skip
    rows_as_noise(trainer)
    sums: list[Tensor] = []
    step = trainer.optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        sums.append(torch.cat([p.grad.flatten() for p in unet.parameters()]) * DIVISOR)
        return result

    trainer.optimizer.step = watched  # type: ignore[method-assign]
    for _ in range(steps):
        trainer.step()
    weights = torch.cat([p.detach().flatten() for p in unet.parameters()])
    return torch.stack(sums), weights, secret.num_noise_draws


def processes_accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


# --- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [range(NUM_ROWS), [4], []], ids=["all", "one: others are empty", "none"])
def test_the_clipped_sum_of_a_draw_is_the_same_on_one_two_and_three_processes(
    rows: Any, config: CurriculumConfig
) -> None:
    alone, weights, _ = take_steps(config, rows, 0, 1, noise_multiplier=0.0)
    assert bool(alone.any()) == (len(rows) > 0)
    for num_processes in TWO_AND_THREE:
        found = results_of(
            num_processes, lambda rank, n=num_processes: take_steps(config, rows, rank, n, noise_multiplier=0.0)
        )
        for sums, others, _ in found:
            torch.testing.assert_close(sums, alone, rtol=1e-4, atol=1e-6)
            assert torch.equal(others, found[0][1]), "weights are equal to the bit on all processes"


def test_several_steps_leave_the_same_model_on_one_two_and_three_processes(config: CurriculumConfig) -> None:
    """From the same draws, but for rounding; another draw, the twin, leads somewhere else."""
    rows = list(range(0, NUM_ROWS, 2))

    def trained(rank: int, num_processes: int, rows: list[int] = rows, steps: int = 5) -> Tensor:
        return take_steps(config, rows, rank, num_processes, noise_multiplier=0.0, steps=steps)[1]

    alone = trained(0, 1)
    moved = float((alone - trained(0, 1, steps=1)).norm())
    for num_processes in TWO_AND_THREE:
        for others in results_of(num_processes, lambda rank, n=num_processes: trained(rank, n)):
            assert float((others - alone).norm()) < 1e-2 * moved
    assert float((trained(0, 1, rows[1:]) - alone).norm()) > 3e-2 * moved


@pytest.mark.statistical
@pytest.mark.parametrize("num_processes", [1, *TWO_AND_THREE])
def test_noise_is_drawn_once_whatever_the_number_of_processes(num_processes: int, config: CurriculumConfig) -> None:
    """Three empty draws: what is released is noise. 3n values; deviations of 5 in their spread, where a draw on each
    process would be off by a factor of 1.41 or more."""

    def work(rank: int) -> Any:
        return take_steps(config, [], rank, num_processes, noise_multiplier=2.0, steps=3)

    found = [work(0)] if num_processes == 1 else results_of(num_processes, work)
    assert [draws for _, _, draws in found] == [3] + [0] * (num_processes - 1)
    values = found[0][0]
    assert float(values.std()) == pytest.approx(2.0, rel=5 / (2 * values.numel()) ** 0.5)
    assert abs(float((values[1:] * values[:-1]).mean())) < 5 * 4 / (2 * values.shape[1]) ** 0.5, "fresh each step"
    for sums, weights, _ in found:
        assert torch.equal(sums, values) and torch.equal(weights, found[0][1])


def test_a_lesson_ends_early_on_all_processes_at_once(config: CurriculumConfig) -> None:
    """Alone, the first would see its check get better for all steps, and the second see it get worse."""
    config = config.replace(pretrain_steps=300, pretrain_learning_rate=3e-3, pretrain_patience=1, label_dropout=0.0)

    def work(rank: int) -> tuple[int, Tensor]:
        processes_accelerator()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = build_unet(config.model, resolution=8, num_channels=1, num_classes=2)
        steps: list[int] = []

        def draw(count: int, generator: torch.Generator, brightness: float = 1.0) -> tuple[Tensor, Tensor]:
            return torch.full((count, 1, 8, 8), brightness), torch.zeros(count, dtype=torch.int64)

        def check_draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return draw(count, generator, brightness=1.0 - rank)

        pretrain(
            unet, draw, config, check_draw=check_draw, generator=torch.Generator().manual_seed(rank), num_processes=2,
            should_stop=lambda: bool(steps.append(1)), disable_progress_bar=True,
        )  # fmt: skip
        return len(steps), torch.cat([parameter.detach().flatten() for parameter in unet.parameters()])

    (first, weights), (second, others) = results_of(2, work)
    assert first == second < 300 and torch.equal(weights, others)


# --- the whole run -------------------------------------------------------------------------------------------------


def facts_of(folder: Path) -> tuple[float, list[dict[str, Any]], int]:
    with PrivacyLedger.open(RunFolder(folder).ledger, create=False) as ledger:
        lines = ledger.path.read_text().count('"reserve"')
        return ledger.epsilon(1e-5), ledger.mechanisms, lines


def whole_run(config: CurriculumConfig, rows: datasets.Dataset, folder: Path, **options: Any) -> dict[str, Tensor]:
    result = run_curriculum(config, rows, output_dir=folder, **options)
    return {**result.pipeline.unet.state_dict(), "epsilon": torch.tensor(result.report.epsilon)}


def test_a_run_spends_the_same_on_one_two_and_three_processes_and_may_change_their_number(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    whole_run(config, few_digits, tmp_path / "1")
    expected = facts_of(tmp_path / "1")
    for num_processes in TWO_AND_THREE:
        folder = tmp_path / f"{num_processes}"
        found = results_of(num_processes, lambda rank, to=folder: whole_run(config, few_digits, to))
        assert facts_of(folder) == expected, "one writes, and charges once"
        saved = DPCurriculumPipeline.from_pretrained(folder).unet.state_dict()
        for weights in found:
            assert float(weights.pop("epsilon")) == pytest.approx(expected[0])
            assert all(torch.equal(weights[name], saved[name]) for name in saved)

    def interrupted(rank: int) -> bool:
        step = DPTrainer.step

        def step_then_stop(self: DPTrainer) -> None:
            step(self)
            if rank == 1 and self.num_steps_taken == 1:  # one process is told; all of them stop
                signal.raise_signal(signal.SIGTERM)

        DPTrainer.step = step_then_stop  # type: ignore[method-assign]
        return run_curriculum(config, few_digits, output_dir=tmp_path / "changing").finished

    assert results_of(2, interrupted) == [False, False]
    assert facts_of(tmp_path / "changing")[1][-1]["num_steps"] == 1
    results_of(3, lambda rank: whole_run(config, few_digits, tmp_path / "changing", resume_from_checkpoint="latest"))
    assert facts_of(tmp_path / "changing")[:2] == expected[:2]
    whole_run(config, few_digits, tmp_path / "changing", resume_from_checkpoint="latest")
    assert facts_of(tmp_path / "changing")[:2] == expected[:2], "a finished run is not charged again"


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision=fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision=fp8"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, "gradient_accumulation_steps=2"),
    ],
)
def test_a_launch_that_breaks_the_guarantee_is_refused_by_name(
    variables: dict[str, str],
    named: str,
    config: CurriculumConfig,
    few_digits: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(named)):
        run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ordinary_launch_is_taken() -> None:
    check_launch({})
    check_launch({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "false"})


def test_processes_that_differ_are_refused_on_all_of_them_before_anything_is_written(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    others = few_digits.select(reversed(range(64)))

    def attempts(rank: int) -> list[str]:
        other = rank == 1
        tries: list[tuple[CurriculumConfig, Any, str]] = [
            (config.replace(dp_max_grad_norm=2.0) if other else config, few_digits, "out"),
            (config.replace(block_out_channels=[16]) if other else config, few_digits, "out"),
            (config, few_digits, f"out-{rank}"),
            (config, others if other else few_digits, "out"),
            (config.replace(image_column="picture"), few_digits, "out"),
        ]
        messages = []
        for tried, rows, name in tries:
            with pytest.raises(ValueError) as found:
                run_curriculum(tried, rows, output_dir=tmp_path / name)
            messages.append(str(found.value))
        return messages

    named = ("--dp_max_grad_norm", "--block_out_channels", "--output_dir", "data", "--image_column")
    for messages in results_of(2, attempts):
        assert all(name in message for name, message in zip(named, messages)), messages
        assert "2.0 on process 1, 1.0 on process 0" in messages[0]
    assert list(tmp_path.iterdir()) == []


def test_where_one_process_fails_all_of_them_do() -> None:
    def work(rank: int) -> str:
        def compute() -> int:
            if rank == 1:
                raise ValueError("Expected --resolution to be smaller")
            return rank

        try:
            jointly(processes_accelerator(), compute)
        except ValueError as error:
            return str(error)
        return "nothing"

    own = "Expected --resolution to be smaller"
    assert results_of(3, work) == [f"process 1: {own}", own, f"process 1: {own}"]


# --- what was asked for and what runs ------------------------------------------------------------------------------


def test_fewer_processes_than_asked_for_are_noticed() -> None:
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    assert "several processes" in str(missing_processes(1, launched))
    assert missing_processes(2, {**launched, "LOCAL_RANK": "0", "WORLD_SIZE": "2"}) is None
    assert missing_processes(1, {"ACCELERATE_MIXED_PRECISION": "no"}) is None
    assert missing_processes(1, {"MASTER_ADDR": "node-1"}) is None, "a cluster sets it for all jobs"


def test_processes_that_are_not_connected_are_refused(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun on a machine without a GPU: each process believes that it is the only one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="one of 2, but it is alone.*ACCELERATE_USE_CPU"):
        run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in SIZES for value in ("", "two", "2.0", "0", "-1")],
        *[("LOCAL_WORLD_SIZE", value) for value in ("", "0")],
        *[(name, value) for name in RANKS for value in ("", "first", "1.0", "-2")],
    ],
)
def test_a_rank_or_a_size_that_is_no_number_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"Expected the variable {name}={re.escape(repr(value))} to be an integer"):
        check_launch({name: value})


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK to be set beside RANK=1, WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node"}, "LOCAL_RANK to be set beside RANK=0, WORLD_SIZE=2"),
        ({"RANK": "1"}, "LOCAL_RANK to be set beside RANK=1"),
        ({"WORLD_SIZE": "2"}, "RANK and LOCAL_RANK to be set beside WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, "RANK and LOCAL_RANK to be set beside WORLD_SIZE=2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK to be set beside RANK=1, WORLD_SIZE=2"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "LOCAL_RANK to be set beside OMPI_COMM_WORLD_R"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "LOCAL_RANK to be set beside PMI_RANK=1, PMI_SIZE=2"),
    ],
    ids=str,
)
def test_a_process_that_accelerate_would_take_for_the_only_one_is_refused(
    variables: dict[str, str], named: str
) -> None:
    with pytest.raises(ValueError, match=f"Expected the variable {named}"):
        check_launch(variables)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
        {"LOCAL_RANK": "-1"},
        {"RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"},  # accelerate finds the others on a CPU
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "True"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
    ],
    ids=str,
)
def test_processes_that_accelerate_connects_are_taken(variables: dict[str, str]) -> None:
    check_launch(variables)


@pytest.mark.parametrize(
    "variables", [{"RANK": "1", "WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": ""}], ids=str
)
def test_every_command_that_knows_processes_ends_with_one_line(
    variables: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = ["--output_dir", str(tmp_path / "out")]
    commands = [["train", *out], ["sample", "missing", *out], ["synthesize", "missing", "--num_images", "2", *out]]
    for command in [*commands, ["plan"], ["evaluate", "missing", *out, "--reference_dataset", "digits"]]:
        assert cli.main(command) == cli.USAGE_ERROR, command
        line = capsys.readouterr().err.splitlines()[-1]
        assert "Expected the variable" in line and next(iter(variables)) in line, command
    assert not (tmp_path / "out").exists()


# --- what the launch asks for and a run does not do ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixed_precision", "variables", "told"),
    [
        ("no", {}, []),
        ("no", {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, []),
        ("bf16", {"ACCELERATE_MIXED_PRECISION": "bf16"}, []),
        ("bf16", {"ACCELERATE_MIXED_PRECISION": "no"}, []),
        (
            "no",
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            ["mixed_precision=bf16, the configuration for --mixed_precision=no"],
        ),
        ("no", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["dynamo_backend=inductor: nothing is compiled"]),
    ],
    ids=str,
)
def test_what_a_launch_asks_for_in_vain_is_told(
    mixed_precision: str, variables: dict[str, str], told: list[str]
) -> None:
    lines = ignored_requests(mixed_precision, variables)
    assert len(lines) == len(told) and all(part in line for part, line in zip(told, lines))


@pytest.mark.parametrize(
    ("configured", "launched", "precision", "num_lines"),
    [(None, "bf16", "bf16", 0), ("no", "bf16", "no", 1), (None, "no", "no", 0), ("bf16", "no", "bf16", 0)],
)
def test_the_precision_of_the_launch_counts_where_the_configuration_says_nothing(
    configured: str | None,
    launched: str,
    precision: str,
    num_lines: int,
    make_config: Any,
    few_digits: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    bf16_hardware: None,
) -> None:
    """By the dtype in which the network computes, and what the run keeps of its configuration."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    config = make_config(stages=["mean"], num_inference_steps=1, sample_steps=0, mixed_precision=configured)
    with pytest.MonkeyPatch.context() as patch:
        seen, linear = set(), torch.nn.functional.linear

        def watched(*args: Any) -> Tensor:
            seen.add(linear(*args).dtype)
            return linear(*args)

        patch.setattr(torch.nn.functional, "linear", watched)
        run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    assert (torch.bfloat16 in seen) == (precision == "bf16")
    kept = CurriculumConfig.from_yaml(tmp_path / "out" / "run" / "config.yaml").runtime.mixed_precision
    assert kept == precision
    assert sum("the configuration counts" in record.getMessage() for record in caplog.records) == num_lines


REPORT = """
from accelerate import Accelerator
from dp_curriculum.runtime.processes import describe_processes, missing_processes
accelerator = Accelerator()
if accelerator.is_main_process:
    print(describe_processes(accelerator), missing_processes(accelerator.num_processes), sep=" | ")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "variables", "expected"),
    [
        (["--cpu"], {}, "1 process on cpu | 1 process runs where the launch asked for several processes"),
        (["--multi_gpu"], {"ACCELERATE_USE_CPU": "true"}, "2 processes on cpu (gloo) | None"),
    ],
    ids=["the trap", "the way round"],
)
def test_what_accelerate_launch_really_starts(
    options: list[str], variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", "2"]
    command += ["--main_process_port", str(free_port()), "--mixed_precision", "no", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", **variables}
    )
    assert expected in done.stdout, done.stderr


# --- one process is lost -------------------------------------------------------------------------------------------


def dying_run(config: CurriculumConfig, rows: datasets.Dataset, folder: Path, signum: signal.Signals) -> Any:
    def work(rank: int) -> None:
        processes.HEARTBEAT_SECONDS, processes.LOST_AFTER_SECONDS = 0.5, 4.0
        step = DPTrainer.step

        def step_then_die(self: DPTrainer) -> None:
            if rank == 1 and self.num_steps_taken == 1:
                os.kill(os.getpid(), signum)
            step(self)

        DPTrainer.step = step_then_die  # type: ignore[method-assign]
        run_curriculum(config, rows, output_dir=folder)

    return work


def test_a_killed_process_ends_the_others_with_one_line_and_stays_charged(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    started = time.monotonic()
    ranks = start_ranks(3, dying_run(config, few_digits, tmp_path / "out", signal.SIGKILL))
    for rank in (0, 2):
        assert ranks[rank][1].poll(60)
        error = pickle.loads(ranks[rank][1].recv_bytes())
        assert isinstance(error, processes.ProcessLostError) and "--resume_from_checkpoint latest" in str(error)
        assert "\n" not in str(error)
    assert time.monotonic() - started < 60
    for process, _ in ranks:
        process.join(5)
        assert not process.is_alive()
    assert facts_of(tmp_path / "out")[1][-1]["num_steps"] == 2, "the block under way is charged"
    whole_run(config, few_digits, tmp_path / "out", resume_from_checkpoint="latest")
    epsilon, mechanisms, _ = facts_of(tmp_path / "out")
    assert mechanisms[-1]["num_steps"] == 4 and epsilon <= 10


def test_a_process_that_falls_silent_is_missed(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It stops without closing its connections, as a machine does that loses its power."""
    ranks = start_ranks(2, dying_run(config, few_digits, tmp_path / "out", signal.SIGSTOP))
    process, silent = ranks[0][0], ranks[1][0]
    try:
        process.join(60)
        assert process.exitcode == processes.STORAGE_ERROR
        assert "process 1 of this run was lost" in capfd.readouterr().err
    finally:
        silent.kill()
        process.kill()


# --- sampling ------------------------------------------------------------------------------------------------------


def test_images_do_not_depend_on_the_number_of_processes(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    run_curriculum(config.replace(stages=["mean"], s_churn=5.0), few_digits, output_dir=tmp_path / "model")

    def command(folder: str) -> int:
        return sample.main(
            [str(tmp_path / "model"), "--num_images=11", "--batch_size=3", f"--output_dir={tmp_path / folder}"]
        )

    def images_of(rank: int) -> Tensor:
        assert process_state().num_processes == 3  # else each would compute all of them
        command("several")
        pipeline = DPCurriculumPipeline.from_pretrained(tmp_path / "model")
        return sample_images(pipeline, 11, batch_size=3)[0]

    command("one")
    alone = sample_images(DPCurriculumPipeline.from_pretrained(tmp_path / "model"), 11, batch_size=3)[0]
    for found in results_of(3, images_of):
        assert torch.equal(found, alone)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "several").iterdir()) and len(files) == 12
    for name in files:
        if name != "sheet.png":
            pictures = [Image.open(tmp_path / folder / name).tobytes() for folder in ("one", "several")]
            assert pictures[0] == pictures[1]


def test_processes_wait_for_what_the_main_one_does_alone() -> None:
    """The group is made by whoever asks first; it must not give up after the half hour of torch.distributed."""

    def timeout(rank: int) -> timedelta:
        process_state()
        return torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout  # type: ignore

    assert results_of(2, timeout) == [COLLECTIVE_TIMEOUT] * 2


def test_a_synthetic_dataset_does_not_depend_on_the_number_of_processes(
    config: CurriculumConfig, few_digits: datasets.Dataset, tmp_path: Path
) -> None:
    run_curriculum(config.replace(stages=["mean"]), few_digits, output_dir=tmp_path / "model")

    def asked(folder: str) -> list[str]:
        size = ["--num_images=11", "--images_per_shard=4"]
        return [str(tmp_path / "model"), *size, f"--output_dir={tmp_path / folder}"]

    assert synthesize.main(asked("one")) == 0
    assert results_of(2, lambda rank: synthesize.main(asked("several"))) == [0, 0]
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len([name for name in files if name.suffix == ".parquet"]) == 3
    for name in files:
        assert (
            name.name == "README.md"
            or (tmp_path / "one" / name).read_bytes() == (tmp_path / "several" / name).read_bytes()
        )
    with pytest.raises(ValueError, match="another model or other options"):  # the refusal of one is that of all
        results_of(2, lambda rank: synthesize.main([*asked("several"), "--seed=1"]))


def test_the_helper_notices_a_process_that_fails() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise KeyError("wrong")

    assert [type(found) for found in run_ranks(2, work)] == [type(None), KeyError]
    assert environment(1, 2, 5)["RANK"] == "1"
