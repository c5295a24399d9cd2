"""The words of a report on the public models that training used: written, and found again, in one place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


ROLE, AUTOENCODER_ROLE = "starting weights", "autoencoder"
WORD_OF_THE_USER = "public by the word of whoever trained: that it never saw the private images is an assumption"
PUBLIC_ONLY = "by its own report trained on public data alone"
NO_GUARANTEE = "by its own report without a guarantee for the images that it was trained on"
NAMES_THE_DATASET = "its card or report names the private dataset"
SPENT_ON_THE_SAME = "by its own report it spent a budget on the same dataset, which adds to this one"
# Sentences for what the guarantee does not cover.
KNOWS_THE_IMAGES = "what the model that training started from learned of the private images, if it saw them"
_AUTOENCODER_KNOWS = "what the public autoencoder learned of the private images, if it saw them"
_ADDS_UP = "what the model that training started from spent on the same dataset before"
_NAMED = (
    "the private images, if the model that training started from was trained on them: its card or report names them"
)
_OWN = re.compile(r"by its own report epsilon [0-9.e+-]{1,20} at delta [0-9.e+-]{1,20} for the images of its training")
_REVISION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LICENCE = re.compile(r"[a-z0-9.+-]{1,60}|not stated")


def spent_before(epsilon: float, delta: float) -> str:
    """A phrase on a model that was itself trained on private images under a budget."""
    return f"by its own report epsilon {epsilon:.4g} at delta {delta:g} for the images of its training"


def starting_weights(*, name: str, revision: str, license: str) -> dict[str, str]:
    """The entry of a report's `public_data` for the model that training started from."""
    return {
        "name": name,
        "role": ROLE,
        "revision": revision,
        "license": license,
        "provenance": WORD_OF_THE_USER,
    }


def autoencoder_weights(*, name: str, revision: str, license: str) -> dict[str, str]:
    """The entry of a report's `public_data` for the autoencoder whose latents were trained on."""
    return {**starting_weights(name=name, revision=revision, license=license), "role": AUTOENCODER_ROLE}


def autoencoder_of(public_data: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry of a report for the autoencoder whose latents were trained on, if there is one."""
    return next((data for data in public_data if data.get("role") == AUTOENCODER_ROLE), None)


def start_of(public_data: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry of a report for the model that training started from, if there is one."""
    return next((data for data in public_data if data.get("role") == ROLE), None)


def not_covered_of(start: Mapping[str, Any] | None, autoencoder: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Sentences of `not_covered` that follow from the public models that training used."""
    encoded = () if autoencoder is None else (_AUTOENCODER_KNOWS,)
    if start is None:
        return encoded
    more = {NAMES_THE_DATASET: (_NAMED,), SPENT_ON_THE_SAME: (_ADDS_UP,)}
    return (KNOWS_THE_IMAGES, *more.get(start.get("warning", ""), ()), *encoded)


def odd_words(start: Mapping[str, Any]) -> Iterator[str]:
    """Names the fields of an entry whose words are not those of this version."""
    known = {"name", "role", "revision", "license", "provenance", "privacy", "warning"}
    privacy, warning = start.get("privacy"), start.get("warning")
    right = {
        "revision": bool(_REVISION.fullmatch(start.get("revision", ""))),
        "license": bool(_LICENCE.fullmatch(start.get("license", ""))),
        "provenance": start.get("provenance") == WORD_OF_THE_USER,
        "privacy": privacy in (None, PUBLIC_ONLY, NO_GUARANTEE) or bool(_OWN.fullmatch(privacy)),
        "warning": warning in (None, NAMES_THE_DATASET, SPENT_ON_THE_SAME),
    }
    yield from sorted(set(start) - known)
    yield from (name for name, is_right in right.items() if not is_right)


def describe_start(start: Mapping[str, Any]) -> str:
    """A public model that training used, as a card states it under "How it was made"."""
    beside = [start[name] for name in ("privacy", "warning") if name in start]
    return "; ".join(
        [
            f"{start['name']} at revision {start['revision']}, licence {start['license']}",
            start["provenance"],
            *beside,
        ]
    )
