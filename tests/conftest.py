"""Shared by all tests: no network but a Hub on this machine, caches of their own, one thread, quick configurations."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest


if TYPE_CHECKING:
    from hub_server import Hub

    from dp_curriculum.config import CurriculumConfig

# All are read when the libraries are imported, which is after this file.
_HF_HOME = tempfile.TemporaryDirectory(prefix="dp-curriculum-tests-")
_HUB = socket.create_server(("127.0.0.1", 0))  # served where a test asks for it
os.environ["HF_HOME"] = _HF_HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{_HUB.getsockname()[1]}"
os.environ["HF_HUB_DISABLE_XET"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.pop("HF_TOKEN", None)
os.environ["OMP_NUM_THREADS"] = "1"  # of tiny tensors: a second thread costs more than it brings

MakeConfig = Callable[..., "CurriculumConfig"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it brings."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """Builds a valid configuration of a network with some thousand weights on 8x8 images; fields can be changed."""
    from dp_curriculum.config import CurriculumConfig

    def make(**fields: Any) -> CurriculumConfig:
        tiny: dict[str, Any] = {
            "resolution": 8,
            "num_channels": 1,
            "stages": ["mean", "dp_sgd"],
            "block_out_channels": [8],
            "pretrain_steps": 3,
            "pretrain_batch_size": 4,
            "expected_batch_size": 16,
            "num_dp_steps": 4,
        }
        if "lesson_budget_share" not in fields:
            tiny["lesson_noise_multiplier"] = 20.0
        return CurriculumConfig().replace(**{**tiny, **fields})

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a private run, trained in a second. Copy it before you change it."""
    return _train(tmp_path_factory.mktemp("finished") / "run-of-patients")


@pytest.fixture(scope="session")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another private run with the same configuration."""
    return _train(tmp_path_factory.mktemp("other") / "run-of-patients")


def _train(folder: Path) -> Path:
    from dp_curriculum.config import CurriculumConfig
    from dp_curriculum.data import digits_dataset
    from dp_curriculum.training.curriculum import run_curriculum

    config = CurriculumConfig().replace(
        stages=["mean", "dp_sgd"],
        lesson_noise_multiplier=20.0,
        resolution=8,
        num_channels=1,
        block_out_channels=[8],
        pretrain_steps=2,
        pretrain_batch_size=4,
        expected_batch_size=61,  # all rows: accounted in closed form
        num_dp_steps=2,
        num_inference_steps=2,
        sample_steps=0,
    )
    run_curriculum(config, digits_dataset().select(range(61)), output_dir=folder)
    return folder


@pytest.fixture(scope="session")
def _hub_server() -> Iterator[Hub]:
    from hub_server import Hub

    server = Hub(_HUB)
    yield server
    server.close()


@pytest.fixture
def hub(_hub_server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """An empty Hub that the real clients reach, with a token that may write; no wait between tries."""
    import hub_server
    from huggingface_hub import constants

    from dp_curriculum.sharing import hub as client

    _hub_server.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("HF_TOKEN", hub_server.WRITE_TOKEN)
    return _hub_server


@pytest.fixture(scope="module")
def quick_classifiers() -> Iterator[None]:
    """Networks of the evaluation are trained for 150 steps of 32 images: enough for 8x8 digits, not for a report."""
    from dp_curriculum.evaluation import classifiers

    fit = classifiers._fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "_BATCH", 32)
        patch.setattr(
            classifiers,
            "_fit",
            lambda model, images, labels, num_steps: fit(model, images, labels, min(150, num_steps)),
        )
        yield


@pytest.fixture
def bf16_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has bfloat16, whatever the machine of the test has: it is computed, if slowly, everywhere."""
    monkeypatch.setattr("dp_curriculum.diffusion.precision.has_bf16", lambda device: True)
