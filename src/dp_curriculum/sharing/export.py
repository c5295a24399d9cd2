"""The folder that is shared: an allow-list of files, written anew from a run that is private, and looked through."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DModel
from huggingface_hub import get_token
from PIL import Image
from safetensors.torch import load_file

from dp_curriculum import closed_form_prior, pipeline_dp_curriculum
from dp_curriculum.closed_form_prior import ClosedFormPrior
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.trainable import describe_weights
from dp_curriculum.evaluation.evaluation import NO_TRAINING_IMAGE
from dp_curriculum.lessons.planned import plan_lessons
from dp_curriculum.privacy.ledger import LedgerTamperedError, PrivacyLedger
from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.privacy.privacy_report import PrivacyReport, computation_facts
from dp_curriculum.privacy.verification import check_schema, verify_report
from dp_curriculum.runs.run_contents import check_contents
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.checkpointing import appearing_in
from dp_curriculum.runtime.hashing import hash_file
from dp_curriculum.sharing.dataset_notes import note_release
from dp_curriculum.sharing.release import hash_weights, release_card, report_text
from dp_curriculum.sharing.scan import scan_folder


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MODEL_FILES = (
    "README.md",
    "model_index.json",
    "pipeline.py",
    "privacy.json",
    "samples.png",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    WEIGHTS,
)
PRIOR_WEIGHTS = "prior/diffusion_pytorch_model.safetensors"
PRIOR_CODE = f"prior/{closed_form_prior.SHIPPED_AS}.py"
PRIOR_FILES = ("prior/config.json", PRIOR_WEIGHTS, PRIOR_CODE)
VAE_CONFIG, VAE_WEIGHTS = "vae/config.json", "vae/diffusion_pytorch_model.safetensors"
PARTS = {"prior": PRIOR_FILES, "vae": (VAE_CONFIG, VAE_WEIGHTS)}  # that a model may have, with their files
_JSON_FILES = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json")
_MIN_NAME = 5  # characters: "/" and "/tmp" are in too many texts that are no place


def parts_of(names: Collection[str]) -> tuple[str, ...]:
    """The parts of which there is a file; then all of them have to be there."""
    return tuple(part for part, files in PARTS.items() if not set(files).isdisjoint(names))


def model_files(parts: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the files of a model that is shared, with those of its parts."""
    return (*MODEL_FILES, *(name for part in parts for name in PARTS[part]))


