"""What a run leaves behind: facts from the ledger and public constants, and nothing that only the trainer knows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from dp_curriculum import pipeline_dp_curriculum
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset, open_rows, read_images
from dp_curriculum.privacy.ledger import PrivacyLedger, PrivacyReport
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.training.finishing import save_release
from dp_curriculum.training.plan import plan_budget
from dp_curriculum.training.run import Run, initial_unet, make_accelerator, public_generator, secret_generator


CHECKED = {"max_relative_error": 2.5e-6, "num_parameters": 86}
SEED = 982_451_653
Release = Callable[..., PrivacyReport]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "secret-place" / "out"


@pytest.fixture
def release(make_config: Any, out: Path) -> Iterator[Release]:
    """Charges a run as planned, or with fewer steps, and saves what it leaves; nothing is trained."""
    ledgers = []

    def run(
        *,
        num_rows: int = 61,
        num_steps: int | None = None,
        checked: Any = CHECKED,
        charged: int | None = None,
        **fields: Any,
    ) -> PrivacyReport:
        # All rows at once, where sampling is not the question: accounted in closed form.
        public = fields.get("public_dataset_size") or num_rows
        settings = {"expected_batch_size": public, "num_inference_steps": 1, "seed": SEED, **fields}
        config: CurriculumConfig = make_config(**settings)
        private = read_images(
            open_rows(digits_dataset().select(range(num_rows)), make_config().data), make_config().data
        )
        folder = RunFolder(out)
        folder.prepare(overwrite=False)
        ledger = PrivacyLedger.open(folder.ledger)
        ledgers.append(ledger)
        accelerator = make_accelerator(config, folder)
        made = Run(
            config=config,
            folder=folder,
            accelerator=accelerator,
            private=private,
            plan=plan_budget(config, dataset_size=num_rows, num_classes=10),
            ledger=ledger,
            secret=secret_generator(config, accelerator.device),
            generator=public_generator(config, accelerator),
            unet=initial_unet(config, 10, accelerator),
            gradient_check=checked,
        )
        for mechanism in made.plan.mechanisms[:charged]:
            is_hard = mechanism.name == "dp-sgd" and num_steps is not None
            made.reserve(mechanism, num_steps if is_hard and num_steps is not None else mechanism.event.num_steps)
        return save_release(made)

    yield run
    for ledger in ledgers:
        ledger.close()


def card(out: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text."""
    _, block, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(block), text


def test_report_card_and_pipeline_say_the_same(release: Release, out: Path) -> None:
    report = release()
    saved = json.loads((out / "privacy.json").read_text())
    metadata, text = card(out)
    index = json.loads((out / "model_index.json").read_text())
    assert saved == report.to_dict() == metadata["differential_privacy"] == index["privacy"]
    assert report.statement() in text
    assert (out / "pipeline.py").read_text() == Path(str(pipeline_dp_curriculum.__file__)).read_text()
    assert index["id2label"] == {str(index): str(index) for index in range(10)}
    assert (out / "samples.png").exists()


def test_the_report_is_of_what_was_charged_and_not_of_what_was_planned(release: Release, out: Path) -> None:
    report = release(num_steps=2, num_dp_steps=9)
    assert report.to_dict()["mechanisms"][1]["num_steps"] == 2
    assert report.epsilon < 9
    assert "DP-SGD: 2 steps of 61 images" in card(out)[1]


def test_public_facts_are_listed(release: Release, out: Path) -> None:
    facts = release(noise_multiplicity=3).to_dict()
    assert facts["implementation"]["verified_per_image_gradients"] is True
    assert facts["implementation"]["max_relative_gradient_error"] == 2.5e-6
    assert facts["randomness"]["seed_source"] == "os-entropy" and facts["randomness"]["secret"] is True
    assert "choices made by looking at the private images" in facts["not_covered"]
    text = card(out)[1]
    for fact in ("3 noise draws an image", "lesson mean: 3 steps of 4 images", "EDM stochastic Heun, 1 steps"):
        assert fact in text
    assert re.search(r"model: UNet2DModel, [\d,]+ parameters, 1x8x8", text)


def test_one_noise_draw_is_said_in_the_singular(release: Release, out: Path) -> None:
    release(noise_multiplicity=1)
    assert "1 noise draw an image, Adam" in card(out)[1]


@pytest.mark.parametrize(
    ("fields", "lessons"),
    [
        ({"stages": ["mean", "mode", "dp_sgd"]}, ["lesson mean: 3 steps", "lesson mode: 3 steps"]),
        ({"stages": ["mean", "mode", "dp_sgd"], "charged": 1}, ["lesson mean: at most 3 steps"]),
        ({"stages": ["mean", "dp_sgd"], "pretrain_patience": 2}, ["lesson mean: at most 3 steps"]),
        (
            {"stages": ["mean", "mode", "dp_sgd"], "mix_lessons": True},
            ["lessons mean and mode, taught at once: 6 steps"],
        ),
        (
            {"stages": ["mean", "public", "dp_sgd"], "pretrain_dataset_name": "org/shapes"},
            ["lesson mean: 3 steps", "lesson public: 3 steps"],
        ),
    ],
)
def test_the_card_tells_the_lessons_that_were_taught(
    fields: dict[str, Any], lessons: list[str], release: Release, out: Path
) -> None:
    release(**fields)
    told = [line[2:] for line in card(out)[1].splitlines() if line.startswith("- lesson")]
    assert [line.split(" of 4 images")[0] for line in told] == lessons
    public = [f"on public images ({fields['pretrain_dataset_name']}) and "] if "public" in fields["stages"] else [""]
    summary = f"first {public[0]}on noisy aggregates of the private images, then on the images themselves with DP-SGD"
    assert (summary in card(out)[1]) == ("charged" not in fields)


