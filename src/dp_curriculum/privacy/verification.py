"""Epsilon computed again from the mechanisms that a privacy report lists, beside what it claims. It needs no data."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jsonschema

from dp_curriculum.privacy.accounting import GaussianEvent, round_up
from dp_curriculum.privacy.composition import Charge, total_epsilon
from dp_curriculum.privacy.privacy_report import guarantee, no_guarantee, unit_of_report, version_of
from dp_curriculum.privacy.selection import Selection, events_from_dicts


TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """
    One claim: its name, what the report says, what was computed, and whether they agree.

    Args:
        name (`str`): Name of the claim.
        claimed (`str`): What was published.
        computed (`str`): What was found.
        holds (`bool`): Whether they agree; never of what was not checked.
        checked (`bool`, *optional*, defaults to `True`): Whether it could be checked at all.
    """

    name: str
    claimed: str
    computed: str
    holds: bool
    checked: bool = True

    @property
    def fails(self) -> bool:
        """True if it was checked and does not hold."""
        return self.checked and not self.holds

    @property
    def verdict(self) -> str:
        """`"holds"`, `"FAILS"` or `"not checked"`."""
        if not self.checked:
            return "not checked"
        return "holds" if self.holds else "FAILS"


def not_checked(name: str, claimed: str, why: str) -> Check:
    """A claim that nothing here can settle. It does not hold, and it does not fail."""
    return Check(name, claimed, why, holds=False, checked=False)


def written_by_this_version(report: Mapping[str, Any]) -> bool:
    """True if a report says that this package, in this version, wrote it: its words are then known."""
    implementation = report.get("implementation")
    if not isinstance(implementation, Mapping):
        return False
    ours = ("dp_curriculum", version_of("dp_curriculum"))
    return (implementation.get("package"), implementation.get("version")) == ours


def version_text(report: Mapping[str, Any]) -> str:
    """Reason why the words of a report of another version are not checked."""
    implementation = report.get("implementation")
    writer = implementation if isinstance(implementation, Mapping) else {}
    return f"written by {writer.get('package')} {writer.get('version')}; this is {version_of('dp_curriculum')}"


def events_of_report(report: Mapping[str, Any]) -> tuple[GaussianEvent, ...]:
    """
    The events of the listed mechanisms.

    Raises:
        ValueError: If the list is missing, or a mechanism is not one that can be accounted.
    """
    try:
        rows = list(report["mechanisms"])
        for row in rows:
            full = row["sample_rate"] == 1
            expected = "gaussian" if full else "subsampled-gaussian"
            if row["mechanism"] != expected or row["sampling"] not in (("none", "poisson") if full else ("poisson",)):
                raise ValueError(f"Expected mechanism {row['name']!r} to be {expected} with Poisson sampling.")
        return tuple(GaussianEvent(row["noise_multiplier"], row["sample_rate"], row["num_steps"]) for row in rows)
    except (KeyError, TypeError) as error:
        raise ValueError(f"Expected the report to list its mechanisms: {type(error).__name__} {error}.") from None


def charge_of_report(report: Mapping[str, Any]) -> Charge:
    """
    The charge that the claims are about: the listed mechanisms, or all tries where they are listed.

    Raises:
        ValueError: If one of the lists cannot be accounted.
    """
    tuning = report.get("hyperparameter_tuning")
    if isinstance(tuning, Mapping) and "charge" in tuning:
        return Charge.from_dict(tuning["charge"])
    return Charge(events_of_report(report))


def verify_report(report: Mapping[str, Any]) -> list[Check]:
    """
    Computes epsilon, under both adjacencies, and mu from the listed mechanisms, and compares with the claims.

    Args:
        report (`Mapping`): What `privacy.json` holds.

    Returns:
        `list[Check]`: A claim holds if it is not below the computed value, and not above by more than 1e-3. A report
        that claims nothing holds only in that it says so. The words of another version are not checked, but for the
        numbers in them.

    Raises:
        ValueError: If the report is not one.
    """
    if not isinstance(report, Mapping):
        raise ValueError(
            f"Expected a privacy report to be a mapping of names to values: it is a {type(report).__name__}."
        )
    if not report.get("private"):
        return [
            Check("private", "no", "no guarantee is claimed", report.get("private") is False),
            _check_no_statement(report),
        ]
    events, charge = events_of_report(report), charge_of_report(report)
    delta, group_size = report.get("delta"), report.get("group_size", 1)
    if not isinstance(delta, float):
        raise ValueError(f"Expected delta={delta} in the report to be a number in (0, 1).")
    checks = []
    claims = {
        "epsilon": report.get("adjacency"),
        "epsilon_add_or_remove_one": "add-or-remove-one",
        "epsilon_replace_one": "replace-one",
    }
    for name, adjacency in claims.items():
        computed = charge.epsilon(delta, adjacency=adjacency, group_size=group_size)  # type: ignore[arg-type]
        checks.append(_compare(f"{name} ({adjacency})", report.get(name), computed))
    mu = charge.gdp_mu(adjacency=report.get("adjacency"), group_size=group_size)  # type: ignore[arg-type]
    if mu is None and "gdp_mu" in report and report["gdp_mu"] is None:
        checks.append(Check("gdp_mu", "none", "none", True))
    else:
        checks.append(_compare("gdp_mu", report.get("gdp_mu"), math.inf if mu is None else mu))
    checks.append(_check_statement(report, charge, delta, group_size))
    if not events:
        checks.append(_check_nothing_spent(report))
    if charge != Charge(events):
        checks.append(Check("mechanisms of a try", "among the tries", "they are", charge.holds(events)))
    if "dataset_spending" in report:
        checks += _check_dataset(report["dataset_spending"], charge)
    target = report.get("target_epsilon")
    if target is not None:
        epsilon = report.get("epsilon")
        within = isinstance(target, float) and isinstance(epsilon, float) and 0 <= epsilon <= target < math.inf
        checks.append(Check("epsilon within its target", f"{target}", f"{epsilon}", within))
    return checks


@functools.cache
def report_schema() -> dict[str, Any]:
    """The JSON Schema of a privacy report, of the version that this package writes."""
    return json.loads(
        resources.files("dp_curriculum.privacy").joinpath("privacy.schema.json").read_text(encoding="utf-8")
    )


def check_schema(report: Any) -> Check:
    """Checks that a report follows the schema; `computed` names the first part that does not."""
    version = report.get("schema_version") if isinstance(report, Mapping) else None
    validator = jsonschema.Draft202012Validator(report_schema())
    errors = sorted(validator.iter_errors(report), key=lambda error: [str(step) for step in error.absolute_path])
    if not errors:
        return Check("schema", f"{version}", "followed", True)
    place = "/".join(str(step) for step in errors[0].absolute_path) or "the report"
    return Check("schema", f"{version}", f"{place}: {' '.join(errors[0].message.split())[:160]}", False)


def _check_no_statement(report: Mapping[str, Any]) -> Check:
    """Checks that a report without a guarantee says so in words, and gives its reasons."""
    reasons, statement = report.get("not_private_reasons"), report.get("statement")
    expected = no_guarantee(map(str, reasons)) if isinstance(reasons, list) else None
    if statement != expected and not written_by_this_version(report) and str(statement).startswith("NOT PRIVATE"):
        return not_checked("statement", f"{str(statement)[:40]}...", version_text(report))
    return Check("statement", f"{str(statement)[:40]}...", "NOT PRIVATE, and why", statement == expected)


def _check_dataset(facts: Mapping[str, Any], charge: Charge) -> list[Check]:
    """Computes what was spent on the dataset again, and checks that this release is in it."""
    try:
        spent = Charge(events_from_dicts(facts["mechanisms"]))
        chosen = [Selection.from_dict(values) for values in facts["selections"]]
        computed = total_epsilon(
            [spent, *(Charge((), selection) for selection in chosen)],
            facts["delta"],
            adjacency=facts["adjacency"],
            group_size=facts["group_size"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"Expected dataset_spending to list its mechanisms: {type(error).__name__}.") from None
    is_in = spent.covers(charge.events) and charge.selection in (None, *chosen)
    return [
        _compare("epsilon of the dataset", facts.get("epsilon"), computed),
        Check("mechanisms", "among those of the dataset", "they are" if is_in else "they are not", is_in),
    ]


def _check_nothing_spent(report: Mapping[str, Any]) -> Check:
    """Epsilon 0 is true of what was made from public images; weights that were made from nothing are not shared."""
    public = report.get("public_data")
    found = f"{len(public)} public datasets" if isinstance(public, list) else "none"
    return Check("mechanisms", "none, so that epsilon is 0", f"trained on: {found}", bool(public))


def _check_statement(report: Mapping[str, Any], charge: Charge, delta: float, group_size: int) -> Check:
    """Checks that the sentence for people says the numbers, or all of it if this version wrote it."""
    epsilon, adjacency = report.get("epsilon"), report.get("adjacency")
    name, statement = "statement", str(report.get("statement"))
    if not (isinstance(epsilon, float) and math.isfinite(epsilon) and epsilon >= 0):
        return Check(name, "some", "no number to state", False)
    expected = f"({round_up(epsilon):g}, {delta:g})"
    shown = f"{statement[:40]}..."
    if not (f"{expected}-differentially private" in statement and f"({adjacency} adjacency)" in statement):
        return Check(name, shown, f"{expected}, {adjacency}", False)
    if not written_by_this_version(report):
        return not_checked(name, shown, version_text(report))
    unprotected = report.get("unprotected_quantities")
    whole = guarantee(
        charge,
        epsilon=epsilon,
        delta=delta,
        adjacency=adjacency,  # type: ignore[arg-type]
        group_size=group_size,
        unprotected=unprotected if isinstance(unprotected, list) else (),
        unit=unit_of_report(report),
    )
    return Check(name, shown, f"{expected}, {adjacency}", statement == whole)


def _compare(name: str, claimed: Any, computed: float) -> Check:
    is_number = isinstance(claimed, float) and math.copysign(1.0, claimed) > 0  # "-0" is no epsilon
    holds = is_number and -1e-6 <= claimed - computed <= TOLERANCE
    return Check(name, f"{claimed}", f"{computed:.6f}", holds)
