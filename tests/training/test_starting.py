"""Runs that start from a model: what they spend, say and refuse, and the chain from public images to private ones."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from ddpm import PREDICTION_TYPES, save_tiny, tiny_pipeline, tiny_unet
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from hub_server import Hub
from huggingface_hub import constants
from ranks import results_of

from dp_curriculum.audit.step_audit import tiny_model
from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.data.reading import load_images
from dp_curriculum.diffusion.edm import edm_loss, noise_levels
from dp_curriculum.dp_sgd.gradient_check import check_per_image_gradients
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline, NoiseSchedule
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.sharing.export import export_release
from dp_curriculum.sharing.published import check_folder
from dp_curriculum.sharing.starting_words import KNOWS_THE_IMAGES, NAMES_THE_DATASET, ROLE, SPENT_ON_THE_SAME
from dp_curriculum.training import starting
from dp_curriculum.training.curriculum import run_curriculum
from dp_curriculum.training.finishing import retell_release
from dp_curriculum.training.plan import plan_budget
from dp_curriculum.training.starting import settle_start


by_prediction = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


@pytest.fixture(scope="module")
def digits() -> datasets.Dataset:
    return digits_dataset()


@pytest.fixture
def from_model(make_config: Callable[..., CurriculumConfig]) -> Callable[..., CurriculumConfig]:
    """A configuration that starts from a folder."""

    def make(folder: Any, **fields: Any) -> CurriculumConfig:
        options: dict[str, Any] = {
            "block_out_channels": [32, 64],  # the default: not asked for
            "stages": ["dp_sgd"],
            "lesson_noise_multiplier": None,
            "sample_steps": 0,
            "num_inference_steps": 2,
            "seed": 0,
        }
        return make_config(pretrained_model_name_or_path=str(folder), **{**options, **fields})

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Pipelines that diffusers' recipe trained for a moment on digits in negative, which stand for public images."""
    made: dict[str, Path] = {}

    def train(prediction_type: str) -> Path:
        if prediction_type not in made:
            pipeline = tiny_pipeline(prediction_type)
            _train_as_ddpm(pipeline)
            made[prediction_type] = tmp_path_factory.mktemp(prediction_type)
            pipeline.save_pretrained(made[prediction_type])
        return made[prediction_type]

    return train


