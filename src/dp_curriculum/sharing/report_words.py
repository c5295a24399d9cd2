"""Check that the words of a report are those of this version: no limit is left out, and no sentence is made up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.places import DIGITS
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.composition import Charge
from dp_curriculum.privacy.execution import NOTHING_EXECUTED
from dp_curriculum.privacy.mechanism import DP_SGD, SCORE
from dp_curriculum.privacy.privacy_report import Unit, data_accesses, tuning_facts, unit_of_report
from dp_curriculum.privacy.verification import Check, not_checked, version_text, written_by_this_version
from dp_curriculum.sharing.model_card import LOCAL_FOLDER
from dp_curriculum.sharing.release import privacy_report
from dp_curriculum.sharing.starting_words import autoencoder_of, odd_words, start_of
from dp_curriculum.sharing.strict import same, shorten


# Fields that are the same in all reports of this version, for one unit and one `group_size`.
_CONSTANT = (
    ("deployment_model",),
    ("trust_model",),
    ("privacy_unit",),
    ("release",),
    ("data_domain", "modality"),
    ("accounting", "accountant"),
    ("accounting", "library"),
    ("accounting", "composition"),
    ("accounting", "post_processing"),
    ("accounting", "assumptions"),
)
_MECHANISM_NAME = re.compile(r"[a-z][a-z0-9]*(?:[_-][a-z0-9]+)*")
_VERSION = re.compile(r"[\w.+-]{1,40}", re.ASCII)
_SETTING = re.compile(r"[a-z0-9 .-]{1,40}")  # of the source of noise
_MAX_LENGTH = 200  # characters of a name or a sentence


def check_words(report: Mapping[str, Any]) -> Check:
    """
    Compares what a report says beside its numbers with what this version says of any run.

    Args:
        report (`Mapping`): Follows the schema.
    """
    if not written_by_this_version(report):
        return not_checked("words of the report", "those of its version", version_text(report))
    problem = next(_problems(report), None)
    return Check("words of the report", "those of this version", problem or "they are", problem is None)


def _problems(report: Mapping[str, Any]) -> Iterator[str]:
    size, held_out = report["group_size"], report["protected_dataset"].get("held_out_share")
    unit = unit_of_report(report)
    models = start_of(report["public_data"]), autoencoder_of(report["public_data"])
    least, most = (_template(unit, size, held_out, *models, done=done) for done in (True, False))
    for path in _CONSTANT:
        if not same(_at(report, path), _at(most, path)):
            yield f"another {'/'.join(path)}"
    tuning = dict(report["hyperparameter_tuning"])
    charge = tuning.pop("charge", None)
    before = None if charge is None else Charge()
    if not same(tuning, {name: tuning_facts(before)[name] for name in ("covered", "note")}):
        yield "another hyperparameter_tuning"
    if report["data_accesses"] != data_accesses(before):
        yield "another data_accesses"
    yield from _unlike("not_covered", report["not_covered"], least["not_covered"], most["not_covered"])
    exact = most["unprotected_quantities"]
    always = [name for name in exact if name != "num_records"]  # it may be declared
    yield from _unlike("unprotected_quantities", report["unprotected_quantities"], always, exact)
    yield from _odd_names(report)
    names = [row["name"] for row in report["mechanisms"]]
    last = {DP_SGD} if charge is None else {DP_SGD, SCORE}
    if DP_SGD in names and not set(names[names.index(DP_SGD) :]) <= last:
        yield "a lesson after DP-SGD"
    checked = report["implementation"].get("verified_per_image_gradients") is True
    if DP_SGD in names and report["private"] and not checked:
        yield "per-image gradients that were not checked"
    for text in _texts({name: value for name, value in report.items() if name != "statement"}):
        if not text.isprintable() or len(text) > _MAX_LENGTH and text not in report["not_private_reasons"]:
            yield f"what is no name and no sentence of this version: {shorten(text)}"


def _unlike(field: str, found: list[str], required: list[str], allowed: list[str]) -> Iterator[str]:
    """Names what is missing from a list of sentences, and what does not belong."""
    yield from (f"{field} without {shorten(text)}" for text in required if text not in found)
    yield from (f"{field} with {shorten(text)}" for text in found if text not in allowed)
    if len(set(found)) != len(found):
        yield f"{field} with a sentence twice"


def _odd_names(report: Mapping[str, Any]) -> Iterator[str]:
    for row in report["mechanisms"]:
        if not _MECHANISM_NAME.fullmatch(row["name"]):
            yield f"a mechanism called {shorten(row['name'])}"
    models = [model for find in (start_of, autoencoder_of) if (model := find(report["public_data"])) is not None]
    for model in models:
        yield from (f"{model['role']} with another {shorten(field)}" for field in odd_words(model))
    for data in report["public_data"]:
        is_model = any(data is model for model in models)
        name, is_known = data.get("name", ""), data.get("role") == "pretraining" or is_model
        if not (is_known and (name in (DIGITS, LOCAL_FOLDER) or is_hub_id(name))):
            yield f"public data called {shorten(name)}, for {shorten(data.get('role', ''))}"
    if not _VERSION.fullmatch(report["accounting"]["version"]):
        yield f"a version called {shorten(report['accounting']['version'])}"
    for value in report["randomness"].values():
        if isinstance(value, str) and not _SETTING.fullmatch(value):
            yield f"randomness called {shorten(value)}"
    name = report["protected_dataset"]["name"]
    if name is not None and not is_hub_id(name):
        yield f"a protected dataset called {shorten(name)}"


def is_hub_id(name: str) -> bool:
    """True if this can be the name of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.isascii() and not name.endswith("\n")


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def _texts(value: Any) -> Iterator[str]:
    """Yields all strings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield key
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


class _NothingCharged:
    """Stand-ins for the inputs of a report that show no number: the words do not depend on the mechanisms."""

    mechanisms: list[dict[str, Any]] = []  # noqa: RUF012
    events: tuple[GaussianEvent, ...] = ()
    not_private_reasons: tuple[str, ...] = ()
    tuning = None
    execution = NOTHING_EXECUTED


def _template(
    unit: Unit,
    group_size: int,
    held_out_share: float | None,
    start: Mapping[str, Any] | None,
    autoencoder: Mapping[str, Any] | None,
    *,
    done: bool,
) -> dict[str, Any]:
    """The report of a run that has charged nothing: of one that had nothing to charge, or of one that was stopped."""
    config = CurriculumConfig().replace(group_size=group_size, holdout=held_out_share)
    if unit == "person":
        config = config.replace(person_column="person")  # its name is in no report
    if done:
        config = config.replace(stages=["public"], pretrain_dataset_name=DIGITS)
    return privacy_report(
        config,
        _NothingCharged(),  # type: ignore[arg-type]
        dataset_size=1,
        num_classes=1,
        weights={},
        start=start,
        autoencoder=autoencoder,
    ).to_dict()
