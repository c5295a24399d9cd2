"""A corpus of forgeries: each edits a good model, or dataset, so that it claims more than it may, or hides what it is.

A new one is a function in one of these files with `@forgery(...)`, named for what somebody did. `check` is the name of
the check that has to notice it, `verdict` what it says; `known` marks those that were caught before this corpus.

A forger is thought to be careful: the hashes on the card are written anew after each edit, unless `careless` is set.
"""

from __future__ import annotations

from forgeries import card_metadata, card_text, dataset_files, model_files, reports
from forgeries.tools import FORGERIES, REFUSED, Forgery, relist


__all__ = [
    "FORGERIES",
    "REFUSED",
    "Forgery",
    "card_metadata",
    "card_text",
    "dataset_files",
    "model_files",
    "relist",
    "reports",
]
