"""The card of a trained pipeline: Hub metadata, the privacy block, and what both mean in plain words."""

from __future__ import annotations

from collections.abc import Mapping
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

## Privacy

{statement}

| stage | what is released | sample rate | noise multiplier | norm bound | steps |
|---|---|---|---|---|---|
{mechanisms}

The noise multiplier is the standard deviation of the noise over the norm bound of one image; steps compose one after
the other. Anyone can compute epsilon again from this table: `dp-curriculum verify {repo_id}`.

| | |
|---|---|
{numbers}

### Not protected

Known exactly to whoever reads this card: {unprotected}.

Outside the guarantee: {not_covered}.

## How it was made

{training}
"""

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


def _mechanism_row(row: Mapping[str, Any]) -> str:
    released = _DP_SGD if row["name"] == "dp-sgd" else _QUERY
    sampling = "all images" if row["sample_rate"] == 1 else f"Poisson, {row['sample_rate']:.6g}"
    return (
        f"| {row['name']} | {released} | {sampling} | {row['noise_multiplier']:.6g} | {row['clip_norm']:.6g} "
        f"| {row['num_steps']} |"
    )


def _how(privacy: Mapping[str, Any]) -> str:
    """How the model was trained, in the stages that were charged."""
    names = [row["name"] for row in privacy["mechanisms"]]
    stages = [_EASY] * any(name != "dp-sgd" for name in names) + [_HARD] * ("dp-sgd" in names)
    if len(stages) < 2:
        return stages[0] if stages else "on nothing yet"
    return (
        f"from easy to hard under one privacy budget: first {_EASY}, then {_HARD} "
        "(the method of [DP-FETA](https://arxiv.org/abs/2504.01395))"
    )


def _or_infinite(value: float | None) -> str:
    return "none: no guarantee" if value is None else f"{round_up(value, digits=6):g}"


def _numbers(privacy: Mapping[str, Any]) -> str:
    accounting, randomness = privacy["accounting"], privacy["randomness"]
    implementation = privacy["implementation"]
    rows = {
        "epsilon": f"{_or_infinite(privacy['epsilon'])} at delta {privacy['delta']:g}, "
        f"of a target of {privacy['target_epsilon']:g}",
        "adjacency": privacy["adjacency"],
        "epsilon, replace-one": _or_infinite(privacy["epsilon_replace_one"]),
        "Gaussian DP mu": _or_infinite(privacy["gdp_mu"]),
        "unit of privacy": privacy["privacy_unit"]["description"],
        "accountant": f"{accounting['accountant']}, {accounting['library']} {accounting['version']}",
        "noise and sampling": f"{randomness['generator']}, {randomness['seed_source']}",
        "implementation": f"{implementation['package']} {implementation['version']}",
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def render_card(
    privacy: Mapping[str, Any],
    *,
    statement: str,
    repo_id: str,
    title: str,
    class_names: tuple[str, ...],
    training: Mapping[str, Any],
    dataset_id: str | None = None,
    license: str | None = None,
) -> str:
    r"""
    Renders README.md.

    Args:
        privacy (`dict`): The report, as `privacy.json` holds it.
        statement (`str`): The claim, formally and in plain words.
        repo_id (`str`): What `from_pretrained` is to be called with.
        title (`str`): Heading.
        class_names (`tuple[str, ...]`): Names of the classes that can be asked for, public.
        training (`dict`): Public constants of the training, shown as they are.
        dataset_id (`str`, *optional*): Hub id of the private dataset, where that is public.
        license (`str`, *optional*): Licence of the weights.

    Privacy:
        Shows what the report holds and public constants; no private value enters.
    """
    metadata: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation"}
    if license is not None:
        metadata["license"] = license
    metadata["tags"] = _TAGS if privacy["private"] else [tag for tag in _TAGS if tag != "differential-privacy"]
    if dataset_id is not None:
        metadata["datasets"] = [dataset_id]
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
        statement=statement,
        mechanisms="\n".join(_mechanism_row(row) for row in privacy["mechanisms"]),
        numbers=_numbers(privacy),
        unprotected=", ".join(_IN_WORDS.get(name, name) for name in privacy["unprotected_quantities"]) or "nothing",
        not_covered="; ".join(privacy["not_covered"]) or "nothing known",
        training="\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in training.items()),
    )
