"""Golden cards: for each preset, the card that a run of it will write, and claims on it that can be verified.

`python tests/sharing/test_golden_cards.py` writes them anew, with the noise that each preset is calibrated to; the
tests compare what needs no calibration. Read the difference before you commit it.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.edm import build_unet
from dp_curriculum.privacy.execution import Execution
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.privacy.privacy_report import CLAIMS, PrivacyReport
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.privacy.verification import check_schema, events_of_report, report_schema, verify_report
from dp_curriculum.privacy.witnesses import ask_witnesses
from dp_curriculum.sharing.model_card import privacy_section
from dp_curriculum.sharing.release import privacy_report, release_card, report_text
from dp_curriculum.training.plan import plan_budget


ROOT = Path(__file__).parents[2]
CARDS, PRESETS = ROOT / "model_cards", sorted((ROOT / "examples" / "configs").glob("*.yaml"))
NUM_DIGITS = 1437
PERSONS = "persons"  # card of an example whose unit is the person
REWRITE = "`python tests/sharing/test_golden_cards.py` writes the cards anew"
by_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)


def class_names(config: CurriculumConfig) -> tuple[str, ...]:
    return tuple(str(index) for index in range(config.data.num_classes or 10))


def planned_report(config: CurriculumConfig) -> PrivacyReport:
    """The report of a run that took all steps of its plan; nothing is trained, so that there are no weights."""
    plan = plan_budget(
        config, dataset_size=config.privacy.public_dataset_size or NUM_DIGITS, num_classes=len(class_names(config))
    )
    with tempfile.TemporaryDirectory() as folder, PrivacyLedger.open(Path(folder) / "ledger.jsonl") as ledger:
        for mechanism in plan.mechanisms:
            is_hard = mechanism.name == DP_SGD
            execution = Execution(
                randomness=SecretGenerator("secure", device="cpu").describe(),
                device="cpu",
                precision="float32" if is_hard else "float64",
                gradients="checked" if is_hard else "not taken",
                max_gradient_error=2.1e-06 if is_hard else None,
            )
            ledger.reserve(mechanism.event, stage=mechanism.name, clip_norm=mechanism.clip_norm, execution=execution)
        if config.privacy.non_private:
            ledger.mark_not_private("trained without noise, on request")
        return privacy_report(
            config,
            ledger,
            dataset_size=plan.dataset_size,
            num_classes=plan.num_classes,
            weights={},
        )


def planned_card(config: CurriculumConfig, report: PrivacyReport, repo_id: str) -> str:
    data = config.data
    unet = build_unet(
        config.model,
        resolution=data.resolution,
        num_channels=data.channels,
        num_classes=len(class_names(config)),
        has_prior=config.has_prior,
    )
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    return release_card(
        config,
        report,
        class_names=class_names(config),
        num_parameters=num_parameters,
        num_photos=21_840 if "public" in config.curriculum.stages and config.matches_public_images else 0,
        repo_id=repo_id,
        license="apache-2.0",
    )


def rewrite() -> None:
    """Calibrates each preset and writes its card, the example that other tests read, and the copy of the schema."""
    (CARDS / "privacy.schema.json").write_bytes((ROOT / "src/dp_curriculum/privacy/privacy.schema.json").read_bytes())
    for path in PRESETS:
        config = CurriculumConfig.from_yaml(path)
        card = planned_card(config, planned_report(config), f"your-name/dp-{path.stem}")
        (CARDS / f"{path.stem}.md").write_text(card, encoding="utf-8")
    config = CurriculumConfig.from_yaml(ROOT / "benchmarks/digits_mean.yaml")  # that of the example
    config = config.replace(dataset_name="example-org/handwritten-digits", num_channels=1)
    (CARDS / "example.privacy.json").write_text(report_text(planned_report(config)), encoding="utf-8")
    config = of_persons(config)
    card = planned_card(config, planned_report(config), "your-name/dp-persons")
    (CARDS / f"{PERSONS}.md").write_text(card, encoding="utf-8")


def of_persons(config: CurriculumConfig) -> CurriculumConfig:
    """The example, of 400 persons who wrote the digits."""
    return config.replace(person_column="writer", public_dataset_size=400, expected_batch_size=100)


@functools.cache
def card_text(name: str) -> str:
    path = CARDS / f"{name}.md"
    assert path.exists(), REWRITE
    return path.read_text(encoding="utf-8")


def block(name: str) -> dict[str, Any]:
    """A fresh copy of the block on a card."""
    return yaml.safe_load(card_text(name).split("---\n", 2)[1])["differential_privacy"]


def test_each_preset_has_a_card_and_each_card_a_preset() -> None:
    cards = {path.stem for path in CARDS.glob("*.md")} - {"example", "README", PERSONS}
    assert cards == {path.stem for path in PRESETS}, REWRITE


def test_the_schema_beside_the_cards_is_the_one_in_the_package() -> None:
    assert json.loads((CARDS / "privacy.schema.json").read_text()) == report_schema(), REWRITE


@by_preset
def test_the_card_is_of_the_preset_as_it_is(preset: Path) -> None:
    """All that a plan says before its noise is calibrated."""
    config, privacy = CurriculumConfig.from_yaml(preset), block(preset.stem)
    budget, options = config.privacy, config.dp_sgd
    # Without noise nothing is calibrated, and the stages are the same.
    plan = plan_budget(
        config.replace(non_private=True),
        dataset_size=budget.public_dataset_size or NUM_DIGITS,
        num_classes=len(class_names(config)),
    )
    stages = [(s.name, s.clip_norm, s.event.sample_rate, s.event.num_steps) for s in plan.mechanisms]
    rows = [(r["name"], r["clip_norm"], r["sample_rate"], r["num_steps"]) for r in privacy["mechanisms"]]
    assert rows == stages, REWRITE
    lessons = [(r["noise_multiplier"]) for r in privacy["mechanisms"] if r["name"] != DP_SGD]
    assert lessons == [s.event.noise_multiplier for s in plan.mechanisms if s.name != DP_SGD], REWRITE
    assert privacy["target_epsilon"] == budget.target_epsilon and privacy["delta"] == budget.target_delta, REWRITE
    assert privacy["protected_dataset"]["num_records"] == plan.dataset_size, REWRITE
    if not budget.non_private and DP_SGD in [s.name for s in plan.mechanisms]:
        assert 0.99 * budget.target_epsilon <= privacy["epsilon"] <= budget.target_epsilon, REWRITE
        assert f"DP-SGD: {options.num_dp_steps} steps" in card_text(preset.stem), REWRITE
    assert privacy_section(privacy) in card_text(preset.stem), REWRITE


@by_preset
def test_the_card_makes_claims_that_hold(preset: Path) -> None:
    privacy = block(preset.stem)
    assert check_schema(privacy).holds, REWRITE
    checks = verify_report(privacy)
    if privacy["private"]:
        checks += ask_witnesses(events_of_report(privacy), privacy["delta"], privacy["epsilon_add_or_remove_one"])
    assert [check for check in checks if not check.holds] == [], REWRITE


def test_the_card_of_persons_is_what_a_plan_of_them_says() -> None:
    """Word for word, but for the calibrated noise; and its claims hold."""
    privacy, text = block(PERSONS), card_text(PERSONS)
    assert privacy["privacy_unit"]["unit"] == "person" and privacy["schema_version"] == "1.1"
    assert check_schema(privacy).holds and all(check.holds for check in verify_report(privacy)), REWRITE
    assert privacy_section(privacy) in text, REWRITE
    config = CurriculumConfig.from_yaml(ROOT / "benchmarks/digits_mean.yaml")
    config = of_persons(config.replace(dataset_name="example-org/handwritten-digits", num_channels=1))
    report = PrivacyReport(privacy["epsilon"], privacy["delta"], privacy)
    assert planned_card(config, report, "your-name/dp-persons") == text, REWRITE
    for words in ("adding or removing one person", "of 100 persons on average", "any one person more than this limit"):
        assert words in text


def shrink(privacy: dict[str, Any], name: str) -> None:
    privacy[name] *= 0.98


EDITS = {
    **{f"{name} lowered": functools.partial(shrink, name=name) for name in CLAIMS},
    "sigma raised": lambda privacy: privacy["mechanisms"][-1].update(
        noise_multiplier=privacy["mechanisms"][-1]["noise_multiplier"] * 1.02
    ),
    "sigma of a lesson raised": lambda privacy: privacy["mechanisms"][0].update(
        noise_multiplier=privacy["mechanisms"][0]["noise_multiplier"] * 1.5
    ),
    "a lesson removed": lambda privacy: privacy["mechanisms"].pop(0),
    "the hard stage removed": lambda privacy: privacy["mechanisms"].pop(),
    "steps changed": lambda privacy: privacy["mechanisms"][-1].update(
        num_steps=privacy["mechanisms"][-1]["num_steps"] - 1 - privacy["mechanisms"][-1]["num_steps"] // 50
    ),
    "delta changed": lambda privacy: privacy.update(delta=privacy["delta"] / 2),
    "sample rate changed": lambda privacy: privacy["mechanisms"][-1].update(
        sample_rate=privacy["mechanisms"][-1]["sample_rate"] * 0.98
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_each_edit_of_a_card_is_caught(edit: Any) -> None:
    privacy = block("digits-demo")
    edited = copy.deepcopy(privacy)
    edit(edited)
    assert edited != privacy
    assert not all(check.holds for check in verify_report(edited))


if __name__ == "__main__":
    rewrite()
