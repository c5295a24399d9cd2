"""bfloat16 is used where it is asked for and the device has it; elsewhere float32 is, and a run says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.diffusion.precision import autocast, has_bf16
from dp_curriculum.training.curriculum import run_curriculum


CPU = torch.device("cpu")


def dtype_of_a_product(mixed_precision: str) -> torch.dtype:
    with autocast(CPU, mixed_precision):  # type: ignore[arg-type]
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize("present", [True, False])
def test_a_forward_pass_is_low_precision_only_where_it_is_asked_for_and_there(
    present: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dp_curriculum.diffusion.precision.has_bf16", lambda device: present)
    assert dtype_of_a_product("no") == torch.float32
    assert dtype_of_a_product("bf16") == (torch.bfloat16 if present else torch.float32)


def test_a_processor_has_bf16_if_its_flags_say_so() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "flags" not in flags or not hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        pytest.skip("the flags of an x86 processor are not to be read here")
    assert has_bf16(CPU) == ("avx512_bf16" in flags)


def test_a_gpu_that_imitates_bf16_does_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, found=capability: found)
        assert has_bf16(torch.device("cuda")) is expected


def test_a_run_says_that_it_falls_back(
    make_config: Callable[..., CurriculumConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("dp_curriculum.training.curriculum.has_bf16", lambda device: False)
    config = make_config(stages=["mean"], mixed_precision="bf16", num_inference_steps=2, sample_steps=0)
    with caplog.at_level(logging.WARNING):
        run_curriculum(config, digits_dataset().select(range(64)), output_dir=tmp_path / "run")
    assert "this cpu has no instructions for bfloat16, and would be slower with it; float32 is used" in caplog.text