def _train_as_ddpm(pipeline: DDPMPipeline) -> None:
    unet, scheduler, generator = pipeline.unet.train(), pipeline.scheduler, torch.Generator().manual_seed(0)
    images = load_images(CurriculumConfig().replace(resolution=8).data, "test").images
    images = 1 - images.float() / 127.5
    adam = torch.optim.Adam(unet.parameters(), lr=2e-3)
    for _ in range(150):
        clean = images[torch.randint(len(images), (32,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        steps = torch.randint(1000, (32,), generator=generator)
        target = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, steps)}
        output = unet(scheduler.add_noise(clean, noise, steps), steps).sample
        loss = (output - target[scheduler.config.prediction_type]).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    pipeline.unet.eval()


@torch.no_grad()
def held_out_loss(pipeline: DPCurriculumPipeline) -> float:
    """Of the digits that no run here trains on."""
    found = load_images(CurriculumConfig().replace(resolution=8).data, "test")
    clean, generator = found.images.float() / 127.5 - 1, torch.Generator().manual_seed(0)
    schedule = pipeline.noise_schedule
    sigma = noise_levels(torch.randn(len(clean), generator=generator), p_mean=-1.2, schedule=schedule)
    noise = torch.randn(clean.shape, generator=generator)
    return float(edm_loss(pipeline.unet, clean, noise, sigma, found.labels, schedule=schedule).mean())


def untouched(config: CurriculumConfig, class_names: tuple[str, ...]) -> DPCurriculumPipeline:
    """The pipeline that a run of this configuration begins with."""
    config, start = settle_start(config)
    assert start is not None and start.schedule is not None
    unet = start.build(config, len(class_names))
    start.network.load_into(unet, class_names)
    from diffusers import EDMEulerScheduler

    fields = dataclasses.asdict(start.schedule)
    return DPCurriculumPipeline(unet.eval(), EDMEulerScheduler(), noise_schedule=fields)


# --- the whole path ------------------------------------------------------------------------------------------------


@by_prediction
def test_twenty_noisy_steps_make_a_ddpm_network_better_on_rows_that_it_has_not_seen(
    prediction_type: str,
    trained: Callable[[str], Path],
    from_model: Callable[..., CurriculumConfig],
    digits: datasets.Dataset,
    tmp_path: Path,
) -> None:
    folder = trained(prediction_type)
    config = from_model(folder, num_dp_steps=20, expected_batch_size=256, noise_multiplicity=1, dp_ema_decay=0.9)
    before = held_out_loss(untouched(config, tuple(digits.features["label"].names)))
    result = run_curriculum(config, digits, output_dir=tmp_path / "out")
    after = held_out_loss(result.pipeline)
    assert after < 0.75 * before
    plain = plan_budget(config.replace(pretrained_model_name_or_path=None), dataset_size=len(digits), num_classes=10)
    (row,) = result.report.fields["mechanisms"]
    assert row["noise_multiplier"] == plain.events[0].noise_multiplier, "the start changes nothing of the plan"
    assert 9.9 <= result.report.epsilon <= 10
    assert result.report.fields["implementation"]["verified_per_image_gradients"]
    assert main(["verify", str(tmp_path / "out"), "--local_run"]) == 0
    _check_three_ways(tmp_path / "out", result.pipeline)


def _check_three_ways(folder: Path, expected: DPCurriculumPipeline) -> None:
    """By our class, by diffusers alone with the code in the folder, and the bare network."""
    code = str(folder / "pipeline.py")
    loaded = DiffusionPipeline.from_pretrained(folder, custom_pipeline=code, trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 2, "output_type": "pt"}
    images = [
        pipeline(generator=torch.Generator().manual_seed(1), **options).images
        for pipeline in (expected, DPCurriculumPipeline.from_pretrained(folder), loaded)
    ]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    bare = UNet2DModel.from_pretrained(folder, subfolder="unet")
    assert torch.equal(bare.conv_in.weight, expected.unet.conv_in.weight)


def test_lessons_are_taught_to_a_network_that_began_as_ddpm(
    from_model: Callable[..., CurriculumConfig], digits: datasets.Dataset, tmp_path: Path
) -> None:
    """The default stages: moments are then images to train on, and no prior, which such a network cannot take."""
    folder = save_tiny(tmp_path / "model")
    config = from_model(folder, stages=["moments", "dp_sgd"], lesson_noise_multiplier=20.0, pretrain_patience=1)
    assert not config.has_prior
    result = run_curriculum(config, digits.select(range(64)), output_dir=tmp_path / "out")
    names = [row["name"] for row in result.report.fields["mechanisms"]]
    assert names == ["moments-mean", "moments-covariance", "dp-sgd"] and result.pipeline.prior is None
    assert not any(check.fails for check in check_folder(tmp_path / "out", local_run=True))


def test_the_closed_form_is_refused_with_its_reason(from_model: Callable[..., CurriculumConfig]) -> None:
    with pytest.raises(ValueError, match="--shortcut=closed_form to be left out with --pretrained.* takes what"):
        from_model("x", stages=["moments", "dp_sgd"], lesson_noise_multiplier=20.0, shortcut="closed_form")
    with pytest.raises(ValueError, match="--revision=abc to come with --pretrained_model_name_or_path"):
        CurriculumConfig().replace(revision="abc")


@pytest.mark.parametrize("draws", [1, 4])
@by_prediction
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"resnet_time_scale_shift": "scale_shift", "norm_num_groups": 2},
        {"downsample_type": "resnet", "upsample_type": "resnet", "attention_head_dim": 4},
        {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2},
        {"add_attention": False, "mid_block_scale_factor": 1.4, "act_fn": "relu"},
    ],
    ids=["ddpm-cifar10", "scale shift", "resnet", "resnet blocks", "no attention"],
)
def test_the_per_image_gradients_of_such_networks_are_exact(
    fields: dict[str, Any], prediction_type: str, draws: int
) -> None:
    """In float64, beside autograd on one row at a time, in both modes."""
    unet = tiny_unet(num_class_embeds=4, **fields).double().train()
    schedule = NoiseSchedule(
        prediction_type=prediction_type,
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=0.0001,
        beta_end=0.02,
    )
    generator = torch.Generator().manual_seed(0)
    shape, count = (2 * draws, 1, 8, 8), 2 * draws
    rows = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    sigma = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    labels = torch.tensor([0, 3] * draws)

    def losses(images: Any, noise: Any, sigma: Any, labels: Any) -> torch.Tensor:
        return edm_loss(unet, images, noise, sigma, labels, schedule=schedule)

    found = check_per_image_gradients(unet, losses, [*rows, sigma, labels], noise_multiplicity=draws)
    assert found["dtype"] == "float64" and found["max_relative_error"] <= 1e-10
    assert found["max_clipped_sum_error"] <= 1e-10


