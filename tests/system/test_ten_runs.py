"""A sample of `benchmarks/ten_runs.py`: one run is killed and resumed, two run at once, one more is refused."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from dp_curriculum.training.dataset_account import DatasetAccount


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fork.*")]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ten_runs.py"


@pytest.fixture(scope="module")
def ten_runs() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("ten_runs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["ten_runs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CONFIG = module.CONFIG.replace(expected_batch_size=module.ROWS)  # accounted in closed form
    yield module
    del sys.modules["ten_runs"]


def test_the_ledger_of_a_dataset_holds_at_least_what_was_released(ten_runs: ModuleType, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    found = ten_runs.sweep(tmp_path, number=4, num_killed=1, together=2, seed=seed)
    assert len(found["kills"]) == 1 and found["smallest_margin_at_any_event"] >= -1e-9, f"seed {seed}"
    assert found["epsilon"] == pytest.approx(found["independent_epsilon"], rel=1e-3)
    assert found["epsilon"] <= found["limit"] and "is left for one run" in found["one_more_is_refused"]


def test_the_sweep_notices_a_run_that_is_not_held(
    ten_runs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken twin: what a run reserves is nothing, and nothing checks that."""
    reserve = DatasetAccount.reserve

    def nothing(self: DatasetAccount, plan: object, *arguments: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dp_curriculum.training.dataset_account.events_left", lambda *arguments: [])
            reserve(self, plan, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DatasetAccount, "reserve", nothing)
    monkeypatch.setattr(DatasetAccount, "check_held", lambda *arguments: None)
    monkeypatch.setattr(DatasetAccount, "settle", lambda *arguments: None)
    trial = ten_runs.Sweep(tmp_path, 1, seed=0)
    with pytest.raises(ten_runs.InvariantBroken, match="was released"):
        trial.finish(trial.runs[0])
