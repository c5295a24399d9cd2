"""Release of a run: pipeline, report, card and sample sheet, computed from weights, ledger and constants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.places import DIGITS, NO_IMAGES, is_folder_name
from dp_curriculum.lessons.planned import mechanisms_of, plan_lessons
from dp_curriculum.privacy.ledger import PrivacyLedger, PrivacyReport, ReportFacts
from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.runs.run_contents import charged_steps
from dp_curriculum.runtime.hashing import hash_file as hash_file
from dp_curriculum.sharing.model_card import DEFAULT_TITLE, describe_network, render_card
from dp_curriculum.sharing.starting_words import autoencoder_of, describe_start, not_covered_of, start_of


_AN = {"image": "an image", "person": "a person"}
_PUBLISHED_EXACTLY = ("num_classes", "class_names", "image_resolution", "num_channels")


def hash_weights(folder: Path) -> dict[str, str]:
    """sha256 of each file of weights of a pipeline, by its path in the folder."""
    files = sorted(
        path
        for room in ("unet", "prior", "vae")
        for path in folder.glob(f"{room}/diffusion_pytorch_model*.safetensors")
    )
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def report_text(report: PrivacyReport) -> str:
    """Returns the report that `privacy.json` holds."""
    return json.dumps(report.to_dict(), indent=2) + "\n"


def privacy_report(
    config: CurriculumConfig,
    ledger: PrivacyLedger,
    *,
    dataset_size: int,
    num_classes: int,
    weights: Mapping[str, str],
    start: Mapping[str, str] | None = None,
    autoencoder: Mapping[str, str] | None = None,
) -> PrivacyReport:
    """
    The report, from the ledger and public facts alone; `start` is what is said of the model that it started from, and
    `autoencoder` of the one whose latents were trained on.
    """
    budget, data = config.privacy, config.data
    not_covered = ["choices made by looking at the private images", "side channels of the machine that trained"]
    planned = {row.name: row.event.num_steps for row in mechanisms_of(plan_lessons(config))}
    planned |= {DP_SGD: config.dp_sgd.num_dp_steps} if "dp_sgd" in config.curriculum.stages else {}
    if any(charged_steps(ledger, name) < steps for name, steps in planned.items()):
        not_covered.append("the choice of when to stop, if made by looking at what was released")
    if data.unit == "person":
        not_covered.append("a person who is seen in the images of somebody else")
    if budget.group_size == 1:
        together = "several persons" if data.unit == "person" else "several images of the same person"
        not_covered.append(f"{together}, together")
    if data.holdout is not None:
        not_covered.append("what is measured on the images that were held out of the training")
    not_covered += not_covered_of(start, autoencoder)
    size_is_public = budget.public_dataset_size is not None
    is_counted = not size_is_public and not data.has_no_images
    facts = ReportFacts(
        unit=data.unit,
        max_images_per_person=budget.group_size if budget.group_size > 1 else None,
        dataset_id=_hub_id(config),
        num_records=None if data.has_no_images else dataset_size,
        num_records_is_public=size_is_public,
        held_out_share=data.holdout,
        unprotected_quantities=_PUBLISHED_EXACTLY if not is_counted else ("num_records", *_PUBLISHED_EXACTLY),
        not_covered=tuple(not_covered),
        public_data=(*_public_data(config), *(model for model in (start, autoencoder) if model is not None)),
        data_domain={"resolution": data.resolution, "num_channels": data.channels, "num_classes": num_classes},
        weights=weights,
    )
    return PrivacyReport.from_ledger(
        ledger,
        target_delta=budget.target_delta,
        target_epsilon=budget.target_epsilon,
        adjacency=budget.adjacency,
        group_size=budget.group_size,
        facts=facts,
    )


def release_card(
    config: CurriculumConfig,
    report: PrivacyReport,
    *,
    class_names: tuple[str, ...],
    num_parameters: int,
    num_photos: int,
    repo_id: str | None,
    trained: str | None = None,
    license: str | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    files: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """
    The card of a release, as [`render_card`] renders it, from public constants and the report. `num_photos` are the
    public images that its prior holds, and `trained` is what [`describe_weights`] says of the network.
    """
    return render_card(
        report.to_dict(),
        repo_id=repo_id or "your-name/your-model",
        title=repo_id or DEFAULT_TITLE,
        class_names=class_names,
        training=_training_facts(config, report, num_parameters, num_photos, trained),
        dataset_id=report.fields["protected_dataset"]["name"],
        license=license,
        metrics=metrics,
        files=files,
    )


def _public_data(config: CurriculumConfig) -> tuple[Mapping[str, str], ...]:
    name = config.public_images.pretrain_dataset_name
    if name is None:
        return ()
    return ({"name": name if name == DIGITS else _hub_name(name) or "a local folder", "role": "pretraining"},)


def _hub_id(config: CurriculumConfig) -> str | None:
    """The private dataset's Hub id, if it comes from there."""
    return None if config.data.train_data_dir is not None else _hub_name(config.data.dataset_name)


