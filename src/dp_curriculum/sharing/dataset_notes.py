"""Notes of what is shared of a run, in the ledger of its dataset, if it is charged to one."""

from __future__ import annotations

from typing import Any

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.privacy.dataset_budget import release_facts
from dp_curriculum.privacy.dataset_ledger import DatasetLedger
from dp_curriculum.privacy.ledger import LedgerTamperedError, PrivacyLedger
from dp_curriculum.runs.run_folder import RunFolder


def note_release(
    source: RunFolder, config: CurriculumConfig, *, how: str, to: str, dataset_ledger: str | None = None
) -> dict[str, Any] | None:
    """
    Notes, durably, that something of a run is about to leave.

    Args:
        source ([`RunFolder`]): The run.
        config ([`CurriculumConfig`]): Its configuration, which names the ledger of its dataset.
        how (`str`): `"push"`, `"export"` or `"synthesize"`.
        to (`str`): Repository or folder.
        dataset_ledger (`str`, *optional*): Where that ledger is now, if it was moved.

    Returns:
        `dict` or `None`: What was spent on the dataset so far, for the report that is shared; `None` for a run that is
        charged to no such ledger.

    Raises:
        ValueError: If the run is charged to such a ledger, and it is not there or does not know the run.
        LedgerTamperedError: If one of the two ledgers is not the one that was written.
    """
    path = dataset_ledger or config.runtime.dataset_ledger
    own = _ledger_of(source, needed=path is not None)
    if own is None:
        return None
    if path is None:
        raise ValueError(
            f"Expected --dataset_ledger to be given: {source.root} is charged to the ledger of its dataset."
        )
    with DatasetLedger.open(path) as dataset:
        dataset.check_seen(own)
        dataset.note_release(own.dataset_notes[-1]["holder"], how=how, to=to)
        return release_facts(dataset.budget, dataset.runs)


def _ledger_of(source: RunFolder, *, needed: bool) -> PrivacyLedger | None:
    """The ledger of a run that is charged to one of its dataset, closed; `None` of another run."""
    try:
        if source.ledger.is_file():
            with PrivacyLedger.open(source.ledger, create=False) as own:
                if own.dataset_notes:
                    return own
    except LedgerTamperedError:  # such a run may be shared without a guarantee; it cannot be found among others
        if needed:
            raise
    if needed:
        raise ValueError(
            f"Refusing to share {source.root}: its ledger does not say which run of --dataset_ledger it is. Leave the "
            "option out if it was charged to none, or restore its ledger."
        )
    return None