@pytest.mark.parametrize("is_there", [True, False])
def test_the_main_process_alone_needs_the_model(
    is_there: bool, from_model: Callable[..., CurriculumConfig], digits: datasets.Dataset, tmp_path: Path
) -> None:
    """The others get its shape and weights; where there is none, all of them say why."""
    folder = save_tiny(tmp_path / "model", "v_prediction") if is_there else tmp_path / "nothing"
    config, rows = from_model(folder), digits.select(range(64))

    def work(rank: int) -> Any:
        if rank == 1:  # as on another machine

            def none(*args: Any, **options: Any) -> Any:
                raise AssertionError("opened by another process than the main one")

            starting.open_source = none  # type: ignore[attr-defined]
        try:
            result = run_curriculum(config, rows, output_dir=tmp_path / "out")
        except ValueError as error:
            return str(error)
        assert result.pipeline.noise_schedule is not None
        return result.pipeline.noise_schedule.prediction_type, float(result.pipeline.unet.conv_in.weight.sum())

    first, second = results_of(2, work)
    assert second == (first if is_there else f"process 0: {first}")
    assert (first[0] == "v_prediction") if is_there else ("to be a folder: there is none" in first)


# --- pinned --------------------------------------------------------------------------------------------------------


def stopped_run(config: CurriculumConfig, rows: datasets.Dataset, out: Path) -> None:
    step = DPTrainer.step

    def until_two(self: DPTrainer) -> None:
        if self.num_steps_taken == 2:
            raise RuntimeError("power cut")
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPTrainer, "step", until_two)
        with pytest.raises(RuntimeError, match="power cut"):
            run_curriculum(config, rows, output_dir=out)


