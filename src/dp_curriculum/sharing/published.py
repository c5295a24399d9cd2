"""Checks of published claims: numbers, words, copies of the report, card, code and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.privacy.privacy_report import PrivacyReport
from dp_curriculum.privacy.verification import Check, charge_of_report, check_schema, verify_report
from dp_curriculum.privacy.witnesses import ask_witnesses
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.hashing import hash_file
from dp_curriculum.sharing.card_check import Known, check_dataset_card, check_model_card, listed_files, split_card
from dp_curriculum.sharing.export import PARTS, hashed_files, model_files, not_private_reasons, parts_of
from dp_curriculum.sharing.hub import fetch_published
from dp_curriculum.sharing.published_files import (
    DATASET_FILES,
    check_dataset_names,
    check_index,
    check_listed,
    check_model_names,
    check_pipeline_code,
    check_prior_code,
    check_sample_sheet,
    check_sizes,
    check_weights,
    class_names,
    find_files,
    hashes_of_model,
    network_text,
    sampler_text,
)
from dp_curriculum.sharing.report_words import check_words
from dp_curriculum.sharing.scan import UnsafeFile
from dp_curriculum.sharing.strict import AmbiguousFile, read_json, read_yaml


RUN = "run"  # name of the checks of a local run
CARD = "card"
_LOADED = ("unet/", "scheduler/", "prior/", "vae/")  # folders in which a loader looks for files


def check_report(report: Any) -> list[Check]:
    """Schema, then all claims against the mechanisms, then the witnesses. What breaks the schema is not computed."""
    checks = [check_schema(report)]
    if not checks[0].holds:
        return checks
    try:
        checks += verify_report(report)
        if report["private"] and charge_of_report(report).selection is None:  # they know compositions alone
            events = charge_of_report(report).events
            checks += ask_witnesses(events, report["delta"], report["epsilon_add_or_remove_one"])
    except ValueError as error:
        checks.append(Check("mechanisms", "can be accounted", str(error), False))
    return [*checks, *_safely("words of the report", lambda: [check_words(report)])]


def check_folder(folder: Path, *, local_run: bool = False) -> list[Check]:
    """
    Checks a copy of a repository, or a dataset that `synthesize` wrote.

    Args:
        folder (`Path`): Where it is.
        local_run (`bool`, *optional*, defaults to `False`): Whether it is the folder of a run of one's own: its
            ledger is checked too, and other things may lie in it. Nothing in a folder says that it is: what was
            downloaded can hold any file.

    Raises:
        ValueError: If there is no report to check, or no run where one is asked for.
    """
    files, odd = find_files(folder)
    if local_run:
        of_run = _check_run(folder)
        return [*check_model(_known(files), all_names=_loaded([*files, *odd]), local=True), *of_run]
    if "model_index.json" not in files and (folder / "data").is_dir():
        shards = {name: hash_file(path) for name, path in files.items() if path.suffix == ".parquet"}
        names = check_dataset_names([*files, *odd], local=True)
        return [*check_dataset(_known(files, DATASET_FILES), shards), names]
    return check_model(_known(files), all_names=[*files, *odd])


def check_card_file(path: Path) -> list[Check]:
    """Checks a card by itself: its report, and its text as far as that follows from it."""
    files = {"README.md": path}
    check_sizes(files)
    report = read_report(files)
    if isinstance(report, Check):
        return [report]
    checks = check_report(report)
    is_dataset = "images = load_dataset(" in _text(path)
    return [*checks, *_check_card(files, report, is_dataset=is_dataset)] if checks[0].holds else checks


def check_repository(repo_id: str, *, repo_type: str = "model", revision: str | None = None) -> list[Check]:
    """
    Downloads what is to be checked, and checks it. Nothing of it is executed.

    Raises:
        ValueError: If there is no such repository, or it holds no report.
        HubError: If the Hub was not reached or failed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"Expected {repo_id} to be a folder, a file or a Hub id: there is no such thing.") from None
    names = model_files(PARTS) if repo_type == "model" else DATASET_FILES
    files, listed = fetch_published(repo_id, names, repo_type=repo_type, revision=revision)
    if repo_type == "model":
        return check_model(files, all_names=list(listed), repo_id=repo_id)
    shards = {name: digest for name, digest in listed.items() if name.endswith(".parquet")}
    return [*check_dataset(files, shards, repo_id=repo_id), check_dataset_names(listed, local=False)]


