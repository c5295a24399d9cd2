"""The card of a trained pipeline: Hub metadata, the privacy block, and what both mean in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import yaml

from dp_curriculum.privacy.accounting import round_up
from dp_curriculum.privacy.mechanism import DP_SGD, SCORE
from dp_curriculum.privacy.privacy_report import unit_of_report
from dp_curriculum.sharing.markdown import escape, name_text
from dp_curriculum.sharing.starting_words import autoencoder_of, start_of


DEFAULT_TITLE = "A differentially private image generator"
LOCAL_FOLDER = "a local folder"  # in place of the name of a public dataset that has none
NOT_PRIVATE = " (NOT PRIVATE)"  # after the title of what has no guarantee
MAX_NAMED_CLASSES = 20  # of more, the number alone is told
_TAGS = [
    "dp-curriculum",
    "differential-privacy",
    "dp-sgd",
    "opacus",
    "diffusers",
    "unconditional-image-generation",
    "class-conditional",
    "synthetic-data",
]

_BODY = """
# {title}

{summary}

![One row of generated images for each class](samples.png)

## Use

```python
from dp_curriculum import DPCurriculumPipeline

pipe = DPCurriculumPipeline.from_pretrained("{repo_id}")
images = pipe(class_labels={example_labels}).images
pipe.privacy  # the report below
```

