"""The card of a trained pipeline: Hub metadata, the privacy block, and what both mean in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dp_curriculum.accounting import round_up


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

_CARD = """---
{metadata}---

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
{measured}"""

_PRIVACY = """## Privacy

{statement}

{plain}

| stage | what is released | sample rate | noise multiplier | norm bound | steps |
|---|---|---|---|---|---|
{mechanisms}

The noise multiplier is the standard deviation of the noise over the norm bound of one image; steps compose one after
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
_EASY, _HARD = "on noisy aggregates of the private images", "on the images themselves with DP-SGD"
_METHOD = "(the method of [DP-FETA](https://arxiv.org/abs/2504.01395))"


def _mechanism_row(row: Mapping[str, Any]) -> str:
    released = _DP_SGD if row["name"] == "dp-sgd" else _QUERY
    sampling = "all images" if row["sample_rate"] == 1 else f"Poisson, {row['sample_rate']:.6g}"
    return (
        f"| {row['name']} | {released} | {sampling} | {row['noise_multiplier']:.6g} | {row['clip_norm']:.6g} "
        f"| {row['num_steps']} |"
    )


def _how(privacy: Mapping[str, Any]) -> str:
    """How the model was trained: on public images, in the stages that were charged."""
    names = [row["name"] for row in privacy["mechanisms"]]
    public = [f"on public images ({data['name']})" for data in privacy["public_data"]]
    lessons, hard = [_EASY] * any(name != "dp-sgd" for name in names), "dp-sgd" in names
    easy = " and ".join([*public, *lessons])  # in any order, or at once
    if not (easy and hard):
        return easy or (_HARD if hard else "on nothing yet")
    method = f" {_METHOD}" if lessons else ""
    return f"from easy to hard under one privacy budget: first {easy}, then {_HARD}{method}"


def _or_infinite(value: float | None) -> str:
    return "none: no guarantee" if value is None else f"{round_up(value, digits=6):g}"


def _numbers(privacy: Mapping[str, Any]) -> str:
    accounting, randomness = privacy["accounting"], privacy["randomness"]
    implementation, tuning = privacy["implementation"], privacy["hyperparameter_tuning"]
    people = privacy["privacy_unit"]["max_records_per_person"]
    target = "" if privacy["target_epsilon"] is None else f", of a target of {privacy['target_epsilon']:g}"
    met = "met" if accounting["assumptions_met"] else "NOT MET"
    checked = "compared with autograd" if implementation.get("verified_per_image_gradients") else "none taken"
    rows = {
        "epsilon": f"{_or_infinite(privacy['epsilon'])} at delta {privacy['delta']:g}{target}",
        "adjacency": privacy["adjacency"],
        "epsilon, add-or-remove-one (NIST: unbounded)": _or_infinite(privacy["epsilon_add_or_remove_one"]),
        "epsilon, replace-one (NIST: bounded)": _or_infinite(privacy["epsilon_replace_one"]),
        "Gaussian DP mu": _or_infinite(privacy["gdp_mu"]),
        "unit of privacy": f"{privacy['privacy_unit']['description']}; images of one person: {people}",
        "images that change together": privacy["group_size"],
        "deployment": f"{privacy['deployment_model']}: {privacy['trust_model']}",
        "accesses to the data": privacy["data_accesses"],
        "covered": f"{privacy['release']}: the weights after every step, not the last ones alone",
        "accountant": f"{accounting['accountant']}, {accounting['library']} {accounting['version']}",
        "composition": accounting["composition"],
        "post-processing, free": accounting["post_processing"],
        "assumptions": f"{', '.join(accounting['assumptions'])}: {met}",
        "public data, free": "; ".join(f"{data['name']}, {data['role']}" for data in privacy["public_data"]) or "none",
        "hyper-parameters": tuning["note"],
        "noise and sampling": f"{randomness.get('generator')}, {randomness.get('seed_source')}",
        "per-image gradients": checked,
        "implementation": f"{implementation['package']} {implementation['version']}",
        **{f"sha256 of {path}": digest for path, digest in privacy["weights"].items()},
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def privacy_section(privacy: Mapping[str, Any]) -> str:
    """The part of a card that says what is protected. It follows from the report alone, so that it can be checked."""
    return _PRIVACY.format(
        statement=privacy["statement"],
        plain=_PLAIN if privacy["private"] else _PLAIN_WITHOUT,
        mechanisms="\n".join(_mechanism_row(row) for row in privacy["mechanisms"]),
        numbers=_numbers(privacy),
        unprotected=", ".join(_IN_WORDS.get(name, name) for name in privacy["unprotected_quantities"]) or "nothing",
        not_covered="; ".join(privacy["not_covered"]) or "nothing known",
    )


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

    Privacy:
        Shows what the report holds and public constants; no private value enters.
    """
    metadata: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation"}
    if license is not None:
        metadata["license"] = license
    hard = any(row["name"] == "dp-sgd" for row in privacy["mechanisms"])
    left_out = set() if privacy["private"] else {"differential-privacy"}
    left_out |= set() if hard else {"dp-sgd", "opacus"}
    metadata["tags"] = [tag for tag in _TAGS if tag not in left_out]
    if dataset_id is not None:
        metadata["datasets"] = [dataset_id]
    if metrics and dataset_id is not None:
        metadata["model-index"] = _model_index(title, dataset_id, metrics)
    metadata["differential_privacy"] = dict(privacy)
    num_classes = len(class_names)
    classes = f"classes: {', '.join(class_names)}" if num_classes <= 20 else f"{num_classes} classes"
    return _CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=100),
        title=title if privacy["private"] else f"{title} (NOT PRIVATE)",
        summary=(
            f"A class-conditional diffusion model ({classes}) for diffusers, trained with dp_curriculum "
            f"{_how(privacy)}."
        ),
        repo_id=repo_id,
        example_labels=str([label % num_classes for label in (0, 0, 1)]),
        privacy_section=privacy_section(privacy),
        training="\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in training.items()),
        measured=_measured(metrics),
    )


def _measured(metrics: Sequence[Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    rows = "\n".join(f"| {metric['name']} | {metric['value']:.4g} | {metric['data']} |" for metric in metrics)
    return f"\n## Measured\n\nWithout a look at a training image.\n\n| | value | data |\n|---|---|---|\n{rows}\n"
