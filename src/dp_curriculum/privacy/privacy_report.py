# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
"""The guarantee of a run, in words and numbers, from its ledger alone: what `privacy.json` and the card hold."""

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from dp_curriculum.privacy import accounting
from dp_curriculum.privacy.accounting import Adjacency, GaussianEvent
from dp_curriculum.privacy.composition import Charge
from dp_curriculum.privacy.execution import UNKNOWN, Execution


SCHEMA_VERSION = "1.1"  # of privacy.schema.json
_UNITS_ARE_IMAGES = "1.0"  # what a report says of images has not changed since, so that earlier versions can check it
Unit = Literal["image", "person"]  # that the guarantee is for
CLAIMS = ("epsilon", "epsilon_add_or_remove_one", "epsilon_replace_one", "gdp_mu")  # what is computed from mechanisms


class _Ledger(Protocol):
    @property
    def mechanisms(self) -> list[dict[str, Any]]: ...
    @property
    def events(self) -> tuple[GaussianEvent, ...]: ...
    @property
    def not_private_reasons(self) -> tuple[str, ...]: ...
    @property
    def execution(self) -> Execution: ...
    @property
    def tuning(self) -> Charge | None: ...


@dataclass(frozen=True, kw_only=True)
class ReportFacts:
    r"""
    Facts that a privacy report states beside its numbers. All of them are published, and of JSON types.

    Args:
        unit (`"image"` or `"person"`, *optional*, defaults to `"image"`): What the guarantee is for, one at a time.
        max_images_per_person (`int`, *optional*): Known bound on them; reported as `"unknown"` if unset. A person as
            the unit may have any number.
        release (`str`, *optional*, defaults to `"all-iterates"`): What the guarantee covers of a run.
        dataset_id (`str`, *optional*): Public id of the protected dataset; leave a private name out.
        num_records (`int`, *optional*): Number of units. Only if it is public, or disclosed: then name `"num_records"`
            in `unprotected_quantities`.
        num_records_is_public (`bool`, *optional*, defaults to `False`): Whether `num_records` was declared public.
        held_out_share (`float`, *optional*): Probability with which an image was held out, and read by no mechanism.
        unprotected_quantities (`tuple[str, ...]`): Facts on the data that are published exactly.
        not_covered (`tuple[str, ...]`): Releases and choices that the guarantee leaves out.
        public_data (`tuple[Mapping, ...]`): Public datasets used, e.g. `{"name": "org/data", "role": "pretraining"}`.
        implementation (`Mapping`): More on the code, e.g. `{"commit": "..."}`; package and version are filled in.
        data_domain (`Mapping`): Public shape of the protected data, e.g. `{"num_classes": 10}`.
        weights (`Mapping[str, str]`): sha256 of each released file of weights, by its path.

    Raises:
        ValueError: If `num_records` is neither public nor disclosed.
    """

    unit: Unit = "image"
    max_images_per_person: int | None = None
    release: str = "all-iterates"
    dataset_id: str | None = None
    num_records: int | None = None
    num_records_is_public: bool = False
    held_out_share: float | None = None
    unprotected_quantities: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()
    public_data: tuple[Mapping[str, Any], ...] = ()
    implementation: Mapping[str, Any] = field(default_factory=dict)
    data_domain: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        disclosed = self.num_records_is_public or "num_records" in self.unprotected_quantities
        if self.num_records is not None and not disclosed:
            raise ValueError(
                'Expected num_records to be public, or "num_records" among unprotected_quantities: leave it out.'
            )

    def to_dict(self, execution: Execution = UNKNOWN, tuning: Charge | None = None) -> dict[str, Any]:
        """Returns a copy with what a ledger says of how its steps were executed, and of tries before."""
        records = {} if self.num_records is None else {"num_records": self.num_records}
        held_out = {} if self.held_out_share is None else {"held_out_share": self.held_out_share}
        return {
            "deployment_model": "central",
            "trust_model": "whoever trains sees the images; nobody who receives a release has to be trusted",
            "data_accesses": data_accesses(tuning),
            "data_domain": {"modality": "image", **self.data_domain},
            "privacy_unit": {
                "unit": self.unit,
                "description": _DESCRIPTION[self.unit],
                "max_records_per_person": "any" if self.unit == "person" else self.max_images_per_person or "unknown",
            },
            "release": self.release,
            "protected_dataset": {"name": self.dataset_id, "role": "training", **records, **held_out},
            "unprotected_quantities": list(self.unprotected_quantities),
            "not_covered": list(self.not_covered),
            "hyperparameter_tuning": tuning_facts(tuning),
            "public_data": [dict(data) for data in self.public_data],
            "randomness": dict(execution.randomness),
            "implementation": {
                "package": "dp_curriculum",
                "version": version_of("dp_curriculum"),
                **self.implementation,
                **computation_facts(execution),
            },
            "weights": dict(self.weights),
        }


