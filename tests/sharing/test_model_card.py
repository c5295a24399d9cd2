"""The card: a golden copy of the whole, metadata that Hub and people can read, and nothing that should not be there.

`UPDATE_GOLDEN=1 pytest tests/sharing/test_model_card.py` writes `model_cards/example.md` anew; read the difference.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from dp_curriculum.privacy.privacy_report import CLAIMS
from dp_curriculum.privacy.verification import verify_report
from dp_curriculum.sharing.model_card import render_card


CARDS = Path(__file__).parents[2] / "model_cards"
TRAINING = {
    "model": "UNet2DModel, 253,345 parameters, 1x8x8",
    "lesson mean": "1000 steps of 64 images, Adam with learning rate 0.0003; it spends nothing beyond its query",
    "DP-SGD": "100 steps of 256 images on average, 4 noise draws an image, Adam with learning rate 0.004",
    "sampler": "EDM stochastic Heun, 18 steps, S_churn 0",
}


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads((CARDS / "example.privacy.json").read_text(encoding="utf-8"))


def card(report: dict[str, Any], **options: Any) -> str:
    given: dict[str, Any] = {
        "repo_id": "example-org/dp-digits",
        "title": "dp-digits",
        "class_names": tuple("0123456789"),
        "training": TRAINING,
        "dataset_id": "example-org/handwritten-digits",
        "license": "apache-2.0",
    }
    return render_card(report, **{**given, **options})


def without_privacy(report: dict[str, Any]) -> dict[str, Any]:
    """As a report is written for a run that had no noise."""
    bare = copy.deepcopy(report)
    bare.update(private=False, **dict.fromkeys(CLAIMS))
    bare["not_private_reasons"] = ["trained without noise, on request"]
    bare["statement"] = "NOT PRIVATE: trained without noise, on request. It carries no privacy guarantee."
    bare["mechanisms"][1]["noise_multiplier"] = 0.0
    return bare


def metadata(text: str) -> dict[str, Any]:
    _, block, _ = text.split("---\n", 2)
    return yaml.safe_load(block)


# --- the whole -----------------------------------------------------------------------------------------------------


def test_the_card_is_the_golden_one(report: dict[str, Any]) -> None:
    golden, text = CARDS / "example.md", card(report)
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "UPDATE_GOLDEN=1 writes it anew"


def test_the_golden_card_makes_claims_that_hold(report: dict[str, Any]) -> None:
    """As somebody verifies it who has the card alone."""
    claimed = metadata((CARDS / "example.md").read_text(encoding="utf-8"))["differential_privacy"]
    assert claimed == report
    checks = verify_report(claimed)
    assert len(checks) == 6 and all(check.holds for check in checks)


# --- metadata ------------------------------------------------------------------------------------------------------


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from leaves(entry)
    else:
        yield value


def test_metadata_are_plain_yaml_and_numbers_are_numbers(report: dict[str, Any]) -> None:
    """YAML 1.1 reads `1e-05` as text; a NumPy number would be written as a Python object."""
    text = card(report)
    found = metadata(text)
    assert "!!python" not in text
    assert {type(leaf) for leaf in leaves(found)} <= {str, bool, int, float, type(None)}
    privacy = found["differential_privacy"]
    assert privacy["delta"] == 1e-5 and isinstance(privacy["delta"], float)
    assert isinstance(privacy["implementation"]["max_relative_gradient_error"], float)
    assert json.loads(json.dumps(privacy)) == report
    tiny = copy.deepcopy(report)
    tiny["delta"], tiny["mechanisms"][1]["sample_rate"] = 1e-12, 2e-7
    assert metadata(card(tiny))["differential_privacy"] == tiny


def test_the_hub_reads_the_metadata(report: dict[str, Any]) -> None:
    data = ModelCard(card(report)).data
    assert data.library_name == "diffusers" and data.pipeline_tag == "unconditional-image-generation"
    assert data.license == "apache-2.0" and data.datasets == ["example-org/handwritten-digits"]
    assert "differential-privacy" in data.tags and len(set(data.tags)) == len(data.tags)
    bare = ModelCard(card(report, dataset_id=None, license=None)).data
    assert bare.datasets is None and bare.license is None


# --- what it says --------------------------------------------------------------------------------------------------


def test_the_card_states_the_guarantee_its_mechanisms_and_its_limits(report: dict[str, Any]) -> None:
    text = card(report)
    assert report["statement"] in text
    body = text.split("---\n", 2)[2]
    rows = [line for line in body.splitlines() if line.startswith(("| central-images-mean ", "| dp-sgd "))]
    assert [row.split("|")[3].strip() for row in rows] == ["all images", "Poisson, 0.178149"]
    assert [row.split("|")[6].strip() for row in rows] == ["1", "100"]
    assert "| epsilon | 9.99961 at delta 1e-05, of a target of 10 |" in body  # rounded upwards
    assert "| epsilon, replace-one (NIST: bounded) | 17.0873 |" in body
    for limit in report["not_covered"]:
        assert limit in body
    assert "the number of classes" in body and "the number of training images" not in body
    disclosed = {**report, "unprotected_quantities": ["num_records", *report["unprotected_quantities"]]}
    assert "the number of training images" in card(disclosed)
    assert all(f"- {name}: {value}" in body for name, value in TRAINING.items())


def test_a_model_without_a_guarantee_is_stamped(report: dict[str, Any]) -> None:
    text = card(without_privacy(report))
    assert "# dp-digits (NOT PRIVATE)\n" in text and "NOT PRIVATE: trained without noise" in text
    assert "none: no guarantee at delta 1e-05" in text
    found = metadata(text)
    assert "differential-privacy" not in found["tags"] and found["differential_privacy"]["private"] is False
    assert found["differential_privacy"]["epsilon"] is None


@pytest.mark.parametrize(
    ("kept", "said", "unsaid"),
    [
        (slice(0, 2), "from easy to hard under one privacy budget", "nothing yet"),
        (slice(0, 1), "trained with dp_curriculum on noisy aggregates of the private images.", "with DP-SGD."),
        (slice(1, 2), "trained with dp_curriculum on the images themselves with DP-SGD.", "noisy aggregates"),
        (slice(0, 0), "trained with dp_curriculum on nothing yet.", "with DP-SGD."),
    ],
)
def test_the_card_tells_of_the_stages_that_were_run(
    kept: slice, said: str, unsaid: str, report: dict[str, Any]
) -> None:
    """A run may have one kind of stage only, or be stopped before the second."""
    summary = card({**report, "mechanisms": report["mechanisms"][kept]}).split("![")[0]
    assert said in summary and unsaid not in summary


def test_one_class_and_many_classes(report: dict[str, Any]) -> None:
    assert "(classes: image)" in card(report, class_names=("image",))
    assert "pipe(class_labels=[0, 0, 0])" in card(report, class_names=("image",))
    assert "pipe(class_labels=[0, 0, 1])" in card(report)
    many = card(report, class_names=tuple(f"kind {index}" for index in range(200)))
    assert "(200 classes)" in many and "kind 7" not in many
    braces = card(report, class_names=("{title}", "fünf", "T-shirt/top", "a: b #"))
    assert "(classes: `{title}`, fünf, T-shirt/top, `a: b #`)" in braces and metadata(braces)


def test_the_example_of_use_is_python(report: dict[str, Any]) -> None:
    blocks = card(report).split("```python\n")[1:]
    assert len(blocks) == 3
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")
        assert '"example-org/dp-digits"' in block


# --- what it does not say ------------------------------------------------------------------------------------------


def test_the_golden_card_holds_no_path_and_no_seed() -> None:
    text = (CARDS / "example.md").read_text(encoding="utf-8")
    for word in ("/home", "/work", "/tmp", "C:\\", "file:", str(Path.home()), os.getcwd()):
        assert word not in text
    assert [line for line in text.splitlines() if "seed" in line.lower()] == [
        "    seed_source: os-entropy",  # where noise and masks come from
    ]