def test_a_resumed_run_takes_up_the_same_model_and_refuses_another(
    from_model: Callable[..., CurriculumConfig], digits: datasets.Dataset, tmp_path: Path
) -> None:
    rows, folder, out = digits.select(range(64)), save_tiny(tmp_path / "model", "sample"), tmp_path / "out"
    config = from_model(folder, checkpointing_steps=2)
    stopped_run(config, rows, out)
    saved = yaml.safe_load((out / "run" / "config.yaml").read_text())
    assert len(saved["start"]["revision"]) == 64 and saved["model"]["block_out_channels"] == [8, 16]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    text = scheduler.read_text()
    scheduler.write_text(text.replace('"sample"', '"epsilon"'))
    before = (out / "run" / "privacy_ledger.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"to be {saved['start']['revision']}, as the run in"):
        run_curriculum(config, rows, output_dir=out, resume_from_checkpoint="latest")
    named = CurriculumConfig.from_yaml(out / "run" / "config.yaml")  # as the last line of a run says to resume it
    with pytest.raises(ValueError, match="to be what --revision="):
        run_curriculum(named, rows, output_dir=out, resume_from_checkpoint="latest")
    assert (out / "run" / "privacy_ledger.jsonl").read_bytes() == before
    scheduler.write_text(text)
    result = run_curriculum(config, rows, output_dir=out, resume_from_checkpoint="latest")
    assert result.finished and result.pipeline.noise_schedule is not None
    assert result.pipeline.noise_schedule.prediction_type == "sample"


@pytest.fixture
def on_hub(hub: Hub, tmp_path: Path) -> Callable[..., str]:
    """Puts a model into the repository org/public and returns its commit."""

    def put(folder: Path, **texts: str) -> str:
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        files |= {name: text.encode() for name, text in texts.items()}
        if ("model", "org/public") not in hub.repositories:
            hub.put("org/public", files, kind="model", private=False)
        else:
            hub.repositories[("model", "org/public")].add(files)
        return hub.repositories[("model", "org/public")].commits[-1][0]

    return put


CARD = "---\nlicense: apache-2.0\ndatasets:\n- org/butterflies\n---\n# A public model\n"


def test_a_model_on_the_hub_is_pinned_to_its_commit(
    on_hub: Callable[..., str],
    hub: Hub,
    from_model: Callable[..., CurriculumConfig],
    digits: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, out = digits.select(range(64)), tmp_path / "out"
    first = on_hub(save_tiny(tmp_path / "model"), **{"README.md": CARD})
    config = from_model("org/public", checkpointing_steps=2)
    stopped_run(config, rows, out)
    assert yaml.safe_load((out / "run" / "config.yaml").read_text())["start"]["revision"] == first
    second = on_hub(save_tiny(tmp_path / "other", "sample"), **{"README.md": CARD, "new.txt": ""})
    with pytest.raises(ValueError, match=f"--revision={second} to be {first}, as the run"):
        run_curriculum(config, rows, output_dir=out, resume_from_checkpoint="latest")
    named = CurriculumConfig.from_yaml(out / "run" / "config.yaml")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # from the cache, by its commit
    result = run_curriculum(named, rows, output_dir=out, resume_from_checkpoint="latest")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (entry,) = result.report.fields["public_data"]
    assert (entry["name"], entry["role"], entry["revision"]) == ("org/public", ROLE, first)
    assert entry["license"] == "apache-2.0" and "assumption" in entry["provenance"] and "warning" not in entry
    assert KNOWS_THE_IMAGES in result.report.fields["not_covered"]
    card = (out / "README.md").read_text()
    assert "starting from the model org/public" in card and f"at revision {first}, licence apache-2.0" in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/public"
    assert all(not check.fails for check in check_folder(out, local_run=True))


@pytest.mark.parametrize("what", ["missing", "revision", "gated", "offline", "down", "pickles", "class"])
def test_a_model_on_the_hub_that_cannot_be_had_is_one_line(
    what: str,
    on_hub: Callable[..., str],
    hub: Hub,
    from_model: Callable[..., CurriculumConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save_tiny(tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if what == "pickles":
        weights.rename(weights.with_suffix(".bin"))
    if what == "class":
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))
    on_hub(folder)
    if what == "gated":
        hub.gated.add("org/public")
    if what == "down":
        hub.fail(r".*", "drop", times=99)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", what == "offline")
    name = "org/nothing" if what == "missing" else "org/public"
    config = from_model(name, revision="v9" if what == "revision" else None)
    config.to_yaml(tmp_path / "config.yaml")
    out = tmp_path / "out"
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--output_dir", str(out)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dp-curriculum: error")]
    expected = {
        "missing": "look at its name",
        "revision": "--revision=v9",
        "gated": "it is gated: accept its terms on the Hub",
        "offline": "in the cache of huggingface_hub",
        "down": "in the cache of huggingface_hub",
        "pickles": "pickles alone (diffusion_pytorch_model.bin)",
        "class": "a UNet2DConditionModel, which is made for text",
    }
    assert len(said) == 1 and expected[what] in said[0] and f"--pretrained_model_name_or_path={name}" in said[0]
    assert not out.exists()
    downloads = [request for request in hub.requests if "safetensors" in request]
    assert what != "class" or not downloads, "weights are not fetched before the rest is known to fit"


# --- what is said of it --------------------------------------------------------------------------------------------


def starting_facts(config: CurriculumConfig) -> tuple[dict[str, str], str]:
    _, start = settle_start(config)
    assert start is not None
    return dict(start.facts), " ".join(start.warnings)


@pytest.mark.parametrize(
    ("card", "private", "is_named"),
    [
        ("---\ndatasets: [uoft-cs/cifar10]\n---\n", {"dataset_name": "my/cifar-10"}, True),
        ("---\ndatasets: uoft-cs/cifar10\n---\n", {"train_data_dir": "/data/cifar10"}, True),
        ("---\nlicense: mit\n---\nTrained on CIFAR-10.", {"dataset_name": "uoft-cs/cifar10"}, True),
        ("Trained on CIFAR-10.", {"train_data_dir": "/data/cifar10"}, False),  # a folder may have a word for a name
        ("---\ndatasets: [org/butterflies]\n---\nAs on mnist.", {"dataset_name": "uoft-cs/cifar10"}, False),
        ("---\n: [ not yaml\n---\n", {"dataset_name": "uoft-cs/cifar10"}, False),
    ],
)
def test_a_card_that_names_the_private_dataset_is_told(
    card: str,
    private: dict[str, Any],
    is_named: bool,
    from_model: Callable[..., CurriculumConfig],
    tmp_path: Path,
) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "README.md").write_text(card)
    facts, warning = starting_facts(from_model(folder, **private))
    assert (facts.get("warning") == NAMES_THE_DATASET) == is_named == ("names the dataset" in warning)


