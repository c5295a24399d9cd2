"""Ten runs on one ledger of a dataset: three are killed at random moments and resumed, two run at the same time.

    python benchmarks/ten_runs.py --output benchmarks/results/ten_runs.json

Each run is a process of its own, forked from one that has imported everything. A witness outside of all ledgers counts
what was released. After each event (a kill, an end) the ledger of the dataset must hold at least the composition of
that. At the end its total is compared with that of dp_accounting's own accountant on the lines of the runs' ledgers,
and one more run must be refused with what is left.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.privacy.accounting import GaussianEvent, PrivacyBudgetExceeded, compute_epsilon
from dp_curriculum.privacy.dataset_budget import DatasetBudget
from dp_curriculum.privacy.dataset_ledger import DatasetLedger, create_dataset_ledger
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.training.curriculum import run_curriculum
from dp_curriculum.training.plan import BudgetPlan, plan_budget


DELTA = 1e-5
FINISHED, FAILED = 0, 70
ROWS = 64
CONFIG = CurriculumConfig().replace(
    stages=["mean", "dp_sgd"], lesson_noise_multiplier=20.0, target_epsilon=1.5, target_delta=DELTA,
    resolution=8, num_channels=1, public_dataset_size=ROWS, block_out_channels=[8], pretrain_steps=6,
    pretrain_batch_size=8, expected_batch_size=16, num_dp_steps=8, num_inference_steps=2,
    checkpointing_steps=2, checkpoints_total_limit=1, sample_steps=0, seed=0,
)  # fmt: skip


class InvariantBroken(AssertionError):
    """The ledger of the dataset holds less than was released, or another total than it should."""


@dataclass
class OneRun:
    """A run, its plan, and the file in which it counts what it releases, before it does."""

    folder: RunFolder
    config: CurriculumConfig
    plan: BudgetPlan
    witness: Path
    pid: int = -1
    kills: list[dict[str, Any]] = field(default_factory=list)

    def start(self, rows: datasets.Dataset) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            self._work(rows)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def released(self) -> list[GaussianEvent]:
        """Events that the witness has counted."""
        counts = Counter(self.witness.read_text() if self.witness.exists() else "")
        lesson, hard = self.plan.lessons[0].mechanisms[0].event, self.plan.dp_sgd
        assert hard is not None
        events = [lesson] * counts["L"]
        if counts["S"]:
            events.append(dataclasses.replace(hard.event, num_steps=counts["S"]))
        return events

    def _work(self, rows: datasets.Dataset) -> None:
        """The child: never returns."""
        code = FAILED
        try:
            log = os.open(self.witness.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            self._watch()
            run_curriculum(self.config, rows, output_dir=self.folder.root, resume_from_checkpoint="latest")
            code = FINISHED
        except BaseException:  # noqa: BLE001 - told by the status
            traceback.print_exc()
        finally:
            os._exit(code)

    def _watch(self) -> None:
        fd = os.open(self.witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        step, lesson = DPTrainer.step, LESSONS["mean"]

        def counted(trainer: DPTrainer) -> None:
            os.write(fd, b"S")
            step(trainer)

        def release(*args: Any) -> Any:
            os.write(fd, b"L")
            return lesson.release(*args)

        DPTrainer.step = counted  # type: ignore[method-assign]
        LESSONS["mean"] = dataclasses.replace(lesson, release=release)


def independent_epsilon(events: Iterable[GaussianEvent], delta: float) -> float:
    """Epsilon by dp_accounting's own accountant, on a fine grid."""
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=2e-5)
    for event in events:
        step: Any = dp_event.GaussianDpEvent(event.noise_multiplier)
        if event.sample_rate < 1:
            step = dp_event.PoissonSampledDpEvent(event.sample_rate, step)
        accountant.compose(dp_event.SelfComposedDpEvent(step, event.num_steps))
    return float(accountant.get_epsilon(delta))


def charged(folder: RunFolder) -> list[GaussianEvent]:
    """What the ledger of a run charges, from its lines alone."""
    rows: dict[int, dict[str, Any]] = {}
    for line in folder.ledger.read_text().splitlines():
        entry = json.loads(line)
        if entry["type"] == "reserve":
            rows[entry["seq"]] = entry
        elif entry["type"] == "give-back":
            rows[entry["reservation"]]["num_steps"] -= entry["num_steps"]
    return [
        GaussianEvent(row["noise_multiplier"], row["sample_rate"], row["num_steps"])
        for row in rows.values()
        if row["num_steps"]
    ]


