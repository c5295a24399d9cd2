"""Cards that this package writes hold, whatever was trained; what an owner adds is listed, in its place."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.repocard import metadata_load, metadata_save
from test_golden_cards import class_names, planned_report

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import PrivateImages
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.diffusion.trainable import describe_weights
from dp_curriculum.evaluation import evaluation
from dp_curriculum.evaluation.evaluation import evaluate_images
from dp_curriculum.privacy.verification import Check
from dp_curriculum.sharing.card_check import Known, check_dataset_card, check_model_card, listed_files, split_card
from dp_curriculum.sharing.dataset_card import render_dataset_card
from dp_curriculum.sharing.model_card import render_card
from dp_curriculum.sharing.release import release_card
from dp_curriculum.sharing.report_words import check_words
from dp_curriculum.sharing.strict import AmbiguousFile, read_yaml


CARDS = Path(__file__).parents[2] / "model_cards"
TRICKY = ("{0}", "<!-- x", "a, b", "`c`", "``d", "e|f", "g\n\n## Privacy", "[h](i)", "\u202ej", "")


def report(**changes: Any) -> dict[str, Any]:
    values = json.loads((CARDS / "example.privacy.json").read_text(encoding="utf-8"))
    return {**values, **changes}


def of_classes(count: int) -> dict[str, Any]:
    return report(data_domain={"modality": "image", "resolution": 8, "num_channels": 1, "num_classes": count})


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


HOLDS = {"card": "holds"}
TRAINING = {
    "model": "UNet2DModel, 1 parameters, 1x8x8",
    "lesson mean": "2 steps of 4 images, Adam with learning rate 1; it spends nothing beyond its query",
    "DP-SGD": "100 steps of 4 images on average, 2 noise draws an image, Adam with learning rate 1e-05",
    "sampler": "EDM stochastic Heun, 2 steps, S_churn 0",
}


@pytest.mark.parametrize("card", sorted(CARDS.glob("*.md")), ids=lambda path: path.stem)
def test_each_golden_card_holds_by_itself(card: Path) -> None:
    text = card.read_bytes().decode()
    block = read_yaml(split_card(text)[0])["differential_privacy"]
    assert verdicts(check_model_card(text, block)) == HOLDS


def test_a_card_from_before_one_noise_draw_was_said_in_the_singular_holds() -> None:
    card = (CARDS / "mnist-eps10-cpu.md").read_text(encoding="utf-8")
    text = card.replace("1 noise draw an image", "1 noise draws an image")
    block = read_yaml(split_card(text)[0])["differential_privacy"]
    assert "1 noise draws an image" in text and verdicts(check_model_card(text, block)) == HOLDS


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        ("100 persons on average, 4 noise draws a person", "100 images on average, 4 noise draws an image"),
        ("norm bound of one person;", "norm bound of one image;"),
        ("about any one person more than", "about any family more than"),
        ("; several persons, together.", "."),
    ],
)
def test_words_of_another_unit_are_found_on_a_card_of_persons(words: str, instead: str) -> None:
    text = (CARDS / "persons.md").read_text(encoding="utf-8")
    block = read_yaml(split_card(text)[0])["differential_privacy"]
    assert words in text
    assert "FAILS" in verdicts(check_model_card(text.replace(words, instead), block)).values()


# --- what a training may write -------------------------------------------------------------------------------------

TRAININGS: dict[str, dict[str, Any]] = {
    "lessons at once": {"stages": ["mean", "moments", "frequency", "dp_sgd"], "mix_lessons": True},
    "lessons in turn": {"stages": ["mode", "frequency", "dp_sgd"], "pretrain_patience": 3},
    "DP-SGD alone": {"stages": ["dp_sgd"], "dp_learning_rate": 1e-6, "s_churn": 12.5},
    "a lesson alone": {"stages": ["moments"], "pretrain_learning_rate": 1.0},
    "public images": {"stages": ["public", "dp_sgd"], "pretrain_dataset_name": "org/public"},
    "public images alone": {"stages": ["public"], "pretrain_dataset_name": "digits"},
    "one class": {"num_classes": 1, "dataset_name": "org/digits-of-faces"},
    "a person's images": {"group_size": 5, "adjacency": "replace-one", "public_dataset_size": 60_000},
    "scans of 12 bits": {"intensity_range": [-1000.5, 4095], "alpha_background": 0.25},
    "a large network": {"resolution": 64, "num_channels": 3, "expected_batch_size": 1000, "noise_multiplicity": 32},
}


@pytest.mark.parametrize("fields", TRAININGS.values(), ids=TRAININGS)
@pytest.mark.parametrize("repo_id", [None, "org/model", "model"])
def test_a_card_that_a_training_writes_holds(fields: Any, repo_id: str | None) -> None:
    """Reports without noise, which need no calibration; of a dataset with a name."""
    config = CurriculumConfig().replace(
        **{"dataset_name": "org/digits-of-faces", "num_channels": 1, **fields, "non_private": True}
    )
    report = planned_report(config)
    for options in ({}, {"license": "mit"}):
        text = release_card(
            config,
            report,
            class_names=class_names(config),
            num_parameters=1_234_567,
            num_photos=0,
            repo_id=repo_id,
            files={"model_index.json": "0" * 64},
            **options,  # type: ignore[arg-type]
        )
        assert verdicts(check_model_card(text, report.to_dict())) == HOLDS
        assert listed_files(text) == {"model_index.json": "0" * 64}
        assert check_words(report.to_dict()).holds


@pytest.mark.parametrize("fields", [{"trainable": "bias_norm"}, {"trainable": "lora", "lora_alpha": 6.0}])
def test_a_card_that_tells_which_weights_were_trained_holds(fields: Any) -> None:
    config = CurriculumConfig().replace(stages=["mean", "dp_sgd"], num_channels=1, non_private=True, **fields)
    report, unet = planned_report(config), build_unet(config.model, resolution=28, num_channels=1, num_classes=10)
    trained = describe_weights(unet, config.dp_sgd)
    text = release_card(
        config,
        report,
        class_names=class_names(config),
        num_parameters=1_234,
        num_photos=0,
        repo_id="org/model",
        trained=trained,
    )
    assert f"- weights of DP-SGD: {trained}\n" in text
    assert verdicts(check_model_card(text, report.to_dict())) == HOLDS
    forged = text.replace("; the others are as the stages before left them", "; the others are public")
    assert verdicts(check_model_card(forged, report.to_dict())) != HOLDS


def test_a_card_with_all_that_evaluate_measures_holds(
    quick_classifiers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and descriptions come from the evaluation itself; Inception is another network here."""

    def network(images: torch.Tensor, weights: str) -> tuple[np.ndarray, np.ndarray]:
        return images.flatten(1).numpy(), np.full((len(images), 2), 0.5)

    monkeypatch.setattr(evaluation, "inception_features", network)
    monkeypatch.setattr(evaluation, "check_inception", lambda weights: None)
    images, labels = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 2
    reference = PrivateImages((images * 255).to(torch.uint8), labels, ("a", "b"))
    name = "handwritten-digits (test[:10%])"
    found = evaluate_images(images, labels, reference, reference_name=name, inception_weights="weights")
    metrics = [dataclasses.asdict(metric) for metric in found.metrics if name in metric.data]
    assert {
        "accuracy_cnn",
        "accuracy_logistic",
        "fd_classifier",
        "fd_haar",
        "fd_haar_floor",
        "coverage",
        "fid",
        "kid",
    } <= {m["name"] for m in metrics}
    text = render_card(
        report(),
        repo_id="org/model",
        title="org/model",
        class_names=tuple("0123456789"),
        training=TRAINING,
        dataset_id="example-org/handwritten-digits",
        metrics=metrics,
    )
    assert verdicts(check_model_card(text, report())) == HOLDS
    for old, new in (
        ("| fid |", "| epsilon |"),
        ("| coverage | ", "| coverage | 9"),
        ("[:10%]", "[:10%], epsilon 0.1"),
    ):
        assert old in text
        assert verdicts(check_model_card(text.replace(old, new), report())) == {"card": "FAILS"}