@dataclass(frozen=True)
class PrivacyReport:
    r"""
    The guarantee of a run: what `privacy.json` and the `differential_privacy` block of its card hold.

    Its numbers come from [`PrivacyReport.from_ledger`]; [`PrivacyReport.from_file`] reads them back.

    Args:
        epsilon (`float`): Epsilon of everything charged, unrounded; infinite if the run is not private.
        delta (`float`): The delta that it holds at.
        fields (`Mapping`): All of the report, as [`~PrivacyReport.to_dict`] returns it.
    """

    epsilon: float
    delta: float
    fields: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_ledger(
        cls,
        ledger: _Ledger,
        *,
        target_delta: float,
        target_epsilon: float | None = None,
        adjacency: Adjacency = "add-or-remove-one",
        group_size: int = 1,
        facts: ReportFacts | None = None,
    ) -> "PrivacyReport":
        r"""
        Computes the report from the ledger.

        Args:
            ledger ([`~ledger.PrivacyLedger`]): What was charged; closed or open.
            target_delta (`float`): Delta of the report.
            target_epsilon (`float`, *optional*): The epsilon that was asked for, to stand beside the one spent.
            adjacency (`str`, *optional*, defaults to `"add-or-remove-one"`): Neighbouring relation of `epsilon`.
            group_size (`int`, *optional*, defaults to 1): Units that change together: images of one person, or
                persons.
            facts ([`ReportFacts`], *optional*): What the report says beside the numbers.
        """
        facts = facts or ReportFacts()
        events, private = ledger.events, not ledger.not_private_reasons
        charge = ledger.tuning or Charge(events)
        epsilon = math.inf
        numbers: dict[str, float | None] = dict.fromkeys(CLAIMS)
        statement = no_guarantee(ledger.not_private_reasons)
        if private:
            spent = {
                relation: charge.epsilon(target_delta, adjacency=relation, group_size=group_size)
                for relation in get_args(Adjacency)
            }
            epsilon = spent[adjacency]
            mu = charge.gdp_mu(adjacency=adjacency, group_size=group_size)
            statement = guarantee(
                charge,
                epsilon=epsilon,
                delta=target_delta,
                adjacency=adjacency,
                group_size=group_size,
                unprotected=facts.unprotected_quantities,
                unit=facts.unit,
            )
            numbers = dict(zip(CLAIMS, (epsilon, *spent.values(), mu)))
        fields = {
            "schema_version": _UNITS_ARE_IMAGES if facts.unit == "image" else SCHEMA_VERSION,
            "private": private,
            "statement": statement,
            "flavor": "approximate-dp",
            "delta": float(target_delta),
            "adjacency": adjacency,
            "group_size": int(group_size),
            **numbers,
            "target_epsilon": None if target_epsilon is None else float(target_epsilon),
            "not_private_reasons": list(ledger.not_private_reasons),
            "mechanisms": ledger.mechanisms,
            "accounting": {
                "accountant": "pld",
                "library": "dp-accounting",
                "version": version_of("dp-accounting"),
                "discretization": accounting.choose_discretization(events, adjacency=adjacency, group_size=group_size),
                "composition": f"stages and steps in sequence; {_OF_CLASSES[facts.unit]}",
                "post_processing": "training on what a lesson released, averages of weights, all generated images",
                "assumptions": ["poisson-sampling", "secret-randomness", "idealised-arithmetic"],
                "assumptions_met": private,
            },
            **facts.to_dict(ledger.execution, ledger.tuning),
        }
        return cls(epsilon, float(target_delta), json.loads(json.dumps(fields, allow_nan=False)))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "PrivacyReport":
        r"""
        Reads a report back. Its numbers are taken as they are; recompute epsilon from `mechanisms` to check them.

        Args:
            path (`str` or `os.PathLike`): The file, `privacy.json`.

        Raises:
            ValueError: If there is no such file, or it does not hold a report.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            epsilon = float(fields["epsilon"]) if fields["private"] else math.inf
            report = cls(epsilon, float(fields["delta"]), fields)
            is_report = isinstance(fields["statement"], str) and isinstance(fields["mechanisms"], list)
        except OSError as error:
            raise ValueError(f"Expected a privacy report at {str(path)!r}: {error.strerror or error}.") from None
        except (ValueError, KeyError, TypeError):
            is_report = False
        if not is_report:
            raise ValueError(f"Expected {str(path)!r} to hold a privacy report: restore the file that the run wrote.")
        return report

    def without_guarantee(self, *reasons: str) -> "PrivacyReport":
        """The report of the same run with its claims taken back, for these reasons beside those it has."""
        fields = self.to_dict()
        fields["not_private_reasons"] = list(dict.fromkeys([*fields["not_private_reasons"], *reasons]))
        fields["accounting"]["assumptions_met"] = fields["private"] = False
        fields.update(dict.fromkeys(CLAIMS), statement=no_guarantee(fields["not_private_reasons"]))
        return PrivacyReport(math.inf, self.delta, fields)

    def with_dataset(self, spending: Mapping[str, Any]) -> "PrivacyReport":
        """The same report, beside what was spent on the dataset so far, as `dataset_budget.release_facts` has it."""
        return PrivacyReport(self.epsilon, self.delta, {**self.to_dict(), "dataset_spending": dict(spending)})

    def statement(self) -> str:
        """The guarantee in a formal sentence, then in plain words; or that there is none, and why."""
        return self.fields["statement"]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON and YAML; a copy."""
        return json.loads(json.dumps(dict(self.fields)))