def check_model(
    files: Mapping[str, Path],
    *,
    all_names: list[str] | None = None,
    repo_id: str | None = None,
    local: bool = False,
) -> list[Check]:
    """
    Checks a shared model.

    Args:
        files (`Mapping[str, Path]`): Files of [`~export.model_files`], as far as they are there, by their names.
        all_names (`list[str]`, *optional*): Names of all files of the repository, to look for those that do not
            belong; those of `files` if unset.
        repo_id (`str`, *optional*): The repository that they come from; the card has to name it.
        local (`bool`, *optional*, defaults to `False`): Whether they are in the folder of a run of one's own, whose
            card lists no other files.

    Raises:
        ValueError: If there is no report to check.
    """
    report = read_report(files)
    if isinstance(report, Check):
        return [report]
    checks = check_report(report)
    if not checks[0].holds:
        return checks
    checks += _check_card(files, report, repo_id=repo_id)
    checks += _safely("model_index.json", lambda: check_index(files, report))
    checks += _safely("weights", lambda: [check_weights(files, report)])
    checks += _safely("pipeline.py", lambda: [check_pipeline_code(files, report)])
    checks += _safely("prior", lambda: check_prior_code(files, report))
    checks += _safely("samples.png", lambda: [check_sample_sheet(files)])
    if not local:
        checks += _safely(
            "other files (sha256)",
            lambda: [_check_hashes(files, hashes_of_model(files), hashed_files(parts_of(files)))],
        )
    return [*checks, check_model_names(list(files) if all_names is None else all_names)]


def check_dataset(
    files: Mapping[str, Path], shards: Mapping[str, str | None], *, repo_id: str | None = None
) -> list[Check]:
    """
    Checks the report and the card of a shared synthetic dataset, which carries the claim of its model.

    Args:
        files (`Mapping[str, Path]`): Card and report, by their names.
        shards (`Mapping[str, str | None]`): sha256 of each file of images; `None` where it is not known.
        repo_id (`str`, *optional*): The repository that they come from; the card has to name it.

    Raises:
        ValueError: If there is no report to check.
    """
    report = read_report(files)
    if isinstance(report, Check):
        return [report]
    checks = check_report(report)
    if not checks[0].holds:
        return checks
    checks += _check_card(files, report, repo_id=repo_id, is_dataset=True)
    return [*checks, *_safely("other files (sha256)", lambda: [_check_hashes(files, shards, shards)])]


def read_report(files: Mapping[str, Path]) -> Any:
    """
    The report, from `privacy.json`; from the card where that is all there is. A failed [`~verification.Check`] where
    it can be read in more ways than one.

    Raises:
        ValueError: If neither holds one.
    """
    try:
        if "privacy.json" in files:
            return read_json(files["privacy.json"].read_bytes())
        return read_yaml(split_card(_text(files["README.md"]))[0])["differential_privacy"]
    except AmbiguousFile as error:
        return Check("privacy report", "one, for any program", str(error), False)
    except KeyError:
        raise ValueError("Expected a privacy report: there is no privacy.json, and no block on a card.") from None
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"Expected a readable privacy report: {type(error).__name__}.") from None


def _text(path: Path) -> str:
    """A text as its bytes are: no line ending is translated."""
    return path.read_bytes().decode("utf-8")


def _known(files: Mapping[str, Path], names: tuple[str, ...] = model_files(PARTS)) -> dict[str, Path]:
    known = {name: files[name] for name in names if name in files}
    check_sizes(known)
    return known


def _loaded(names: list[str]) -> list[str]:
    """Selects from the files of a run those of the pipeline, and those that lie where a loader looks."""
    return [name for name in names if name in model_files(PARTS) or name.startswith(_LOADED)]


def _safely(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    """Checks of a file that may hold anything: what cannot be read does not hold."""
    try:
        return check()
    except (UnsafeFile, AmbiguousFile) as error:
        return [Check(name, "as written", str(error), False)]
    except Exception as error:  # of libraries on what somebody made up
        return [Check(name, "as written", f"cannot be read: {type(error).__name__}", False)]


def _check_card(
    files: Mapping[str, Path], report: Mapping[str, Any], *, repo_id: str | None = None, is_dataset: bool = False
) -> list[Check]:
    if "README.md" not in files:
        return [Check(CARD, "there", "missing", False)]
    check = check_dataset_card if is_dataset else check_model_card
    return _safely(CARD, lambda: check(_text(files["README.md"]), report, _known_of(files, repo_id)))


def _known_of(files: Mapping[str, Path], repo_id: str | None) -> Known:
    """Facts that the other files have about a card; a file that cannot be read has its own check."""
    has_index, has_network = "model_index.json" in files, "unet/config.json" in files
    return Known(
        repo_id=repo_id,
        class_names=_unless_broken(lambda: class_names(files)) if has_index else None,
        model=_unless_broken(lambda: network_text(files)) if has_network else None,
        sampler=_unless_broken(lambda: sampler_text(files)) if has_index else None,
    )


def _unless_broken(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception:
        return None


def _check_hashes(files: Mapping[str, Path], found: Mapping[str, str | None], expected: Any) -> Check:
    return check_listed(listed_files(_text(files["README.md"])), found, list(expected))


def _check_run(folder: Path) -> list[Check]:
    """Checks of a report against the ledger of its run: one per reason that the report does not give."""
    run = RunFolder(folder)
    if not run.config.is_file():
        raise ValueError(f"Expected {folder} to be the folder of a run, for --local_run: it holds no run/config.yaml.")
    report = PrivacyReport.from_file(run.privacy)
    reasons = not_private_reasons(run, CurriculumConfig.from_yaml(run.config, finished=True), report)
    told = report.fields.get("not_private_reasons", [])
    failed = [Check(RUN, "as its ledger has it", reason, False) for reason in reasons if reason not in told]
    return failed or [Check(RUN, "as its ledger has it", "it is", True)]
