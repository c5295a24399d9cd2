"""
Tuning: settings are tried in private, and the best try alone is kept, under one epsilon for all of it.

Nothing of a try is heard, and nothing of it stays but the best: neither how many there were, nor their scores.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.fingerprint import Fingerprint
from dp_curriculum.data.holdout import held_out_part
from dp_curriculum.data.images import PrivateImages, contributing, to_unit_range
from dp_curriculum.data.places import settle_places
from dp_curriculum.data.reading import read_images
from dp_curriculum.data.sources import open_images, open_rows
from dp_curriculum.evaluation.classifiers import CLASSIFIERS
from dp_curriculum.evaluation.evaluation import sample_images
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.execution import Execution
from dp_curriculum.privacy.ledger import PrivacyLedger, PrivacyReport
from dp_curriculum.privacy.mechanism import SCORE, PlannedMechanism
from dp_curriculum.privacy.randomness import SecretGenerator, draw_key
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.quiet import unheard
from dp_curriculum.training.curriculum import Rows, run_curriculum
from dp_curriculum.training.dataset_account import DatasetAccount
from dp_curriculum.training.finishing import retell_release
from dp_curriculum.training.tuning_plan import TuningPlan


logger = logging.getLogger(__name__)

_CLASSIFIER = "logistic"  # quick, and the order that it gives to settings is that of slower ones
_UNIFORM_BYTES = 8


def tune(config: CurriculumConfig, plan: TuningPlan, dataset: Rows = None, *, output_dir: str | Path) -> PrivacyReport:
    r"""
    Tries settings, and keeps the best try as a finished run.

    Args:
        config ([`CurriculumConfig`]): The configuration that the plan was made for.
        plan ([`~tuning_plan.TuningPlan`]): What is tried, and what it spends.
        dataset (`datasets.Dataset` or `datasets.DatasetDict`, *optional*): The private images; opened as `config.data`
            says if unset.
        output_dir (`str` or `Path`): A new or empty folder. The tries lie beside it until the end.

    Returns:
        [`PrivacyReport`]: That of the run that was kept; its epsilon is that of the whole tuning.

    Privacy:
        Released is one try: its setting, its model and its score. The others are removed. What is printed, and the
        moments at which that happens, do not depend on a try; how long all of it takes does, so do not publish it.

    Raises:
        ValueError: If the configuration, the images or the folder do not fit; nothing is spent.
        PrivacyBudgetExceeded: If the budget of the dataset has no room for it; nothing is spent.
        KeyboardInterrupt: If it was stopped. Nothing of it is kept, and what it reserved stays charged.
    """
    root = Path(output_dir)
    RunFolder(root).check(resume=False, overwrite=False)
    config = settle_places(config)
    if config.runtime.dataset_ledger is not None:
        config = config.replace(dataset_ledger=str(Path(config.runtime.dataset_ledger).resolve()))
    account = DatasetAccount.open(config)
    private = _read(config, dataset, None if account is None else account.fingerprint)
    with _tries_folder(root) as folder, PrivacyLedger.open(folder / "tuning_ledger.jsonl") as own:
        if account is not None:
            account.reserve_charge(plan.charge, own, label=f"{root.resolve().name} (tuning)")
        logger.info("tuning: nothing is shown until it ends, because how many tries there are is part of the secret")
        with unheard():
            best = _best_try(plan, dataset, private, folder)
        with PrivacyLedger.open(best.ledger, create=False) as ledger:
            ledger.note_tuning(plan.charge)
            if account is not None:
                account.hand_over(own, ledger)
            report = retell_release(best, _config_of(best, config), ledger)
        if account is not None:
            account.settle_charge(plan.charge, own)
        _keep(best, root)
    return report


def _read(config: CurriculumConfig, dataset: Rows, fingerprint: Fingerprint | None) -> PrivateImages:
    source = open_images(config.data) if dataset is None else open_rows(dataset, config.data)
    return read_images(source if fingerprint is None else fingerprint.watch(source), config.data)


@contextmanager
def _tries_folder(root: Path) -> Iterator[Path]:
    """A private folder beside that of the result; it goes, whatever happens."""
    folder = root.resolve().with_name(f"{root.resolve().name}.PRIVATE-tries")
    if folder.exists():
        raise ValueError(f"Expected {folder} not to exist: it is left of a tuning that was killed. Remove it.")
    folder.mkdir(parents=True, mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _best_try(plan: TuningPlan, dataset: Rows, private: PrivateImages, folder: Path) -> RunFolder:
    """Makes all tries; the best is left. A score that is equal to one before does not take its place."""
    best: tuple[float, RunFolder] | None = None
    for number, setting in enumerate(_draw_settings(plan)):
        run = RunFolder(folder / f"{number:04d}")
        score = _one_try(plan, plan.configs[setting], dataset, private, run)
        if best is None or score > best[0]:
            best, worse = (score, run), best
            run = run if worse is None else worse[1]
            if worse is None:
                continue
        shutil.rmtree(run.root)
    assert best is not None, "there is at least one try"
    return best[1]


def _draw_settings(plan: TuningPlan) -> Sequence[int]:
    """Indices of the settings to try: drawn anew for each of a random number of tries, from secret randomness."""
    if plan.tries is None:
        return range(len(plan.configs))
    count = plan.tries.count(_uniform())
    return [int(_uniform() * len(plan.configs)) for _ in range(count)]


def _uniform() -> float:
    """A uniform draw from `[0, 1)`, of the 53 bits that a float holds."""
    return (int.from_bytes(draw_key(_UNIFORM_BYTES), "little") >> 11) / 2**53


def _one_try(
    plan: TuningPlan, config: CurriculumConfig, dataset: Rows, private: PrivateImages, run: RunFolder
) -> float:
    """Trains with one setting, and returns the score of the result."""
    result = run_curriculum(config, dataset, output_dir=run.root)
    if not result.finished:
        raise KeyboardInterrupt("tuning was stopped: nothing of it is kept, and what it reserved stays charged")
    score = _score(plan, config, result.pipeline, private, run)
    with PrivacyLedger.open(run.ledger, create=False) as own:
        if not plan.charge.holds(own.events):
            raise RuntimeError("Expected the charges of a try to be among those that were reserved.")
    return score


def _score(
    plan: TuningPlan, config: CurriculumConfig, pipeline: DPCurriculumPipeline, private: PrivateImages, run: RunFolder
) -> float:
    images, labels = sample_images(pipeline, plan.options.num_images)
    if plan.score_event is None:
        return synthetic_score(images, labels, pipeline.num_classes)
    assert config.data.holdout is not None, "the plan asks for it"
    held_out = held_out_part(private, run.holdout_key.read_bytes(), config.data.holdout)
    count = correct_images(images, labels, held_out)
    return noisy_count(count, PlannedMechanism(SCORE, 1.0, plan.score_event), run.ledger, SecretGenerator())


def noisy_count(count: int, mechanism: PlannedMechanism, ledger: Path, secret: SecretGenerator) -> float:
    """
    A count with noise, charged to the ledger of its run before it is drawn.

    Privacy:
        One image more or less changes `count` by at most one, the clip norm of the mechanism.
    """
    execution = Execution(randomness=secret.describe(), device="cpu", precision="float64", gradients="not taken")
    with PrivacyLedger.open(ledger, create=False) as own:
        own.reserve(mechanism.event, stage=mechanism.name, clip_norm=mechanism.clip_norm, execution=execution)
        return count + float(secret.gaussian(1, std=mechanism.noise_std, dtype=torch.float64))


def correct_images(images: torch.Tensor, labels: torch.Tensor, held_out: PrivateImages) -> int:
    """Number of held-out images that a classifier of generated ones gets right; each adds one, or nothing."""
    rows = contributing(held_out.labels, held_out.num_classes)
    if not bool(rows.any()):
        return 0
    predict = CLASSIFIERS[_CLASSIFIER](images, labels, held_out.num_classes, 0)
    predicted = predict(to_unit_range(held_out.images[rows]))
    return int((predicted == held_out.labels[rows].numpy()).sum())


def synthetic_score(images: torch.Tensor, labels: torch.Tensor, num_classes: int) -> float:
    """Accuracy of a classifier of half of the generated images on the other half. It reads no private image."""
    first = torch.arange(len(images)) // num_classes % 2 == 0  # classes take turns
    predict = CLASSIFIERS[_CLASSIFIER](images[first], labels[first], num_classes, 0)
    return float((predict(images[~first]) == labels[~first].numpy()).mean())


def _config_of(run: RunFolder, asked: CurriculumConfig) -> CurriculumConfig:
    """The configuration of a try as that of the whole: its target is that of the tuning."""
    config = CurriculumConfig.from_yaml(run.config).replace(
        target_epsilon=asked.privacy.target_epsilon,
        dataset_ledger=asked.runtime.dataset_ledger,
        push_to_hub=asked.runtime.push_to_hub,
        report_to=asked.runtime.report_to,
    )
    config.to_yaml(run.config)
    return config


def _keep(best: RunFolder, root: Path) -> None:
    """Gives the best try its name. Its checkpoints go: it is finished, and cannot be resumed."""
    shutil.rmtree(best.checkpoints, ignore_errors=True)
    if root.exists():
        shutil.rmtree(root)  # empty, but for litter
    os.replace(best.root, root)