@pytest.mark.parametrize("spent", ["others", "same", "nothing", "no guarantee", "same, no guarantee"])
def test_what_a_model_of_this_package_spent_is_told(
    spent: str, from_model: Callable[..., CurriculumConfig], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model")
    report = {
        "private": "no guarantee" not in spent,
        "epsilon": 0.0 if spent == "nothing" else 3.25,
        "delta": 1e-5,
        "mechanisms": [] if spent == "nothing" else [{"name": "dp-sgd"}],
        "protected_dataset": {"name": "org/faces" if "same" in spent or spent == "nothing" else "org/other"},
        "public_data": [],
    }
    (folder / "privacy.json").write_text(json.dumps(report))
    config = from_model(folder, dataset_name="org/faces")
    if spent == "same, no guarantee":
        with pytest.raises(ValueError, match="on the same dataset without a guarantee"):
            settle_start(config)
        return
    facts, warning = starting_facts(config)
    assert (facts.get("warning") == SPENT_ON_THE_SAME) == (spent == "same") == ("add up" in warning)
    words = {
        "others": "epsilon 3.25 at delta 1e-05",
        "same": "epsilon 3.25 at delta 1e-05",
        "nothing": "public data alone",
        "no guarantee": "without a guarantee",
    }
    assert words[spent] in facts["privacy"]


@pytest.mark.parametrize("warning", [None, NAMES_THE_DATASET, SPENT_ON_THE_SAME])
def test_the_words_are_those_of_the_report_on_a_card_that_is_shared(
    warning: str | None,
    from_model: Callable[..., CurriculumConfig],
    digits: datasets.Dataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = save_tiny(tmp_path / "model")
    report = {"private": True, "epsilon": 1.5, "delta": 1e-6, "mechanisms": [{}], "protected_dataset": {"name": "o/x"}}
    if warning == NAMES_THE_DATASET:
        (folder / "README.md").write_text("---\ndatasets: [somebody/faces]\n---\n")
    if warning == SPENT_ON_THE_SAME:
        report["protected_dataset"] = {"name": "org/faces"}
    (folder / "privacy.json").write_text(json.dumps(report))
    config = from_model(folder, dataset_name="org/faces")
    with caplog.at_level(logging.WARNING, logger="dp_curriculum"):
        run_curriculum(config, digits.select(range(64)), output_dir=tmp_path / "out")
    assert any("--pretrained_model_name_or_path" in record.getMessage() for record in caplog.records) == bool(warning)
    shared = tmp_path / "shared"
    export_release(tmp_path / "out", shared, repo_id="org/dp-faces")
    fails = [check for check in check_folder(shared) if check.fails]
    assert fails == []
    text = (shared / "README.md").read_text()
    assert str(folder) not in text and "starting from a model in a local folder" in text
    assert warning is None or warning in text
    for change in (
        lambda text: text.replace("- start: ", "- began: "),
        lambda text: text.replace("is an assumption", "is certain"),
        lambda text: text.replace(", starting from a model in a local folder", ""),
    ):
        (shared / "README.md").write_text(change(text))
        assert any(check.fails for check in check_folder(shared)), "a card that says another thing of it"


@pytest.mark.parametrize(
    "change",
    [
        lambda entry, report: entry.update(provenance="it is public, I promise"),
        lambda entry, report: entry.update(revision="main"),
        lambda entry, report: entry.update(note="buy now"),
        lambda entry, report: entry.update(privacy="by its own report epsilon 0 at delta 0"),
        lambda entry, report: report["not_covered"].remove(KNOWS_THE_IMAGES),
        lambda entry, report: report["public_data"].append(dict(entry)),
        lambda entry, report: report["public_data"].remove(entry),
    ],
)
def test_other_words_of_a_report_are_found(
    change: Callable[[dict[str, Any], dict[str, Any]], None], started_report: dict[str, Any]
) -> None:
    from dp_curriculum.sharing.report_words import check_words

    assert check_words(started_report).holds
    report = json.loads(json.dumps(started_report))
    change(report["public_data"][0], report)
    assert check_words(report).fails


@pytest.fixture(scope="module")
def started_report(started_run: Path) -> dict[str, Any]:
    return dict(json.loads((started_run / "privacy.json").read_text()))


@pytest.fixture(scope="module")
def started_run(tmp_path_factory: pytest.TempPathFactory, digits: datasets.Dataset) -> Path:
    root = tmp_path_factory.mktemp("started")
    config = CurriculumConfig().replace(
        pretrained_model_name_or_path=str(save_tiny(root / "model")),
        resolution=8,
        num_channels=1,
        stages=["dp_sgd"],
        expected_batch_size=61,
        num_dp_steps=2,
        num_inference_steps=2,
        sample_steps=0,
    )
    run_curriculum(config, digits.select(range(61)), output_dir=root / "out")
    return root / "out"


@pytest.mark.parametrize("schedule", [{"beta_end": 0.02}, {"prediction_type": "x"}, "linear", 7])
def test_a_noise_schedule_that_is_none_is_found_in_what_was_published(
    schedule: Any, started_run: Path, tmp_path: Path
) -> None:
    export_release(started_run, tmp_path / "shared", repo_id="org/dp")
    index = tmp_path / "shared" / "model_index.json"
    values = json.loads(index.read_text())
    assert values["noise_schedule"]["prediction_type"] == "epsilon"
    index.write_text(json.dumps({**values, "noise_schedule": schedule}))
    fails = {check.name: check for check in check_folder(tmp_path / "shared") if check.fails}
    assert "model_index.json" in fails and "noise_schedule" in str(fails["model_index.json"])


def test_a_report_that_is_told_anew_says_the_same_of_the_start(
    started_report: dict[str, Any], started_run: Path
) -> None:
    """As after a tuning."""
    folder = RunFolder(started_run)
    with PrivacyLedger.open(folder.ledger, create=False) as ledger:
        report = retell_release(folder, CurriculumConfig.from_yaml(folder.config), ledger)
    assert report.to_dict() == started_report


def test_an_audit_of_a_configuration_with_a_start_takes_its_own_tiny_network() -> None:
    config = CurriculumConfig().replace(pretrained_model_name_or_path="org/public", revision="abc", num_channels=3)
    tiny = tiny_model(config)
    assert tiny.start.pretrained_model_name_or_path is None and not tiny.has_prior and not config.has_prior


# --- plans, and other ways to run ----------------------------------------------------------------------------------


def test_a_plan_knows_the_network_and_refuses_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model")
    plan = ["plan", "--pretrained_model_name_or_path", str(folder), "--resolution", "8", "--stages", "dp_sgd"]
    plan += ["--expected_batch_size", "8", "--num_dp_steps", "2", "--sample_steps", "0", "--num_inference_steps", "2"]
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # a plan reads no weights
    assert main(plan) == 0
    said = capsys.readouterr().out
    count = sum(parameter.numel() for parameter in tiny_unet(num_class_embeds=11).parameters())
    assert f"{count:,} parameters" in said and "DDPM, epsilon, block_out_channels 8 16" in said
    assert main([*plan, "--layers_per_block", "2"]) == 2
    assert "--layers_per_block=2 to be left out" in capsys.readouterr().err
    assert main([*plan, "--num_channels", "3"]) == 2
    assert "--num_channels=3 to be 1" in capsys.readouterr().err


def test_images_of_other_channels_are_refused_before_they_are_read(
    from_model: Callable[..., CurriculumConfig], digits: datasets.Dataset, tmp_path: Path
) -> None:
    config = from_model(save_tiny(tmp_path / "model"), num_channels=3)
    with pytest.raises(ValueError, match="--num_channels=3 to be 1"):
        run_curriculum(config, digits, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="--resolution=16 to be 8"):
        run_curriculum(config.replace(num_channels=1, resolution=16), digits, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the chain -----------------------------------------------------------------------------------------------------


@pytest.fixture
def public_folder(tmp_path: Path) -> Path:
    """The digits of the test split, in three classes, as a public dataset of colour images."""
    rows = digits_dataset("test").filter(lambda label: label < 3, input_columns="label", keep_in_memory=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    folder = tmp_path / "public"
    folder.mkdir()
    columns = {"image": list(rows["image"]), "label": list(rows["label"])}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return folder


def test_the_chain_from_public_images_to_private_ones(
    public_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train in public, check the card, start from it, check again: by the commands of the documentation, small."""
    monkeypatch.chdir(tmp_path)
    small = ["--resolution", "8", "--num_channels", "1", "--num_inference_steps", "2", "--sample_steps", "0"]
    public = ["train", "--dataset_name", "none", "--stages", "public", "--pretrain_dataset_name", str(public_folder)]
    public += [*small, "--block_out_channels", "8", "16", "--pretrain_steps", "3", "--output_dir", "public-model"]
    assert main(public) == 0
    report = json.loads(Path("public-model/privacy.json").read_text())
    assert report["epsilon"] == 0 and report["mechanisms"] == [] and report["private"]
    assert report["protected_dataset"] == {"name": None, "role": "training"}
    assert "num_records" not in report["unprotected_quantities"] and report["data_domain"]["num_classes"] == 3
    card = Path("public-model/README.md").read_text()
    assert "no private image was read" in card and "nobody can find out" not in card
    assert "(classes: a, b, c)" in card and "on public images (a local folder)." in card and "| epsilon | 0 at" in card
    assert main(["verify", "public-model", "--local_run"]) == 0
    private = ["train", "--stages", "dp_sgd", "--pretrained_model_name_or_path", "public-model", *small]
    private += ["--expected_batch_size", "64", "--num_dp_steps", "2", "--output_dir", "private-model"]
    assert main(private) == 0
    assert main(["verify", "private-model", "--local_run"]) == 0
    report = json.loads(Path("private-model/privacy.json").read_text())
    assert "by its own report trained on public data alone" in report["public_data"][0]["privacy"]
    assert 9.9 < report["epsilon"] <= 10 and str(tmp_path) not in Path("private-model/README.md").read_text()
    before, after = (
        UNet2DModel.from_pretrained(f"{name}/unet").class_embedding.weight.detach()
        for name in ("public-model", "private-model")
    )
    assert before.shape[0] == 4 and after.shape[0] == 11
    assert float((after - before[3]).abs().max()) < 0.1 < float((before[0] - before[3]).abs().max()), "from 'no class'"
    capsys.readouterr()
    assert main(["evaluate", "public-model"]) == 2
    assert "none are private" in capsys.readouterr().err


def test_classes_follow_no_class_where_public_images_teach_a_model_that_knew_none(
    trained: Callable[[str], Path],
    from_model: Callable[..., CurriculumConfig],
    digits: datasets.Dataset,
    public_folder: Path,
    tmp_path: Path,
) -> None:
    fields = {"stages": ["public"], "pretrain_dataset_name": str(public_folder), "pretrain_steps": 3}
    result = run_curriculum(from_model(trained("epsilon"), **fields), digits, output_dir=tmp_path / "out")
    *classes, none = result.pipeline.unet.class_embedding.weight.detach()
    assert none.any() and all(torch.equal(row, none) for row in classes), "they began as zeros, and so as no class"


def test_a_public_dataset_without_classes_trains_one(
    public_folder: Path, make_config: Callable[..., CurriculumConfig], tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_parquet(str(public_folder / "train.parquet")).remove_columns("label")
    rows.to_parquet(public_folder / "train.parquet")
    config = make_config(
        dataset_name="none", stages=["public"], pretrain_dataset_name=str(public_folder), lesson_noise_multiplier=None,
        num_inference_steps=2,
    )  # fmt: skip
    from dp_curriculum.lessons.public_images import read_public_images

    assert set(read_public_images(config, ("image",)).labels.tolist()) == {0}, "its class is learned, not 'no class'"
    with pytest.raises(ValueError, match="dataset to be left out"):
        run_curriculum(config, rows, output_dir=tmp_path / "out")
    result = run_curriculum(config, output_dir=tmp_path / "out")
    assert result.pipeline.num_classes == 1 and result.report.epsilon == 0


def test_a_plan_of_public_images_alone_needs_no_size(public_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "--dataset_name", "none", "--stages", "public", "--pretrain_dataset_name", str(public_folder)]
    assert main([*plan, "--num_channels", "3", "--no_estimate"]) == 0
    assert "no images, 3 classes; stages: public" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": ["public", "dp_sgd"]}, "--dataset_name=none to come with --stages public alone"),
        ({"stages": ["mean"], "pretrain_dataset_name": None}, "--stages public alone"),
        ({"holdout": 0.1}, "--holdout=0.1 to be left out"),
        ({"public_dataset_size": 9}, "--public_dataset_size=9 to be left out"),
        ({"dataset_ledger": "x"}, "--dataset_ledger=x to be left out"),
    ],
)
def test_no_private_images_go_with_public_ones_alone(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurriculumConfig().replace(
            **{"dataset_name": "none", "stages": ["public"], "pretrain_dataset_name": "x", **fields}
        )
