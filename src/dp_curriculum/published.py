"""Whether what was shared makes claims that hold: numbers, schema, copies of the report, card and weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DModel
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dp_curriculum.export import MODEL_FILES, WEIGHTS
from dp_curriculum.finishing import hash_file
from dp_curriculum.hub import fetch_published
from dp_curriculum.model_card import privacy_section
from dp_curriculum.privacy_report import version_of
from dp_curriculum.run_folder import RunFolder
from dp_curriculum.scan import UnsafeFile, read_safetensors_header
from dp_curriculum.verification import Check, check_schema, events_of_report, verify_report
from dp_curriculum.witnesses import ask_witnesses


READ = ("README.md", "privacy.json", "model_index.json", "unet/config.json", WEIGHTS)  # what a verification reads
_OTHERS_ALLOWED = frozenset({".gitattributes"})  # made by the Hub


def check_report(report: Any) -> list[Check]:
    """Schema, then all claims against the mechanisms, then the witnesses. What breaks the schema is not computed."""
    checks = [check_schema(report)]
    if not checks[0].holds:
        return checks
    try:
        checks += verify_report(report)
        if report["private"]:
            events = events_of_report(report)
            checks += ask_witnesses(events, report["delta"], report["epsilon_add_or_remove_one"])
    except ValueError as error:
        checks.append(Check("mechanisms", "can be accounted", str(error), False))
    return checks


def check_folder(folder: Path) -> list[Check]:
    """Checks the folder of a run, a copy of a repository, or a dataset that `synthesize` wrote."""
    files = {name: folder / name for name in READ if (folder / name).is_file()}
    if "model_index.json" not in files and (folder / "data").is_dir():
        return check_dataset(files)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    # What huggingface_hub and git write beside a download is not of the repository.
    shared = [name for name in names if not name.startswith((".cache/", ".git/"))]
    return check_model(files, all_names=None if RunFolder(folder).holds_run else shared)


def check_repository(repo_id: str, *, repo_type: str = "model", revision: str | None = None) -> list[Check]:
    """
    Downloads what is to be checked, and checks it.

    Raises:
        ValueError: If there is no such repository, or it holds no report.
        HubError: If the Hub was not reached or failed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"Expected {repo_id} to be a folder, a file or a Hub id: there is no such thing.") from None
    names = READ if repo_type == "model" else ("README.md", "privacy.json")
    files, listed = fetch_published(repo_id, names, repo_type=repo_type, revision=revision)
    return check_model(files, all_names=listed) if repo_type == "model" else check_dataset(files)


def check_model(files: Mapping[str, Path], *, all_names: list[str] | None = None) -> list[Check]:
    """
    Checks a shared model.

    Args:
        files (`Mapping[str, Path]`): Files of [`READ`], as far as they are there, by their names.
        all_names (`list[str]`, *optional*): Names of all files of the repository, to look for those that do not
            belong; `None` for the folder of a run, in which other things lie.

    Raises:
        ValueError: If there is no report to check.
    """
    report = read_report(files)
    checks = check_report(report)
    if not checks[0].holds:
        return checks
    checks.append(_safely("card", lambda: _check_card(files, report)))
    checks.append(_safely("model_index.json", lambda: _check_index(files, report)))
    checks.append(_safely("weights", lambda: _check_weights(files, report)))
    if all_names is not None:
        odd = sorted(set(all_names) - set(MODEL_FILES) - _OTHERS_ALLOWED)
        found = f"also {', '.join(map(repr, odd[:3]))}{', ...' if len(odd) > 3 else ''}" if odd else "no others"
        checks.append(Check("files", "those of a pipeline", found, not odd))
    return checks


def check_dataset(files: Mapping[str, Path]) -> list[Check]:
    """Checks the report and the card of a shared synthetic dataset, which carries the claim of its model."""
    report = read_report(files)
    checks = check_report(report)
    if checks[0].holds:
        checks.append(_safely("card", lambda: _check_card(files, report)))
    return checks


def read_report(files: Mapping[str, Path]) -> Any:
    """
    The report, from `privacy.json`; from the card where that is all there is.

    Raises:
        ValueError: If neither holds one.
    """
    try:
        if "privacy.json" in files:
            return json.loads(files["privacy.json"].read_text(encoding="utf-8"))
        return _card_block(files["README.md"].read_text(encoding="utf-8"))
    except KeyError:
        raise ValueError("Expected a privacy report: there is no privacy.json, and no block on a card.") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"Expected a readable privacy report: {type(error).__name__}.") from None


def _card_block(text: str) -> Any:
    opening, block, _ = text.split("---\n", 2)
    if opening:
        raise ValueError("no metadata")
    return yaml.safe_load(block)["differential_privacy"]


def _safely(name: str, check: Callable[[], Check]) -> Check:
    """A check of a file that may hold anything: what cannot be read does not hold."""
    try:
        return check()
    except UnsafeFile as error:
        return Check(name, "as written", str(error), False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        return Check(name, "as written", f"cannot be read: {type(error).__name__}", False)


def _check_card(files: Mapping[str, Path], report: Mapping[str, Any]) -> Check:
    if "README.md" not in files:
        return Check("card", "there", "missing", False)
    text = files["README.md"].read_text(encoding="utf-8")
    if _card_block(text) != report:
        return Check("card", "the same block as privacy.json", "another block", False)
    same_version = report["implementation"]["version"] == version_of("dp_curriculum")
    said = privacy_section(report) if same_version else report["statement"]
    holds = said in text
    return Check("card", "says what privacy.json says", "it does" if holds else "its text was edited", holds)


def _check_index(files: Mapping[str, Path], report: Mapping[str, Any]) -> Check:
    if "model_index.json" not in files:
        return Check("model_index.json", "there", "missing", False)
    index = json.loads(files["model_index.json"].read_text(encoding="utf-8"))
    holds = index["privacy"] == report
    return Check("pipe.privacy", "the same as privacy.json", "it is" if holds else "another report", holds)


def _check_weights(files: Mapping[str, Path], report: Mapping[str, Any]) -> Check:
    """sha256 of the weights, and that they are tensors of this network. Nothing of them is loaded."""
    if WEIGHTS not in files:
        return Check("weights", WEIGHTS, "missing", False)
    header = read_safetensors_header(files[WEIGHTS])
    header.pop("__metadata__", None)
    config = json.loads(files["unet/config.json"].read_text(encoding="utf-8"))
    if config["_class_name"] != "UNet2DModel":
        return Check("weights", "of a UNet2DModel", f"of a {config['_class_name']}", False)
    with torch.device("meta"):
        expected = {name: list(value.shape) for name, value in UNet2DModel.from_config(config).state_dict().items()}
    if {name: row["shape"] for name, row in header.items()} != expected:
        return Check("weights", "of unet/config.json", "of another network", False)
    claimed, computed = report["weights"], {WEIGHTS: hash_file(files[WEIGHTS])}
    shown = str(claimed.get(WEIGHTS))[:16]
    return Check("weights (sha256)", f"{shown}...", f"{computed[WEIGHTS][:16]}...", claimed == computed)
