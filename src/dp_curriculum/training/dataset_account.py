"""The account of a run in the ledger of its dataset: it reserves before it spends, and settles when it has ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.fingerprint import Fingerprint
from dp_curriculum.lessons.planned import LessonGroup, PlannedLesson
from dp_curriculum.privacy.accounting import GaussianEvent, PrivacyBudgetExceeded
from dp_curriculum.privacy.composition import Charge
from dp_curriculum.privacy.dataset_ledger import DatasetLedger, holder_of
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.runs.run_contents import charged_steps, taught_weights
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.processes import get_logger
from dp_curriculum.training.plan import BudgetPlan


logger = get_logger(__name__)

_NEW = "set --target_epsilon below that"
_RESUMED = "this run cannot be resumed, and stays as it is"


class DatasetAccount:
    """
    The account of one run in the ledger of its dataset. On the main process.

    `fingerprint` has to watch the images while they are read.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._held: Charge | None = None

    @classmethod
    def open(cls, config: CurriculumConfig) -> DatasetAccount | None:
        """
        Checks that a run is in the terms of the ledger that its configuration names; `None` if it names none.

        Raises:
            ValueError: If there is no such ledger, or its unit, adjacency or group is another one.
            LedgerTamperedError: If it is not the one that was written.
        """
        if config.runtime.dataset_ledger is None:
            return None
        asked = {
            "unit": config.data.unit,
            "adjacency": config.privacy.adjacency,
            "group_size": config.privacy.group_size,
        }
        path = Path(config.runtime.dataset_ledger)
        with DatasetLedger.open(path) as ledger:
            for name, value in asked.items():
                if getattr(ledger.budget, name) != value:
                    raise ValueError(
                        f"Refusing to charge {path}: it counts in {name} {getattr(ledger.budget, name)}, and this run "
                        f"in {name} {value}. A budget holds for one {name}."
                    )
            return cls(path, Fingerprint(ledger.key))

    def check(self, plan: BudgetPlan) -> None:
        """
        Refuses a new run that the budget has no room for, or on other images, before anything of it is written.

        Raises:
            PrivacyBudgetExceeded: With what is left.
            ValueError: If the images are others.
        """
        with DatasetLedger.open(self.path) as dataset:
            dataset.check_data(self.fingerprint.digest())
            dataset.check_fits(Charge(plan.events), cure=_NEW)

    def reserve(self, plan: BudgetPlan, ledger: PrivacyLedger, folder: RunFolder) -> None:
        """
        Charges all that the run has charged and will, durably, in both ledgers; from here on it may charge that.

        Raises:
            PrivacyBudgetExceeded: If the budget has no room for it. Nothing is charged.
            ValueError: If the images are others.
            LedgerTamperedError: If one of the ledgers is older than the other has seen.
        """
        charge = Charge((*ledger.events, *events_left(plan, ledger, folder)))
        with DatasetLedger.open(self.path) as dataset:
            before = {run.holder for run in dataset.runs}
            dataset.reserve(
                ledger,
                charge,
                label=folder.root.resolve().name,
                data=self.fingerprint.digest(),
                cure=_RESUMED if ledger.events else _NEW,
            )
        if holder_of(ledger) not in before and any(holder.startswith(ledger.run_id) for holder in before):
            logger.warning(
                f"{folder.root}: this folder was copied, or moved to another disk. It is charged to the dataset as "
                "another run, beside the first."
            )
        self._held = charge

    def reserve_charge(self, charge: Charge, own: PrivacyLedger, *, label: str) -> None:
        """Charges the whole of a tuning, whose tries are charged to no dataset by themselves; as [`reserve`]."""
        with DatasetLedger.open(self.path) as dataset:
            dataset.reserve(own, charge, label=label, data=self.fingerprint.digest(), cure=_NEW)

    def settle_charge(self, charge: Charge, own: PrivacyLedger) -> None:
        """Notes that a tuning has ended; it spent all that it reserved."""
        with DatasetLedger.open(self.path) as dataset:
            dataset.settle(own, charge)

    def hand_over(self, own: PrivacyLedger, chosen: PrivacyLedger) -> None:
        """Notes in the ledger of the run that was chosen that it is charged as a part of the tuning."""
        note = own.dataset_notes[-1]
        chosen.note_dataset_ledger(note["ledger_id"], note["holder"], (note["line"], note["line_sha256"]))

    def check_held(self, ledger: PrivacyLedger, event: GaussianEvent) -> None:
        """
        Refuses a charge of the run that the ledger of the dataset does not hold. Nothing is spent.

        Raises:
            RuntimeError: If it does not; a mistake of the program, not of its user.
        """
        if self._held is None or not self._held.covers((*ledger.events, event)):
            raise RuntimeError(f"Expected {self.path} to hold a charge of {event} before it is spent.")

    def settle(self, ledger: PrivacyLedger) -> None:
        """Charges what the run has charged, in place of all that it reserved. It may not charge any more then."""
        self._held = None
        try:
            with DatasetLedger.open(self.path) as dataset:
                dataset.settle(ledger, Charge(ledger.events))
        except (OSError, RuntimeError) as error:  # what is charged is more than what was spent: that is safe
            logger.warning(f"What this run did not spend stays charged to the dataset: {error}")