def test_a_card_with_any_names_of_classes_holds() -> None:
    for names in (TRICKY, tuple("ab"), tuple(f"kind {index}" for index in range(21)), ("image",)):
        block = of_classes(len(names))
        text = render_card(
            block,
            repo_id="org/model",
            title="org/model",
            class_names=names,
            training=TRAINING,
            dataset_id="example-org/handwritten-digits",
        )
        assert verdicts(check_model_card(text, block, Known(class_names=names))) == HOLDS
        assert verdicts(check_model_card(text, block)) == HOLDS  # by itself
        assert text.count("\n## ") == 3 and text.count("\n# ") == 1
        other = ("another", *names[1:])
        if len(names) <= 20:
            assert verdicts(check_model_card(text, block, Known(class_names=other))) == {"card": "FAILS"}


@pytest.mark.parametrize("names", [TRICKY, tuple("ab"), tuple(f"kind {i}" for i in range(40))], ids=len)
@pytest.mark.parametrize("num_images", [1, 12_345, 20_000_000])
@pytest.mark.parametrize("model_id", [None, "org/model"])
def test_a_card_of_any_dataset_holds(names: tuple[str, ...], num_images: int, model_id: str | None) -> None:
    block = of_classes(len(names))
    text = render_dataset_card(
        block,
        repo_id="org/numbers",
        num_images=num_images,
        image_size="8x8 pixels, grey",
        class_names=names,
        making={
            "classes, weights": "0.1 1e-05 3",
            "num inference steps": "None",
            "guidance scale": "1.5",
            "s churn": "0.0",
        },
        model_id=model_id,
        license="cc0-1.0",
        files={"data/train-00000-of-00001.parquet": "0" * 64},
    )
    assert verdicts(check_dataset_card(text, block)) == HOLDS
    assert text.count("\n## ") == 4 and text.count("\n# ") == 1


