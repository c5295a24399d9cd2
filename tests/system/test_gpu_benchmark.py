"""The benchmark for a GPU runs as a whole in a tiny size, and a slice that fails costs nothing but itself."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("gpu", "gpu_slices", "gpu_training", "per_image_gradients")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the command; its neighbours are found as if it were called."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def bench(gpu: ModuleType, tmp_path: Path) -> Any:
    now = time.monotonic()
    return gpu.Bench(
        device=torch.device("cpu"), folder=tmp_path, runs=tmp_path / "runs", data="digits", started=now,
        deadline=now + 60, tiny=True, results={"slices": {}}, options={"slices": [], "training_seconds": 20},
    )  # fmt: skip


def run(gpu: ModuleType, bench: Any, seconds: float = 30) -> dict[str, Any]:
    output = bench.folder / "gpu.json"
    gpu.run_slice("ceilings", bench, output, seconds)
    return json.loads(output.read_text())["slices"]["ceilings"]


@pytest.mark.slow
def test_all_of_it_runs_in_a_tiny_size(gpu: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "found" / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--output", str(output), "--seconds", "300"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    slices = json.loads(output.read_text())["slices"]
    assert list(slices) == list(gpu.ALL_SLICES)
    assert all(record["ended"] and record["found"] and "error" not in record for record in slices.values())
    for name, row in slices["weight_gradients"]["found"].items():
        assert all(isinstance(cell, (dict, str)) for cell in row.values()) or "benchmark" in name
        assert "wrong" not in json.dumps(row)
    for row in slices["methods"]["found"].values():
        assert row["engine"]["ratio"] > 0.5 and row["Opacus hooks"]["rows/s"] > 0
    assert slices["training"]["found"]["training"]["epsilon"] <= 1
    assert slices["evaluation"]["found"]["evaluation"]["metrics"]["fd_classifier"]["value"] > 0
    assert Image.open(output.parent / "gpu_samples.png").size[0] > 100
    # What ended is not made again.
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, timeout=100)
    assert again.returncode == 0 and again.stdout == ""


def test_what_a_failing_slice_found_is_kept(gpu: ModuleType, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(bench: Any) -> Iterator[tuple[str, Any]]:
        yield "first", 1
        raise RuntimeError("an illegal memory access\nwas encountered")

    monkeypatch.setitem(gpu.ALL_SLICES, "ceilings", failing)
    record = run(gpu, bench)
    assert record["found"] == {"first": 1} and not record["ended"]
    assert record["error"] == "RuntimeError: an illegal memory access"


def test_a_slice_is_cut_off_also_where_errors_are_swallowed(
    gpu: ModuleType, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(bench: Any) -> Iterator[tuple[str, Any]]:
        yield "first", 1
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.01)

    monkeypatch.setitem(gpu.ALL_SLICES, "ceilings", endless)
    record = run(gpu, bench, seconds=0.2)
    assert record["error"] == "took longer than 0 s" and record["found"] == {"first": 1}


def test_time_is_kept_for_the_training(gpu: ModuleType, bench: Any) -> None:
    bench.tiny, bench.options = False, {"training_seconds": 20}
    assert gpu.seconds_for("ceilings", bench, ["training"]) == gpu.LIMITS["ceilings"]
    assert gpu.seconds_for("compiled", bench, ["training"]) == pytest.approx(40, abs=2)
    assert gpu.seconds_for("training", bench, []) == pytest.approx(60, abs=2)


def test_a_size_fits_the_rate_that_was_measured(gpu: ModuleType) -> None:
    training = importlib.import_module("gpu_training")

    def size(paper: float, small: float) -> tuple[str, int, int]:
        network, found = training.choose_size({"paper": (paper, 4096), "small": (small, 2048)}, 200)
        rows = found["num_dp_steps"] * found["expected_batch_size"] * found["noise_multiplicity"]
        assert rows <= 200 * (paper if network == "paper" else small)
        return network, found["noise_multiplicity"], found["num_dp_steps"]

    assert size(1_000, 4_000) == ("small", 1, 195)
    assert size(19_000, 60_000) == ("paper", 2, 463)
    assert size(65_000, 200_000) == ("paper", 4, 793)
    assert size(10_000_000, 1) == ("paper", 32, 2200)
    slow = {"preset": "small", "rows/s": 5, "physical": 128}
    found = training.measured_rates({"a": slow, "b": {**slow, "rows/s": 9, "physical": 2048}, "c": "out of memory"})
    assert found == {"small": (9, 2048)}


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ([("sm90_xmma_wgrad_implicit_gemm_bf16", 60.0), ("nvjet_hsh_128x256", 20.0)], "weight gradient: 75%"),
        ([("vectorized_elementwise_kernel", 50.0), ("RowwiseMomentsCUDAKernel", 40.0)], "elementwise: 56%"),
        ([("nchwToNhwcKernel", 20.0)], "launches: idle for 80%"),
    ],
)
def test_a_profile_names_what_bounds(gpu: ModuleType, kernels: list[tuple[str, float]], expected: str) -> None:
    slices = importlib.import_module("gpu_slices")
    entries = [(name, ms, 1, True) for name, ms in kernels] + [("aten::mm", 99.0, 1, False)]
    assert slices.summary(entries, 100.0)["bound by"] == expected


def test_ratios_are_to_the_fastest_plain_training(gpu: ModuleType) -> None:
    slices = importlib.import_module("gpu_slices")
    row = {"plain": {"ms": 10.0}, "plain, tuned": {"ms": 8.0}, "engine": {"ms": 12.0}, "Opacus hooks": "out of memory"}
    found = slices.with_ratios(row)
    assert found["engine"]["ratio"] == 1.5 and found["Opacus hooks"] == "out of memory"


def test_nothing_needs_torchvision(gpu: ModuleType) -> None:
    code = "import sys, gpu; sys.exit('torchvision' in sys.modules)"
    search = os.pathsep.join([str(BENCHMARKS), *filter(None, sys.path)])
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": search}).returncode == 0