def check_account(account: DatasetAccount | None, ledger: PrivacyLedger) -> None:
    """
    Refuses to resume a run without the ledger of its dataset.

    Raises:
        ValueError: If the run is charged to one, and none is named.
    """
    if account is None and ledger.dataset_notes:
        raise ValueError(
            f"Refusing to resume the run of {ledger.path}: it is charged to the ledger of its dataset. Name that with "
            "--dataset_ledger."
        )


def events_left(plan: BudgetPlan, ledger: PrivacyLedger, folder: RunFolder) -> list[GaussianEvent]:
    """Mechanisms that a run will still charge: lessons whose release is not there, also lost ones, and noisy steps."""
    left = [
        mechanism.event
        for group in plan.groups
        for lesson in group
        if not _is_there(folder, group, lesson)
        for mechanism in lesson.mechanisms
    ]
    steps = 0 if plan.dp_sgd is None else plan.dp_sgd.event.num_steps - charged_steps(ledger, DP_SGD)
    if plan.dp_sgd is not None and steps > 0:
        left.append(replace(plan.dp_sgd.event, num_steps=steps))
    return left


def what_it_has(plan: BudgetPlan, ledger: PrivacyLedger, folder: RunFolder) -> BudgetPlan:
    """The part of a plan that a run has charged already, so that it can be ended without another charge."""
    groups: list[LessonGroup] = []
    for group in plan.groups:
        if not all(_is_there(folder, group, lesson) for lesson in group):
            return replace(plan, groups=tuple(groups), dp_sgd=None)
        groups.append(group)
    charged = charged_steps(ledger, DP_SGD)
    if plan.dp_sgd is None or charged == 0:
        return replace(plan, dp_sgd=None)
    hard = replace(plan.dp_sgd, event=replace(plan.dp_sgd.event, num_steps=charged))
    return replace(plan, dp_sgd=hard)


def _is_there(folder: RunFolder, group: LessonGroup, lesson: PlannedLesson) -> bool:
    return taught_weights(folder, group).is_dir() or folder.released(lesson.number, lesson.stage).exists()


def reserve_or_end(
    account: DatasetAccount | None, plan: BudgetPlan, ledger: PrivacyLedger, folder: RunFolder
) -> tuple[BudgetPlan, str | None]:
    """
    Reserves for a run; where the budget was used up by others meanwhile, cuts its plan to what it has.

    Returns:
        `tuple[BudgetPlan, str | None]`: The plan to follow, and why it was cut, if it was.

    Raises:
        PrivacyBudgetExceeded: If the run has nothing yet.
        LedgerTamperedError: If one of the ledgers is older than the other has seen.
    """
    check_account(account, ledger)
    if account is None:
        return plan, None
    try:
        account.reserve(plan, ledger, folder)
        return plan, None
    except PrivacyBudgetExceeded as error:
        if not ledger.events:
            raise
        logger.warning(f"{error} What the run has is saved now.")
        return what_it_has(plan, ledger, folder), f"{error} What it has is in {folder.root}; nothing was spent."