def no_guarantee(reasons: Iterable[str]) -> str:
    """The statement of what is not private."""
    return f"NOT PRIVATE: {'; '.join(reasons)}. What was released carries no privacy guarantee."


_DESCRIPTION: Mapping[Unit, str] = {
    "image": "one training image with its label",
    "person": "one person with all their training images and labels",
}
_OF_CLASSES: Mapping[Unit, str] = {
    "image": "classes, which partition the images, in parallel",
    "person": "a person counts once in all classes together, with the average of their images",
}


def data_accesses(tuning: Charge | None) -> str:
    """The field of a report that says which accesses to the images it is about."""
    if tuning is None:
        return "one training run; mechanisms lists every access to the images, in order"
    return "several training runs, of which one was chosen; mechanisms lists every access of that one, in order"


def tuning_facts(tuning: Charge | None) -> dict[str, Any]:
    """The field of a report for tries before: covered where all of them are charged, and only then."""
    if tuning is None:
        return {"covered": False, "note": "the choice of hyper-parameters is not accounted for"}
    return {
        "covered": True,
        "note": "settings were tried in private, and the choice among them is in epsilon",
        "charge": tuning.to_dict(),
    }


def guarantee(
    charge: Charge,
    *,
    epsilon: float,
    delta: float,
    adjacency: Adjacency,
    group_size: int,
    unprotected: Collection[str] = (),
    unit: Unit = "image",
) -> str:
    """The claim in a formal sentence, then in plain words; `unprotected` names what is published exactly."""
    change = "replacing" if adjacency == "replace-one" else "adding or removing"
    changed, subject, was_used, others = _of_group(unit, group_size)
    tossed = f"which of two versions of {subject}" if adjacency == "replace-one" else f"whether {subject}"
    # An even guess between two datasets is right with probability (1 + total variation distance) / 2.
    distance = charge.distance(epsilon, delta, adjacency=adjacency, group_size=group_size)
    percent = math.ceil(500 * (1 + distance)) / 10
    # Whoever knows all other images can count: a published number would reveal whether one was added.
    counted = "num_records" in unprotected and adjacency != "replace-one"
    seen = f"released, except for the exact number of {unit}s," if counted else "released,"
    return (
        f"The training is ({accounting.round_up(epsilon):g}, {delta:g})-differentially private with respect to "
        f"{change} {changed} ({adjacency} adjacency); all that it releases is covered, unless listed as not covered. "
        f"In plain words: suppose that a coin toss decided {tossed} {was_used}. Somebody who sees all that was "
        f"{seen} and knows {others}, guesses the outcome right at most "
        f"{percent:g} % of the time, against 50 % for guessing blindly."
    )


def _of_group(unit: Unit, group_size: int) -> tuple[str, str, str, str]:
    """Words for what changes, for short, for its taking part, and for all that the adversary knows."""
    if unit == "person":
        others = "all images of every other person"
        if group_size == 1:
            return "one person with all their images and labels", "one person", "took part", others
        group = f"{group_size} persons"
        return f"{group} with all their images and labels", group, "took part", others
    others = "every other training image"
    if group_size == 1:
        return "one image with its label", "one image", "was used", others
    group = f"{group_size} images of one person"
    return f"{group} with their labels", group, "were used", others


def unit_of_report(report: Mapping[str, Any]) -> Unit:
    """The unit that a report says its guarantee is for; an image where it says nothing that is known."""
    stated = report.get("privacy_unit")
    return "person" if isinstance(stated, Mapping) and stated.get("unit") == "person" else "image"


def computation_facts(execution: Execution) -> dict[str, Any]:
    """Fields of a report for the gradients, device and precision of a run: the weakest that any part of it used."""
    error = execution.max_gradient_error
    return {
        "verified_per_image_gradients": execution.gradients == "checked",
        **({} if error is None else {"max_relative_gradient_error": error}),
        "device": execution.device,
        "precision": execution.precision,
    }


def version_of(package: str) -> str:
    """The installed version of a package, or `"unknown"`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