# --- what does not hold --------------------------------------------------------------------------------------------


def example(**changes: Any) -> tuple[str, dict[str, Any]]:
    return (CARDS / "example.md").read_bytes().decode(), report(**changes)


def test_the_first_lines_that_are_not_from_the_report_are_named() -> None:
    text, block = example()
    lines = text.split("\n")
    place = lines.index("## Privacy")
    lines[place:place] = ["One \u0435xtra line.", "", "Another <b>line</b>."]
    (check,) = check_model_card("\n".join(lines), block)
    assert check.fails and f"from line {place + 1}: 'One \\u0435xtra line.'; 'Another <b>line</b>.'" in check.computed
    del lines[place : place + 5]
    (check,) = check_model_card("\n".join(lines), block)
    assert check.fails and f"line {place + 1} is missing: '## Privacy'" in check.computed


def test_every_line_of_a_card_matters() -> None:
    """Each line of the text is left out, doubled, or has a word more: the card does not hold."""
    text, block = example()
    front, body = split_card(text)
    lines = body.split("\n")
    assert sum(line.startswith("- ") for line in lines) == 4
    for index, line in enumerate(lines[:-1]):
        for new in ([], [line, line or "x"], [f"{line} more"]):
            edited = "\n".join([*lines[:index], *new, *lines[index + 1 :]])
            assert verdicts(check_model_card(f"---\n{front}---\n{edited}", block)) == {"card": "FAILS"}, (index, new)


def test_another_version_is_not_checked_but_for_its_copy_of_the_report() -> None:
    text, block = example()
    old = text.replace("version: 0.1.0", "version: 0.0.1")
    older = copy.deepcopy(block)
    older["implementation"]["version"] = "0.0.1"
    assert verdicts(check_model_card(old, older)) == {"card": "not checked"}
    assert verdicts(check_model_card(text, older)) == {"card": "FAILS"}


def test_a_card_without_metadata_is_refused() -> None:
    for text in ("", "# Title\n", "\n---\na: 1\n---\n", "---\na: 1\n", "\ufeff---\na: 1\n---\n"):
        with pytest.raises(AmbiguousFile, match="metadata"):
            split_card(text)


# --- what an owner may do ------------------------------------------------------------------------------------------


def test_a_description_at_the_end_is_listed_and_not_checked() -> None:
    text, block = example()
    words = "\n## Added by the owner\n\nScans of 2025, see [our paper](https://example.org).\n\n### Use\n\n- a\n- b\n"
    holds, added = check_model_card(text + words, block)
    assert holds.holds and added.verdict == "not checked"
    assert "'Scans of 2025, see [our paper](https://example.org).'; '### Use'; '- a' and 1 more" in added.computed


def test_metadata_that_huggingface_hub_wrote_are_listed_and_not_checked(tmp_path: Path) -> None:
    text, block = example()
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    metadata_save(path, {**metadata_load(path), "language": ["en"]})
    holds, added = check_model_card(path.read_bytes().decode(), block)
    assert holds.holds and added.computed == "not from the report: \"language: ['en']\""
    metadata_save(path, {**metadata_load(path), "pipeline_tag": "text-to-image"})
    assert verdicts(check_model_card(path.read_bytes().decode(), block)) == {"card": "FAILS"}