class Sweep:
    """Runs on one ledger."""

    def __init__(self, folder: Path, number: int, *, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.ledger, self.rows = folder / "dataset.jsonl", digits_dataset().select(range(ROWS))
        self.runs = [self._run(f"run-{index:02d}", index) for index in range(number)]
        planned = [event for run in self.runs for event in run.plan.events]
        limit = 1.01 * compute_epsilon(planned, DELTA)  # one more does not fit
        create_dataset_ledger(self.ledger, DatasetBudget(epsilon=limit, delta=DELTA))
        self.seconds = 10.0
        self.smallest_margin = float("inf")

    def _run(self, name: str, index: int) -> OneRun:
        config = CONFIG.replace(dataset_ledger=str(self.ledger), num_dp_steps=8 + 2 * (index % 3))
        plan = plan_budget(config, dataset_size=ROWS, num_classes=10)
        return OneRun(RunFolder(self.folder / name), config, plan, self.folder / f"{name}.witness")

    def finish(self, *runs: OneRun) -> None:
        """Starts runs at once, and waits for them."""
        start = time.perf_counter()
        for run in runs:
            run.start(self.rows)
        for run in runs:
            if run.wait() != FINISHED:
                log = run.witness.with_suffix(".log").read_text()
                raise InvariantBroken(f"{run.folder.root.name} did not end:\n{log[-2000:]}")
        self.seconds = time.perf_counter() - start
        self.check()

    def kill(self, run: OneRun) -> None:
        """Kills a run at a random moment; where it had ended by then, nothing is killed, and it is left as it is."""
        run.start(self.rows)
        moment = self.random.uniform(0.1, 0.9) * self.seconds
        time.sleep(moment)
        os.kill(run.pid, signal.SIGKILL)
        status = run.wait()
        held = self.check()
        if status < 0:
            steps = Counter(run.witness.read_text() if run.witness.exists() else "")
            run.kills.append({"seconds": moment, "noisy_steps_so_far": steps["S"], "held_epsilon": held})

    def check(self) -> float:
        """The ledger holds at least what was released."""
        with DatasetLedger.open(self.ledger) as dataset:
            held = dataset.budget.spent(dataset.charges)
        released = compute_epsilon([event for run in self.runs for event in run.released()], DELTA)
        self.smallest_margin = min(self.smallest_margin, held - released)
        if held < released - 1e-9:
            raise InvariantBroken(f"epsilon {held} is held, and {released} was released")
        return held

    def refuse_one_more(self) -> str:
        more = self._run("one-more", 0)
        try:
            run_curriculum(more.config, self.rows, output_dir=more.folder.root)
        except PrivacyBudgetExceeded as error:
            if more.folder.root.exists():
                raise InvariantBroken("a refused run left a folder") from None
            return str(error).replace(str(self.folder), "")
        raise InvariantBroken("one run too many was not refused")

    def result(self) -> dict[str, Any]:
        with DatasetLedger.open(self.ledger) as dataset:
            total, limit = dataset.budget.spent(dataset.charges), dataset.budget.epsilon
            other = dataset.budget.spent(dataset.charges, adjacency="replace-one")
            if not all(run.settled for run in dataset.runs) or len(dataset.runs) != len(self.runs):
                raise InvariantBroken("a run that ended is not settled")
        independent = independent_epsilon([event for run in self.runs for event in charged(run.folder)], DELTA)
        released = independent_epsilon([event for run in self.runs for event in run.released()], DELTA)
        if abs(total / independent - 1) > 1e-3:
            raise InvariantBroken(f"the total is {total}, and another accountant has {independent}")
        return {
            "runs": len(self.runs),
            "kills": [{"run": run.folder.root.name, **kill} for run in self.runs for kill in run.kills],
            "epsilon": total,
            "epsilon_replace_one": other,
            "delta": DELTA,
            "limit": limit,
            "independent_epsilon": independent,
            "epsilon_of_what_was_released": released,
            "smallest_margin_at_any_event": self.smallest_margin,
            "one_more_is_refused": self.refuse_one_more(),
        }


def sweep(folder: Path, *, number: int, num_killed: int, together: int, seed: int) -> dict[str, Any]:
    """
    All of it.

    Args:
        folder (`Path`): A new folder.
        number (`int`): Runs.
        num_killed (`int`): Runs that are killed once and resumed.
        together (`int`): Runs that are started at once.
        seed (`int`): Of the moments.

    Raises:
        InvariantBroken: If the ledger of the dataset is not what it should be.
    """
    trial = Sweep(folder, number, seed=seed)
    first, left = trial.runs[0], trial.runs[1:]
    trial.finish(first)
    killed, left = left[:num_killed], left[num_killed:]
    for run in killed:
        for _ in range(20):
            if run.kills:
                break
            trial.kill(run)
        trial.finish(run)
    trial.finish(*left[:together])
    for run in left[together:]:
        trial.finish(run)
    return trial.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = sweep(Path(folder), number=10, num_killed=3, together=2, seed=given.seed)
    text = json.dumps({"seed": given.seed, **found, "seconds": time.perf_counter() - start}, indent=2) + "\n"
    print(text)
    if given.output is not None:
        given.output.write_text(text)


if __name__ == "__main__":
    main()