Without this package, from the code that is in the repository:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", custom_pipeline="{repo_id}", trust_remote_code=True)
```

From a copy on disk, which needs no network any more:

```python
from dp_curriculum import DPCurriculumPipeline
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo_id}")
pipe = DPCurriculumPipeline.from_pretrained(folder)
```

Check the claim below on any machine, without the private images: `dp-curriculum verify {repo_id}`.

{privacy_section}
## How it was made

{training}
{measured}{files}"""

_PRIVACY = """## Privacy

{statement}

{plain}

| stage | what is released | sample rate | noise multiplier | norm bound | steps |
|---|---|---|---|---|---|
{mechanisms}

The noise multiplier is the standard deviation of the noise over the norm bound of one {unit}; steps compose one after
the other. Anyone can compute epsilon again from this table.

| | |
|---|---|
{numbers}

### Not protected

Known exactly to whoever reads this card: {unprotected}.

Outside the guarantee: {not_covered}.
"""

_PLAIN = (
    "What that means: nobody can find out about any single training image more than this limit allows, now or later, "
    "whatever else they know, and however many images they generate. What it does not mean: what many training images "
    "have in common is not hidden, for that is what the model was made to learn."
)
_PLAIN_OF_PERSONS = (
    "What that means: nobody can find out about any one person more than this limit allows, neither whether they took "
    "part nor what any of their images shows, now or later, whatever else they know, and however many images they "
    "generate. What it does not mean: what the images of many persons have in common is not hidden, for that is what "
    "the model was made to learn."
)
_PLAIN_PUBLIC = (
    "What that means: no private image was read. Epsilon is 0 because everything was learned from public images, and "
    "those are not protected at all: the model may show them as they are."
)
_PLAIN_WITHOUT = "What that means: treat the model, and every image it generates, like the training images themselves."

_IN_WORDS = {
    "num_records": "the number of training images",
    "num_classes": "the number of classes",
    "class_names": "their names",
    "image_resolution": "the resolution of the images",
    "num_channels": "the number of colour channels",
}
_QUERY = "noisy sums over the images of each class, and all images made from them"
_DP_SGD = "noisy sums of clipped gradients, hence the weights after every step"
_SCORE = "a noisy count of held-out images, by which this training was chosen among several"
_EASY, _HARD = "on noisy aggregates of the private images", "on the images themselves with DP-SGD"
_METHOD = "(the method of [DP-FETA](https://arxiv.org/abs/2504.01395))"


def _mechanism_row(row: Mapping[str, Any]) -> str:
    released = {DP_SGD: _DP_SGD, SCORE: _SCORE}.get(row["name"], _QUERY)
    sampling = "all images" if row["sample_rate"] == 1 else f"Poisson, {row['sample_rate']:.6g}"
    name = name_text(row["name"], in_table=True)
    return (
        f"| {name} | {released} | {sampling} | {row['noise_multiplier']:.6g} | {row['clip_norm']:.6g} "
        f"| {row['num_steps']} |"
    )


def _how(privacy: Mapping[str, Any]) -> str:
    """Describes how the model was trained: on public images, in the stages that were charged."""
    start = start_of(privacy["public_data"])
    if start is not None:
        rest = [data for data in privacy["public_data"] if data is not start]
        return f"{_how({**privacy, 'public_data': rest})}, starting from {_model(start['name'])}"
    encoder = autoencoder_of(privacy["public_data"])
    if encoder is not None:
        rest = [data for data in privacy["public_data"] if data is not encoder]
        how = _how({**privacy, "public_data": rest})
        return f"{how}, in the latents of a public autoencoder, {_model(encoder['name'])}"
    names = [row["name"] for row in privacy["mechanisms"]]
    public = [f"on public images ({_dataset(data['name'])})" for data in privacy["public_data"]]
    lessons, hard = [_EASY] * any(name not in (DP_SGD, SCORE) for name in names), DP_SGD in names
    easy = " and ".join([*public, *lessons])  # in any order, or at once
    if not (easy and hard):
        return easy or (_HARD if hard else "on nothing yet")
    method = f" {_METHOD}" if lessons else ""
    return f"from easy to hard under one privacy budget: first {easy}, then {_HARD}{method}"


def _model(name: str) -> str:
    return "a model in a local folder" if name == LOCAL_FOLDER else f"the model {name_text(name)}"


def _dataset(name: str, *, in_table: bool = False) -> str:
    return name if name == LOCAL_FOLDER else name_text(name, in_table=in_table)


def _or_infinite(value: float | None) -> str:
    return "none: no guarantee" if value is None else f"{round_up(value, digits=6):g}"


def _numbers(privacy: Mapping[str, Any]) -> str:
    accounting, randomness = privacy["accounting"], privacy["randomness"]
    implementation, tuning = privacy["implementation"], privacy["hyperparameter_tuning"]
    people, unit = privacy["privacy_unit"]["max_records_per_person"], unit_of_report(privacy)
    target = "" if privacy["target_epsilon"] is None else f", of a target of {privacy['target_epsilon']:g}"
    met = "met" if accounting["assumptions_met"] else "NOT MET"
    checked = "compared with autograd" if implementation.get("verified_per_image_gradients") else "none taken"
    public = "; ".join(
        f"{_dataset(data['name'], in_table=True)}, {escape(data['role'])}" for data in privacy["public_data"]
    )
    rows = {
        "epsilon": f"{_or_infinite(privacy['epsilon'])} at delta {privacy['delta']:g}{target}",
        "adjacency": privacy["adjacency"],
        "epsilon, add-or-remove-one (NIST: unbounded)": _or_infinite(privacy["epsilon_add_or_remove_one"]),
        "epsilon, replace-one (NIST: bounded)": _or_infinite(privacy["epsilon_replace_one"]),
        "Gaussian DP mu": _or_infinite(privacy["gdp_mu"]),
        "unit of privacy": escape(f"{privacy['privacy_unit']['description']}; images of one person: {people}"),
        f"{unit}s that change together": privacy["group_size"],
        "deployment": escape(f"{privacy['deployment_model']}: {privacy['trust_model']}"),
        "accesses to the data": escape(privacy["data_accesses"]),
        "covered": f"{privacy['release']}: the weights after every step, not the last ones alone",
        "accountant": escape(f"{accounting['accountant']}, {accounting['library']} {accounting['version']}"),
        "composition": escape(accounting["composition"]),
        "post-processing, free": escape(accounting["post_processing"]),
        "assumptions": f"{escape(', '.join(accounting['assumptions']))}: {met}",
        "public data, free": public or "none",
        "hyper-parameters": escape(tuning["note"]),
        "noise and sampling": escape(f"{randomness.get('generator')}, {randomness.get('seed_source')}"),
        "per-image gradients": checked,
        **_dataset_spending(privacy),
        **_computed_on(implementation),
        "implementation": escape(f"{implementation['package']} {implementation['version']}"),
        **{f"sha256 of {escape(path)}": escape(digest) for path, digest in privacy["weights"].items()},
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _dataset_spending(privacy: Mapping[str, Any]) -> dict[str, str]:
    """Everything spent on the dataset, where a ledger of the dataset holds the run."""
    facts = privacy.get("dataset_spending")
    if facts is None:
        return {}
    runs = "1 run" if facts["num_runs"] == 1 else f"{facts['num_runs']} runs"
    return {
        "everything from this dataset so far": (
            f"epsilon {_or_infinite(facts['epsilon'])} at delta {facts['delta']:g}, of {facts['limit']:g} that its "
            f"owner allows: {runs}, {facts['num_shared']} shared; one {facts['unit']}, {facts['adjacency']}"
        )
    }


def _computed_on(implementation: Mapping[str, Any]) -> dict[str, str]:
    """Device and precision; reports of earlier versions do not tell them."""
    if "device" not in implementation:
        return {}
    return {"computed on": escape(f"{implementation['device']}, {implementation['precision']}")}


def privacy_section(privacy: Mapping[str, Any]) -> str:
    """The part of a card that says what is protected. It follows from the report alone, so that it can be checked."""
    unit = unit_of_report(privacy)
    plain = _PLAIN_OF_PERSONS if unit == "person" else _PLAIN_PUBLIC if _is_public_alone(privacy) else _PLAIN
    in_words = {**_IN_WORDS, "num_records": "the number of persons"} if unit == "person" else _IN_WORDS
    return _PRIVACY.format(
        unit=unit,
        statement=escape(privacy["statement"], opens=True),
        plain=plain + _of_delta(privacy) if privacy["private"] else _PLAIN_WITHOUT,
        mechanisms="\n".join(_mechanism_row(row) for row in privacy["mechanisms"]),
        numbers=_numbers(privacy),
        unprotected=", ".join(in_words.get(name, escape(name)) for name in privacy["unprotected_quantities"])
        or "nothing",
        not_covered="; ".join(map(escape, privacy["not_covered"])) or "nothing known",
    )


def _of_delta(privacy: Mapping[str, Any]) -> str:
    """A sentence about a delta that is no small probability beside the number of images or persons."""
    count, unit = privacy["protected_dataset"].get("num_records"), unit_of_report(privacy)
    if count is None or privacy["delta"] * count <= 1:
        return ""
    return (
        f" But delta is above 1 / {count:,}: with that probability the limit does not hold, and some {unit} may be "
        "revealed outright."
    )


def _is_public_alone(privacy: Mapping[str, Any]) -> bool:
    """True of a model that was trained without private images, not even some that were left unread."""
    return not privacy["mechanisms"] and "num_records" not in privacy["protected_dataset"]


def class_text(class_names: Sequence[str]) -> str:
    """The classes, as the summary of a card lists them."""
    if len(class_names) > MAX_NAMED_CLASSES:
        return f"{len(class_names)} classes"
    return f"classes: {', '.join(map(name_text, class_names))}"


def yaml_text(metadata: Mapping[str, Any], *, width: int = 100) -> str:
    """The metadata of a card, as this package writes them."""
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=width)


def files_section(files: Mapping[str, str]) -> str:
    """The hashes of what is shared beside a card, by name; empty where they are not known."""
    if not files:
        return ""
    rows = "\n".join(f"- `{name}`: `{digest}`" for name, digest in sorted(files.items()))
    return f"\n## Files\n\nsha256 of the other files that this card is about:\n\n{rows}\n"


def _model_index(name: str, dataset_id: str, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measured numbers in the form that the Hub shows beside a model."""
    result = {
        "task": {"type": "unconditional-image-generation"},
        "dataset": {"name": dataset_id, "type": dataset_id},
        "metrics": [
            {"type": metric["name"], "name": f"{metric['name']}: {metric['data']}", "value": float(metric["value"])}
            for metric in metrics
        ],
    }
    return [{"name": name, "results": [result]}]


def card_metadata(
    privacy: Mapping[str, Any],
    *,
    title: str,
    dataset_id: str | None,
    license: str | None,
    metrics: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Metadata that the Hub reads from a card; the arguments are those of [`render_card`]."""
    metadata: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation"}
    if license is not None:
        metadata["license"] = license
    hard = any(row["name"] == "dp-sgd" for row in privacy["mechanisms"])
    left_out = set() if privacy["private"] else {"differential-privacy"}
    left_out |= set() if hard else {"dp-sgd", "opacus"}
    start = start_of(privacy["public_data"])
    if start is not None and start["name"] != LOCAL_FOLDER:
        metadata["base_model"] = start["name"]
    metadata["tags"] = [tag for tag in _TAGS if tag not in left_out]
    if dataset_id is not None:
        metadata["datasets"] = [dataset_id]
    if metrics and dataset_id is not None:
        metadata["model-index"] = _model_index(title, dataset_id, metrics)
    metadata["differential_privacy"] = dict(privacy)
    return metadata


def card_body(
    privacy: Mapping[str, Any],
    *,
    repo_id: str,
    title: str,
    classes: str,
    num_classes: int,
    training: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    files: Mapping[str, str],
) -> str:
    """Text of a card for people; `classes` is what [`class_text`] returns, the rest is that of [`render_card`]."""
    return _BODY.format(
        title=title if privacy["private"] else title + NOT_PRIVATE,
        summary=(
            f"A class-conditional diffusion model ({classes}) for diffusers, trained with dp_curriculum "
            f"{_how(privacy)}."
        ),
        repo_id=repo_id,
        example_labels=str([label % num_classes for label in (0, 0, 1)]),
        privacy_section=privacy_section(privacy),
        training="\n".join(f"- {escape(name.replace('_', ' '))}: {escape(str(v))}" for name, v in training.items()),
        measured=_measured(metrics),
        files=files_section(files),
    )


def describe_network(num_parameters: int, num_channels: int, side: int, patch_size: int) -> str:
    """The network, as a card states it."""
    in_patches = "" if patch_size == 1 else f" in patches of {patch_size}x{patch_size}"
    return f"UNet2DModel, {num_parameters:,} parameters, {num_channels}x{side}x{side}{in_patches}"


def render_card(
    privacy: Mapping[str, Any],
    *,
    repo_id: str,
    title: str,
    class_names: tuple[str, ...],
    training: Mapping[str, Any],
    dataset_id: str | None = None,
    license: str | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    files: Mapping[str, str] = MappingProxyType({}),
) -> str:
    r"""
    Renders README.md.

    Args:
        privacy (`dict`): The report, as `privacy.json` holds it.
        repo_id (`str`): What `from_pretrained` is to be called with.
        title (`str`): Heading.
        class_names (`tuple[str, ...]`): Names of the classes that can be asked for, public.
        training (`dict`): Public constants of the training, shown as they are.
        dataset_id (`str`, *optional*): Hub id of the private dataset, where that is public.
        license (`str`, *optional*): Licence of the weights.
        metrics (`Sequence[Mapping]`, *optional*): Measured numbers, each with `name`, `value` and `data`; only those
            that read no training image of `dataset_id`, and only with it.
        files (`Mapping[str, str]`, *optional*): sha256 of the files that are shared beside it, by name.

    Privacy:
        Shows what the report holds and public constants; no private value enters. What others chose is shown as text:
        no name of a class or dataset adds a line, a heading or a link.
    """
    metadata = card_metadata(privacy, title=title, dataset_id=dataset_id, license=license, metrics=metrics)
    body = card_body(
        privacy,
        repo_id=repo_id,
        title=title,
        classes=class_text(class_names),
        num_classes=len(class_names),
        training=training,
        metrics=metrics,
        files=files,
    )
    return f"---\n{yaml_text(metadata)}---\n{body}"


def _measured(metrics: Sequence[Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    rows = "\n".join(
        f"| {escape(metric['name'])} | {metric['value']:.4g} | {escape(metric['data'])} |" for metric in metrics
    )
    return f"\n## Measured\n\nWithout a look at a training image.\n\n| | value | data |\n|---|---|---|\n{rows}\n"