def test_a_run_without_dp_sgd_claims_no_verified_gradients(release: Release, out: Path) -> None:
    facts = release(stages=["mean"], checked=None).to_dict()
    assert facts["implementation"]["verified_per_image_gradients"] is False
    assert "max_relative_gradient_error" not in facts["implementation"]
    metadata, text = card(out)
    assert "- DP-SGD" not in text and not {"dp-sgd", "opacus"} & set(metadata["tags"])


def test_the_number_of_rows_is_disclosed_or_the_public_one_is_named(release: Release, out: Path) -> None:
    facts = release().to_dict()
    assert facts["protected_dataset"]["num_records"] == 61 and "num_records" in facts["unprotected_quantities"]
    assert "the number of training images" in card(out)[1]


def test_with_a_public_size_the_true_one_is_nowhere(release: Release, out: Path) -> None:
    facts = release(num_rows=61, public_dataset_size=70).to_dict()
    assert facts["protected_dataset"]["num_records"] == 70 and "num_records" not in facts["unprotected_quantities"]
    for path in ("README.md", "privacy.json", "model_index.json"):
        assert not re.search(r"\b61\b", (out / path).read_text())


@pytest.mark.parametrize("group_size", [1, 3])
def test_several_images_of_a_person_are_covered_only_where_asked(group_size: int, release: Release) -> None:
    facts = release(group_size=group_size).to_dict()
    unprotected = "several images of the same person, together"
    assert (unprotected in facts["not_covered"]) == (group_size == 1)
    assert facts["privacy_unit"]["max_records_per_person"] == (3 if group_size == 3 else "unknown")
    assert facts["group_size"] == group_size


@pytest.mark.parametrize("name", ["org/faces", "faces"])
def test_a_hub_dataset_is_named(name: str, release: Release, out: Path) -> None:
    assert release(dataset_name=name).to_dict()["protected_dataset"]["name"] == name
    assert card(out)[0]["datasets"] == [name]


@pytest.mark.parametrize("kind", ["folder", "relative", "gone", "gone relative", "home", "imagefolder", "digits"])
def test_a_local_dataset_is_not_named(
    kind: str, release: Release, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one whose folder is not there any more when the card is written."""
    place = tmp_path / "patients" / "faces"
    place.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    fields = {
        "folder": {"dataset_name": str(place)},
        "relative": {"dataset_name": "patients/faces"},
        "gone": {"dataset_name": "/mnt/patients/faces"},
        "gone relative": {"dataset_name": "../patients/faces"},
        "home": {"dataset_name": "~/patients"},
        "imagefolder": {"train_data_dir": str(place)},
        "digits": {},
    }
    assert release(**fields[kind]).to_dict()["protected_dataset"]["name"] is None
    assert "datasets" not in card(out)[0]
    for path in ("README.md", "privacy.json", "model_index.json"):
        assert "patients" not in (out / path).read_text()


def test_no_place_of_this_machine_and_no_seed_is_in_what_is_shared(release: Release, out: Path) -> None:
    release()
    shared = [path for path in out.rglob("*") if path.is_file() and "run" not in path.relative_to(out).parts]
    assert len(shared) >= 7
    for path in shared:
        content = path.read_bytes()
        for word in ("secret-place", str(out), str(Path.home()), str(SEED)):
            assert word.encode() not in content, path.name


def test_the_card_is_of_the_repository_that_is_pushed_to(release: Release, out: Path) -> None:
    release(hub_model_id="org/dp-faces")
    text = card(out)[1]
    assert text.count("org/dp-faces") >= 4 and "# org/dp-faces" in text and "your-name" not in text


def test_a_run_that_is_marked_is_stamped(release: Release, out: Path) -> None:
    report = release(non_private=True)
    assert not report.to_dict()["private"]
    metadata, text = card(out)
    assert "NOT PRIVATE" in text and "differential-privacy" not in metadata["tags"]


def test_the_release_holds_the_weights_of_the_network_and_no_other_tensor(release: Release, out: Path) -> None:
    release()
    files = [path for path in out.rglob("*.safetensors") if "run" not in path.relative_to(out).parts]
    assert [path.parent.name for path in files] == ["unet"]
    unet = pipeline_dp_curriculum.DPCurriculumPipeline.from_pretrained(out).unet
    saved = load_file(files[0])
    assert {name: value.shape for name, value in saved.items()} == {
        name: value.shape for name, value in unet.state_dict().items()
    }