def _hub_name(name: str) -> str | None:
    """A dataset's Hub id; a local folder has no public name, also where it is gone by now."""
    if name in (DIGITS, NO_IMAGES) or is_folder_name(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _training_facts(
    config: CurriculumConfig, report: PrivacyReport, num_parameters: int, num_photos: int, trained: str | None
) -> dict[str, str]:
    """Public constants of the training, as the card states them."""
    options, data = config.dp_sgd, config.data
    rows = report.fields["mechanisms"]
    taken = sum(row["num_steps"] for row in rows if row["name"] == DP_SGD)
    facts = {
        "images": _image_facts(data),
        "model": describe_network(num_parameters, *config.input_shape[:2], config.model.patch_size),
    }
    start, encoder = start_of(report.fields["public_data"]), autoencoder_of(report.fields["public_data"])
    facts |= {} if start is None else {"start": describe_start(start)}
    facts |= {} if encoder is None else {"autoencoder": describe_start(encoder)}
    if config.has_prior and "moments-covariance" in {row["name"] for row in rows}:
        facts["lesson moments"] = _prior_fact(config.lessons.moment_components)
    if num_photos:
        facts["public images"] = (
            f"{num_photos:,} are in the model, moved to the released moments of its classes; it draws from them"
        )
    facts |= _lesson_facts(config, charged={row["name"] for row in rows})
    if taken:
        draws = "1 noise draw" if options.noise_multiplicity == 1 else f"{options.noise_multiplicity} noise draws"
        facts["DP-SGD"] = (
            f"{taken} steps of {options.expected_batch_size} {config.data.unit}s on average, {draws} "
            f"{_AN[config.data.unit]}, Adam with learning rate {options.dp_learning_rate:g}"
        )
        facts |= {} if trained is None else {"weights of DP-SGD": trained}
    sampler = config.sampler
    facts["sampler"] = f"EDM stochastic Heun, {sampler.num_inference_steps} steps, S_churn {sampler.s_churn:g}"
    return facts


def _prior_fact(num_components: int) -> str:
    told = "in closed form, a prior under the network: the noisy mean and covariance of each class"
    if num_components == 1:
        return f"{told}, paid for by its two queries"
    return f"{told}, and those of {num_components} parts of it, paid for by its three queries"


def _image_facts(data: DataConfig) -> str:
    """The conventions by which a file became pixels; a user of the model has images of the same kind."""
    deep = (
        f"{data.intensity_range[0]:g} to {data.intensity_range[1]:g}"
        if data.intensity_range
        else "0 to 65535, floats over 0 to 1"
    )
    return (
        f"cropped to squares of {data.resolution}x{data.resolution}, {'grey' if data.channels == 1 else 'RGB'}; "
        f"pixels of more than 8 bits range over {deep}; grey level behind transparent pixels {data.alpha_background:g}"
    )


def _lesson_facts(config: CurriculumConfig, *, charged: set[str]) -> dict[str, str]:
    """The lessons that were taught, alone or together; of a run that was stopped, those that it came to."""
    pretraining = config.pretraining
    # Where DP-SGD was not reached a signal may have ended a lesson early, as patience may anywhere.
    at_most = "at most " if DP_SGD not in charged or pretraining.pretrain_patience is not None else ""
    facts = {}
    for group in plan_lessons(config):
        group = tuple(lesson for lesson in group if not (config.has_prior and lesson.number == 1))
        reached = [lesson for lesson in group if {row.name for row in lesson.mechanisms} <= charged]
        if reached:
            stages = [lesson.stage for lesson in reached]
            alone = len(group) == 1
            name = f"lesson {stages[0]}" if alone else f"lessons {' and '.join(stages)}, taught at once"
            spends = " beyond its query" if alone else " beyond their queries"
            facts[name] = (
                f"{at_most}{len(group) * pretraining.pretrain_steps} steps of {pretraining.pretrain_batch_size} "
                f"images, Adam with learning rate {pretraining.pretrain_learning_rate:g}; "
                f"{'it spends' if alone else 'they spend'} nothing"
                + (spends if any(lesson.mechanisms for lesson in reached) else "")
            )
    return facts