def hashed_files(parts: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of those whose hashes are on its card; those of the weights are in its report."""
    weights = ("README.md", WEIGHTS, PRIOR_WEIGHTS, VAE_WEIGHTS)
    return tuple(name for name in model_files(parts) if name not in weights)


class ExportRefused(ValueError):
    """Raised if what was asked to be shared is not private, or is no model."""


def export_release(
    output_dir: str | Path,
    destination: str | Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    allow_non_private: bool = False,
    dataset_ledger: str | None = None,
    shared_as: tuple[str, str] | None = None,
) -> PrivacyReport:
    r"""
    Writes the files of [`model_files`] into a new folder: what of a run may be shared.

    Args:
        output_dir (`str` or `Path`): Folder of a run.
        destination (`str` or `Path`): A new or empty folder.
        repo_id (`str`, *optional*): Hub id that the card names.
        license (`str`, *optional*): Licence of the weights, as the Hub names it.
        allow_non_private (`bool`, *optional*, defaults to `False`): Whether a run without guarantee may be shared; its
            card, report and pipeline then say NOT PRIVATE, and why.
        dataset_ledger (`str`, *optional*): The ledger that the run is charged to, if it was moved.
        shared_as (`tuple[str, str]`, *optional*): How and to where, as that ledger notes it; by default an export to
            `destination`.

    Returns:
        [`PrivacyReport`]: As it is shared.

    Raises:
        ExportRefused: If the run is not private.
        UnsafeFile: If a file would hold a secret or a local path, or is not what its name says.
        ValueError: If `output_dir` is not the folder of a run.
    """
    source, target = RunFolder(Path(output_dir)), Path(destination)
    config, report = _read_run(source)
    reasons = not_private_reasons(source, config, report)
    if reasons and not allow_non_private:
        raise ExportRefused(
            f"Refusing to export {source.root}: {'; '.join(reasons)}. Pass --allow_non_private to share it anyway, "
            "stamped NOT PRIVATE."
        )
    if reasons:
        report = _stamped(report, reasons, source.root)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"Expected {target} to be a new or empty folder.")
    how, to = shared_as or ("export", str(target.resolve()))
    spending = note_release(source, config, how=how, to=to, dataset_ledger=dataset_ledger)
    if spending is not None and not reasons:
        report = report.with_dataset(spending)
    with appearing_in(target) as folder:  # what is refused, or fails, leaves nothing
        _write(source, config, report, folder, repo_id, license)
        scan_folder(
            folder, model_files(held_parts(source.root)), local_names=local_names(_places_of_run(source, config))
        )
        _check_weights(folder)
    return report


def held_parts(folder: Path) -> tuple[str, ...]:
    """The parts that the pipeline in a folder has."""
    return tuple(
        part for part, weights in (("prior", PRIOR_WEIGHTS), ("vae", VAE_WEIGHTS)) if (folder / weights).is_file()
    )


def _read_run(source: RunFolder) -> tuple[CurriculumConfig, PrivacyReport]:
    if not source.config.is_file():
        raise ValueError(f"Expected {source.root} to be the folder of a run: it holds no run/config.yaml.")
    for name in (*_JSON_FILES, "samples.png", WEIGHTS):
        if not (source.root / name).is_file():
            raise ValueError(f"Expected {source.root} to be the folder of a finished run: it holds no {name}.")
    return CurriculumConfig.from_yaml(source.config, finished=True), PrivacyReport.from_file(source.privacy)


def not_private_reasons(source: RunFolder, config: CurriculumConfig, report: PrivacyReport) -> list[str]:
    """
    Reasons why what a run released must not be called private; empty if it may. The ledger is the witness.

    The ledger of an earlier version has no hashes, and does not say how steps were executed: there the report's word
    is taken for it, as that version did.
    """
    if not source.ledger.is_file():
        return ["its ledger is missing"]
    try:
        with PrivacyLedger.open(source.ledger, create=False) as ledger:
            pass  # it can state what it holds even when it is closed
    except LedgerTamperedError:
        return ["its ledger was changed, or is of another run"]
    try:
        check_contents(source, plan_lessons(config), ledger)
    except LedgerTamperedError:
        return ["it holds a lesson or a checkpoint that is not of its ledger"]
    fields = report.fields
    reasons = [*ledger.not_private_reasons, *_unlike_configuration(fields, config)]
    reasons += _unlike_ledger(fields, ledger, source)
    if fields.get("private") is not True and not reasons:
        reasons.append("its report claims nothing")
    if not reasons:
        reasons += [f"{check.name} does not hold" for check in _checks(fields) if check.fails]
    return [*reasons, *_assumptions_not_met(fields, ledger)]


def _unlike_configuration(fields: Mapping[str, Any], config: CurriculumConfig) -> Iterator[str]:
    asked = {"delta": config.privacy.target_delta}
    asked |= {name: getattr(config.privacy, name) for name in ("target_epsilon", "adjacency", "group_size")}
    for name, value in asked.items():
        if fields.get(name) != value:
            yield f"its report has another {name} than its configuration"


def _unlike_ledger(fields: Mapping[str, Any], ledger: PrivacyLedger, source: RunFolder) -> Iterator[str]:
    """Yields where a report, or the files beside it, differ from the ledger."""
    weights = hash_weights(source.root)
    if ledger.mechanisms != fields["mechanisms"]:
        yield (
            "its report lists other mechanisms than its ledger (resume a run that was stopped before it saved, with "
            "--resume_from_checkpoint latest)"
        )
    if fields.get("weights") != weights:
        yield "its weights are not those of its report"
    if not ledger.has_hashes:
        return
    execution, said = ledger.execution, fields.get("implementation", {})
    different = [name for name, value in computation_facts(execution).items() if said.get(name) != value]
    if different or fields.get("randomness") != dict(execution.randomness):
        yield "its report has another randomness, device, precision or check of gradients than its ledger"
    if hash_file(source.privacy) not in ledger.digests(source.name(source.privacy)):
        yield "its report is not the one that was recorded in its ledger"
    if any(digest not in ledger.digests(name) for name, digest in weights.items()):
        yield "its weights are not those that were recorded in its ledger"


def _assumptions_not_met(fields: Mapping[str, Any], ledger: PrivacyLedger) -> Iterator[str]:
    """Secret randomness, and gradients that were checked, by the word of the ledger where it has one."""
    randomness, checked = fields.get("randomness", {}), fields.get("implementation", {})
    if ledger.has_hashes:
        randomness, checked = ledger.execution.randomness, computation_facts(ledger.execution)
    if randomness.get("secret") is not True:
        yield "masks and noise do not come from secret randomness"
    is_hard = any(row["name"] == DP_SGD for row in ledger.mechanisms)
    if is_hard and checked.get("verified_per_image_gradients") is not True:
        yield "its per-image gradients were not checked"


def _checks(fields: Any) -> Iterator[Any]:
    yield check_schema(fields)
    try:
        yield from verify_report(fields)
    except ValueError:  # the schema says what is wrong
        return


def _stamped(report: PrivacyReport, reasons: Iterable[str], root: Path) -> PrivacyReport:
    fields = report.without_guarantee(*reasons).to_dict()
    fields["weights"] = hash_weights(root)
    return PrivacyReport(float("inf"), report.delta, fields)


def _write(
    source: RunFolder,
    config: CurriculumConfig,
    report: PrivacyReport,
    target: Path,
    repo_id: str | None,
    license: str | None,
) -> None:
    (target / "unet").mkdir(parents=True)
    (target / "scheduler").mkdir()
    for name in _JSON_FILES:
        values = _without_places(json.loads((source.root / name).read_text(encoding="utf-8")))
        if name == "model_index.json":
            values["privacy"] = report.to_dict()
        (target / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(source.root / WEIGHTS, target / WEIGHTS)
    for part in held_parts(source.root):
        _write_part(part, source.root, target)
    shutil.copyfile(pipeline_dp_curriculum.__file__, target / "pipeline.py")
    with Image.open(source.sample_sheet) as sheet:  # the pixels alone: a PNG can hold text
        Image.frombytes(sheet.mode, sheet.size, sheet.tobytes()).save(target / "samples.png")
    (target / "privacy.json").write_text(report_text(report), encoding="utf-8")
    names = json.loads((target / "model_index.json").read_text(encoding="utf-8"))["id2label"]
    card = release_card(
        config,
        report,
        class_names=tuple(str(names[index]) for index in sorted(names, key=int)),
        num_parameters=_num_parameters(target),
        num_photos=_num_photos(target),
        trained=describe_weights(_empty_unet(target), config.dp_sgd),
        repo_id=repo_id,
        license=license,
        metrics=_measured(source, report),
        files={name: hash_file(target / name) for name in hashed_files(held_parts(target))},
    )
    (target / "README.md").write_text(card, encoding="utf-8")


def _write_part(part: str, source: Path, target: Path) -> None:
    """Writes the configuration and the weights of a part; the code of a prior is that of this version."""
    (target / part).mkdir()
    for name in PARTS[part]:
        if name == PRIOR_CODE:
            shutil.copyfile(closed_form_prior.__file__, target / name)
        elif name.endswith(".json"):
            values = _without_places(json.loads((source / name).read_text(encoding="utf-8")))
            (target / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(source / name, target / name)


def _without_places(values: Any) -> Any:
    """JSON without `_name_or_path`, which diffusers fills with the folder that a model was loaded from."""
    if isinstance(values, dict):
        return {name: _without_places(value) for name, value in values.items() if name != "_name_or_path"}
    return [_without_places(value) for value in values] if isinstance(values, list) else values


def _read_config(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _empty_unet(folder: Path) -> UNet2DModel:
    with torch.device("meta"):
        return UNet2DModel.from_config(_read_config(folder / "unet/config.json"))


def _num_parameters(folder: Path) -> int:
    return sum(parameter.numel() for parameter in _empty_unet(folder).parameters())


def _num_photos(folder: Path) -> int:
    """Public images that the prior of a model holds."""
    if "prior" not in held_parts(folder):
        return 0
    return int(_read_config(folder / "prior/config.json").get("num_photos", 0))  # priors of before had none


def _check_weights(folder: Path) -> None:
    """Refuses tensors that the network does not have, and weights that are no numbers."""
    models: dict[str, ModelMixin] = {WEIGHTS: _empty_unet(folder)}
    if "prior" in held_parts(folder):
        models[PRIOR_WEIGHTS] = ClosedFormPrior.from_config(_read_config(folder / "prior/config.json"))
    if "vae" in held_parts(folder):
        with torch.device("meta"):
            models[VAE_WEIGHTS] = AutoencoderKL.from_config(_read_config(folder / VAE_CONFIG))
    for file, model in models.items():
        expected = {name: value.shape for name, value in model.state_dict().items()}
        saved = load_file(folder / file)
        if {name: value.shape for name, value in saved.items()} != expected:
            where = file.replace("diffusion_pytorch_model.safetensors", "config.json")
            raise ExportRefused(f"Expected {file} to hold the weights of {where}, and no other tensor.")
        for name, value in saved.items():
            if not torch.isfinite(value).all():
                raise ExportRefused(f"Expected the weights to be finite: {name} is not; train again.")


def _measured(source: RunFolder, report: PrivacyReport) -> list[dict[str, Any]]:
    """Numbers of `evaluate` on this very model that read no training image, of a dataset that the report names."""
    name = report.fields["protected_dataset"]["name"]
    path = source.root / "run" / "evaluation" / "evaluation.json"
    if name is None or not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("epsilon") != report.statement() or found.get("filter_by_classifier"):
        return []  # of another model, or of chosen images, which its users do not get by themselves
    named = f"{Path(name).name} ("
    return [
        {"name": metric["name"], "value": metric["value"], "data": metric["data"]}
        for metric in found["metrics"]
        if metric["privacy"] == NO_TRAINING_IMAGE and named in metric["data"] and metric["value"] is not None
    ]


def _places_of_run(source: RunFolder, config: CurriculumConfig) -> list[Path]:
    """Folders in which the run was made, and in which its images are."""
    places = [source.root.resolve(), source.root.absolute(), Path.home(), Path.cwd(), Path(tempfile.gettempdir())]
    models = (config.start.pretrained_model_name_or_path, config.autoencoder.vae_name_or_path)
    for name in (config.data.train_data_dir, config.data.dataset_name, *models):
        if name is not None and (Path(name).is_absolute() or (os.sep in name and Path(name).exists())):
            places += [Path(name), Path(name).resolve()]
    return places


def local_names(places: Iterable[Path]) -> dict[str, str]:
    """Strings that must not be shared, with what they are: places of this machine, and its Hub token."""
    names = dict.fromkeys(map(str, places), "a local path")
    token = get_token()
    if token is not None:
        names[token] = "a Hub token"
    return {name: what for name, what in names.items() if len(name) >= _MIN_NAME}
