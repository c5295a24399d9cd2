"""Runs on the latents of a public autoencoder: the whole path, what they spend, say and refuse."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from autoencoders import random_pixels, save_vae, tiny_vae
from hub_server import Hub
from PIL import Image
from ranks import results_of

from dp_curriculum.audit.frozen import FrozenGenerator
from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import NO_CONTRIBUTION, PrivateImages
from dp_curriculum.diffusion.autoencoder import LatentSpace
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.evaluation.evaluation import evaluate_leakage
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline, decode_latents
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.sharing import model_source
from dp_curriculum.sharing.export import VAE_CONFIG, VAE_WEIGHTS, export_release
from dp_curriculum.sharing.published import check_folder
from dp_curriculum.sharing.report_words import check_words
from dp_curriculum.sharing.starting_words import AUTOENCODER_ROLE, NAMES_THE_DATASET
from dp_curriculum.training import encoding
from dp_curriculum.training.curriculum import run_curriculum
from dp_curriculum.training.encoding import encode_images, settle_autoencoder
from dp_curriculum.training.finishing import retell_release


FromVae = Callable[..., CurriculumConfig]


def colours(count: int, seed: int = 0) -> datasets.Dataset:
    """Pictures of 32 pixels of two classes, one darker than the other."""
    pixels = random_pixels(count, seed=seed).permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(np.uint8(image * (0.4 + 0.6 * (row % 2)))) for row, image in enumerate(pixels)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    return datasets.Dataset.from_dict(
        {"image": pictures, "label": [row % 2 for row in range(count)]}, features=features
    )


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("public") / "vae")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, one sub-folder per class, with splits to train on and to compare with."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count, seed in (("train", 420, 0), ("test", 64, 1)):
        for row, example in enumerate(colours(count, seed)):
            folder = root / split / ("dark", "light")[example["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            example["image"].save(folder / f"{row:03d}.png")
    return root


@pytest.fixture
def from_vae(make_config: Callable[..., CurriculumConfig], vae_folder: Path) -> FromVae:
    """A configuration on the 8x8 latents of 32x32 images."""

    def make(**fields: Any) -> CurriculumConfig:
        options = {"resolution": 32, "num_channels": 3, "num_inference_steps": 2, "sample_steps": 0, "seed": 0}
        return make_config(**{"vae_name_or_path": str(vae_folder), **options, **fields})

    return make


# --- the whole path ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(
    make_config: Callable[..., CurriculumConfig],
    vae_folder: Path,
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a run with a lesson, from the command line."""
    config = make_config(
        vae_name_or_path=str(vae_folder),
        dataset_name=str(pictures),
        resolution=32,
        num_channels=3,
        num_classes=2,
        stages=["moments", "dp_sgd"],
        num_inference_steps=2,
        sample_steps=2,
        checkpointing_steps=2,
        seed=0,
        holdout=0.35,
    )
    root = tmp_path_factory.mktemp("finished")
    config.to_yaml(root / "config.yaml")
    assert main(["train", "--config", str(root / "config.yaml"), "--output_dir", str(root / "run")]) == 0
    return root / "run"


def test_train_sample_evaluate_verify_synthesize_and_export(
    finished: Path, quick_classifiers: None, tmp_path: Path
) -> None:
    assert main(["verify", str(finished), "--local_run"]) == 0
    samples = tmp_path / "samples"
    assert main(["sample", str(finished), "--num_images", "4", "--output_dir", str(samples)]) == 0
    assert Image.open(next(samples.glob("*-class0.png"))).size == (32, 32)
    options = ["--num_images", "100", "--classifiers", "logistic", "--output_dir", str(tmp_path / "evaluation")]
    assert main(["evaluate", str(finished), *options, "--leakage", "--each_stage"]) == 0
    found = {row["name"] for row in json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["metrics"]}
    assert {"accuracy_logistic", "fd_haar", "membership_auc", "nearest_training_share"} <= found
    dataset = tmp_path / "dataset"
    assert main(["synthesize", str(finished), "--num_images", "6", "--output_dir", str(dataset)]) == 0
    rows = datasets.load_dataset(
        "parquet", data_dir=str(dataset / "data"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert rows[0]["image"].size == (32, 32)
    assert main(["push", str(finished), "--export_dir", str(tmp_path / "shared"), "--license", "mit"]) == 0
    assert main(["verify", str(tmp_path / "shared")]) == 0
    assert (tmp_path / "shared" / VAE_WEIGHTS).is_file()


def test_the_sheets_of_a_run_are_pictures(finished: Path) -> None:
    for sheet in (
        finished / "samples.png",
        finished / "lesson_moments.png",
        *(finished / "run" / "samples").iterdir(),
    ):
        picture = Image.open(sheet)
        assert picture.mode == "RGB" and min(picture.size) >= 2 * 56, sheet


def test_what_the_pipeline_samples_is_what_the_sampler_of_latents_gives(finished: Path, vae_folder: Path) -> None:
    pipeline = DPCurriculumPipeline.from_pretrained(finished)
    assert pipeline.prior is not None and pipeline.latent_shape == (4, 8, 8) and pipeline.image_size == (32, 32)
    options: dict[str, Any] = {"class_labels": [0, 1, 1], "num_inference_steps": 2}
    images, latents = (
        pipeline(generator=torch.Generator().manual_seed(5), output_type=kind, **options).images
        for kind in ("pt", "latent")
    )
    assert torch.equal(images, decode_latents(tiny_vae(), latents)), "by the public autoencoder, as it was given"


def test_the_report_and_the_card_name_the_autoencoder(finished: Path, vae_folder: Path, tmp_path: Path) -> None:
    report = json.loads((finished / "privacy.json").read_text())
    (entry,) = report["public_data"]
    assert entry["role"] == AUTOENCODER_ROLE and entry["name"] == "a local folder" and len(entry["revision"]) == 64
    assert "assumption" in entry["provenance"] and entry["license"] == "not stated"
    assert any("autoencoder" in sentence for sentence in report["not_covered"])
    assert report["data_domain"]["resolution"] == 32 and VAE_WEIGHTS in report["weights"]
    card = (finished / "README.md").read_text()
    assert "in the latents of a public autoencoder, a model in a local folder" in card
    assert "- autoencoder: a local folder at revision" in card and "parameters, 4x8x8" in card
    shared = tmp_path / "shared"
    export_release(finished, shared, repo_id="org/dp-colours")
    assert str(vae_folder) not in "".join(path.read_text() for path in shared.rglob("*.json"))
    for change in (
        lambda text: text.replace("- autoencoder: ", "- encoder: "),
        lambda text: text.replace("is an assumption", "is certain"),
        lambda text: text.replace(", in the latents of a public autoencoder, a model in a local folder", ""),
    ):
        text = (shared / "README.md").read_text()
        (shared / "README.md").write_text(change(text))
        assert any(check.fails for check in check_folder(shared)), "a card that says another thing of it"
        (shared / "README.md").write_text(text)
    assert not any(check.fails for check in check_folder(shared))


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda folder: (folder / VAE_WEIGHTS).unlink(), "files"),
        (lambda folder: (folder / VAE_CONFIG).write_text("{}"), "weights"),
        (lambda folder: tiny_vae(seed=1).save_pretrained(folder / "vae"), "weights (sha256)"),
        (lambda folder: edit(folder / VAE_CONFIG, latent_channels=8), "weights"),
        (lambda folder: (folder / "vae" / "code.py").write_text(""), "files"),
        (lambda folder: edit(folder / "model_index.json", latent_bound=None), "model_index.json"),
        (lambda folder: edit(folder / "model_index.json", vae=["vae", "Mine"]), "model_index.json"),
    ],
)
def test_another_autoencoder_is_found_in_what_was_published(
    spoil: Callable[[Path], Any], name: str, finished: Path, tmp_path: Path
) -> None:
    export_release(finished, tmp_path / "shared", repo_id="org/dp")
    assert not any(check.fails for check in check_folder(tmp_path / "shared"))
    spoil(tmp_path / "shared")
    assert name in {check.name for check in check_folder(tmp_path / "shared") if check.fails}


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "change",
    [
        lambda entry, report: entry.update(provenance="it is public, I promise"),
        lambda entry, report: entry.update(revision="main"),
        lambda entry, report: entry.update(note="buy now"),
        lambda entry, report: report["not_covered"].pop(),
        lambda entry, report: report["public_data"].append(dict(entry)),
        lambda entry, report: report["public_data"].remove(entry),
    ],
)
def test_other_words_of_a_report_are_found(change: Callable[[Any, Any], None], finished: Path) -> None:
    report = json.loads((finished / "privacy.json").read_text())
    assert check_words(report).holds
    change(report["public_data"][0], report)
    assert check_words(report).fails


def test_a_report_that_is_told_anew_says_the_same(finished: Path) -> None:
    folder = RunFolder(finished)
    before = json.loads(folder.privacy.read_text())
    with PrivacyLedger.open(folder.ledger, create=False) as ledger:
        report = retell_release(folder, CurriculumConfig.from_yaml(folder.config), ledger)
    assert report.to_dict() == before


@pytest.mark.parametrize(
    "stages", [["mean", "dp_sgd"], ["frequency", "dp_sgd"], ["moments", "mean", "dp_sgd"], ["dp_sgd"]]
)
def test_each_lesson_is_taught_in_latents(stages: list[str], from_vae: FromVae, tmp_path: Path) -> None:
    result = run_curriculum(from_vae(stages=stages, shortcut=None), colours(64), output_dir=tmp_path / "out")
    assert result.finished and result.pipeline.vae is not None
    assert (result.pipeline.prior is not None) == (stages[0] == "moments")
    assert not any(check.fails for check in check_folder(tmp_path / "out", local_run=True))


def test_moments_can_be_taught_to_the_network_instead(from_vae: FromVae, tmp_path: Path) -> None:
    config = from_vae(stages=["moments", "dp_sgd"], shortcut="pretrain")
    result = run_curriculum(config, colours(64), output_dir=tmp_path / "out")
    assert result.finished and result.pipeline.prior is None


def test_public_images_are_encoded_too_and_others_start_from_them(
    from_vae: FromVae, pictures: Path, tmp_path: Path
) -> None:
    """A public model in latents, and a private run from it, with the autoencoder that lies beside it."""
    public = from_vae(
        dataset_name="none", stages=["public"], pretrain_dataset_name=str(pictures), lesson_noise_multiplier=None
    )
    result = run_curriculum(public, output_dir=tmp_path / "public")
    assert result.report.epsilon == 0 and result.pipeline.vae is not None
    start = {"pretrained_model_name_or_path": str(tmp_path / "public"), "block_out_channels": [32, 64]}
    config = from_vae(**start, stages=["dp_sgd"], lesson_noise_multiplier=None, vae_name_or_path=None)
    with pytest.raises(ValueError, match="--vae_name_or_path to be given: .* works on the latents"):
        run_curriculum(config, colours(64), output_dir=tmp_path / "private")
    config = from_vae(
        **start,
        stages=["dp_sgd"],
        lesson_noise_multiplier=None,
        vae_name_or_path=str(tmp_path / "public"),
        vae_subfolder="vae",
    )
    private = run_curriculum(config, colours(64), output_dir=tmp_path / "private")
    assert {row["role"] for row in private.report.fields["public_data"]} == {"starting weights", "autoencoder"}
    assert not any(check.fails for check in check_folder(tmp_path / "private", local_run=True))
    other = config.replace(vae_name_or_path=str(save_vae(tmp_path / "other", latent_channels=8)), vae_subfolder=None)
    with pytest.raises(ValueError, match="its network has 4 channels, and the latents of .* have 8"):
        run_curriculum(other, colours(64), output_dir=tmp_path / "never")


def test_public_images_may_be_moved_to_the_moments_of_latents(from_vae: FromVae, tmp_path: Path) -> None:
    folder = tmp_path / "public"
    folder.mkdir()
    colours(40, seed=5).remove_columns("label").to_parquet(folder / "train.parquet")
    config = from_vae(
        stages=["moments", "public"],
        lesson_noise_multiplier=None,
        pretrain_dataset_name=str(folder),
        pretrain_dataset_matching="moments",
        pretrain_steps=0,
    )
    result = run_curriculum(config, colours(64), output_dir=tmp_path / "run")
    assert result.pipeline.prior.photos.shape == (80, 4, 8, 8), "40 of each class, as latents"
    assert result.pipeline(class_labels=["dark"]).images[0].size == (32, 32)
    assert not any(check.fails for check in check_folder(tmp_path / "run", local_run=True))
    as_they_are = run_curriculum(
        config.replace(pretrain_dataset_matching=None), colours(64), output_dir=tmp_path / "none"
    )
    assert as_they_are.pipeline.prior.config.num_photos == 0, "of latents it has to be asked for"


# --- each image by itself ------------------------------------------------------------------------------------------


def private_images(images: torch.Tensor, labels: list[int], **fields: Any) -> PrivateImages:
    return PrivateImages(images, torch.tensor(labels), ("dark", "light"), **fields)


def test_one_image_more_changes_the_latents_of_no_other() -> None:
    space, images = LatentSpace(tiny_vae()), random_pixels(7)
    labels = [0, 1, 0, 1, NO_CONTRIBUTION, 0, 1]
    first = encode_images(private_images(images, labels), space, Accelerator(cpu=True))
    second = encode_images(private_images(images[1:], labels[1:]), space, Accelerator(cpu=True))
    assert torch.equal(first.images[1:], second.images) and first.labels.tolist() == labels
    assert first.images.dtype == torch.uint8 and first.images.shape == (7, 4, 8, 8)


@pytest.mark.parametrize("stage", ["mean", "moments", "frequency"])
def test_one_image_more_moves_the_sums_of_a_lesson_by_at_most_its_norm(stage: str, from_vae: FromVae) -> None:
    """Real images, through the autoencoder and the query, with noise that stands still; a twin is caught."""
    config, _ = settle_autoencoder(from_vae(stages=[stage, "dp_sgd"]))
    lesson, images, labels = LESSONS[stage], random_pixels(9), [0, 1] * 4 + [0]

    def distances(space: LatentSpace) -> list[float]:
        mechanisms = lesson.plan(config, 20.0)
        first, second = FrozenGenerator(), None
        for count in (9, 8):
            private = encode_images(private_images(images[:count], labels[:count]), space, Accelerator(cpu=True))
            second = first if count == 9 else FrozenGenerator(recorded=first)
            lesson.release(private, config, mechanisms, 20, second)
        assert second is not None and len(first.sums) == len(second.sums) == len(mechanisms)
        return [
            float((one - other).norm()) / mechanism.clip_norm
            for one, other, mechanism in zip(first.sums, second.sums, mechanisms)
        ]

    found = distances(LatentSpace(tiny_vae()))
    assert max(found) <= 1 + 1e-9 and min(found) > 0.01, "the image is in the sum"
    assert max(distances(_Together(tiny_vae()))) > 1 + 1e-9, "a twin whose latents depend on all images"


class _Together(LatentSpace):
    """A twin whose latents of an image turn with the number of images."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents, is_finite = super().encode(images)
        return (latents if len(images) % 2 else 255 - latents), is_finite


def test_a_row_without_finite_latents_adds_zero_like_one_that_is_not_there(
    from_vae: FromVae, caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = settle_autoencoder(from_vae(stages=["mean", "dp_sgd"]))
    images, labels = random_pixels(6), [0, 1, 0, 1, 0, 1]
    vae = tiny_vae()
    encode = vae.encode

    def broken(pixels: torch.Tensor) -> Any:
        found = encode(pixels)
        if torch.equal(pixels[0], images[5] / 127.5 - 1):
            found.latent_dist.mean.fill_(math.nan)
        return found

    vae.encode = broken
    with caplog.at_level(logging.DEBUG, logger="dp_curriculum"):
        private = encode_images(private_images(images, labels), LatentSpace(vae), Accelerator(cpu=True))
    assert private.labels.tolist() == [0, 1, 0, 1, 0, NO_CONTRIBUTION]
    assert [record.getMessage() for record in caplog.records] == ["encoding images"], "no word of a row"
    recorded = FrozenGenerator()
    mechanisms = LESSONS["mean"].plan(config, 20.0)
    LESSONS["mean"].release(private, config, mechanisms, 20, recorded)
    without = private_images(private.images[:5], labels[:5])
    again = FrozenGenerator(recorded=recorded)
    LESSONS["mean"].release(without, config, mechanisms, 20, again)
    assert torch.equal(recorded.sums[0], again.sums[0])


def test_two_processes_encode_what_one_does_and_one_opens_the_model(
    from_vae: FromVae, vae_folder: Path, tmp_path: Path
) -> None:
    images = random_pixels(5)
    alone, _ = LatentSpace(tiny_vae()).encode(images)
    config, rows = from_vae(), colours(64)

    def work(rank: int) -> Any:
        accelerator = Accelerator(cpu=True)
        settled, encoder = settle_autoencoder(config)
        assert encoder is not None
        if rank == 1:  # as on another machine

            def none(*args: Any, **options: Any) -> Any:
                raise AssertionError("opened by another process than the main one")

            encoding.open_source = none  # type: ignore[attr-defined]
            type(encoder.model).load = none  # type: ignore[method-assign]
        space = encoder.open(settled, accelerator)
        found = encode_images(private_images(images, [0, 1, 0, 1, 0]), space, accelerator)
        result = run_curriculum(config, rows, output_dir=tmp_path / "out")
        return found.images.tolist(), found.labels.tolist(), float(result.pipeline.unet.conv_in.weight.sum())

    first, second = results_of(2, work)
    assert first == second and torch.equal(torch.tensor(first[0], dtype=torch.uint8), alone)


def test_leakage_is_measured_on_what_the_network_sees(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = DPCurriculumPipeline.from_pretrained(finished)
    images = random_pixels(12)
    seen: list[torch.Tensor] = []
    from dp_curriculum.evaluation import evaluation

    losses = evaluation.denoising_losses

    def watched(unet: Any, values: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(values)
        return losses(unet, values, *args, **options)

    monkeypatch.setattr(evaluation, "denoising_losses", watched)
    parts = [private_images(images[part], [0, 1, 0, 1, 0, 1]) for part in (slice(0, 6), slice(6, 12))]
    evaluate_leakage(pipeline, images[:4] / 255, *parts)
    expected, _ = LatentSpace(tiny_vae()).encode(images)
    found = (torch.cat(seen) * 255).round().to(torch.uint8)
    assert sorted(map(bytes, found.numpy())) == sorted(map(bytes, expected.numpy()))


# --- pinned, planned, refused --------------------------------------------------------------------------------------


def test_a_resumed_run_takes_up_the_same_autoencoder_and_refuses_another(
    from_vae: FromVae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, rows = save_vae(tmp_path / "vae"), tmp_path / "out", colours(64)
    config, step = from_vae(vae_name_or_path=str(folder), checkpointing_steps=2), DPTrainer.step

    def until_two(self: DPTrainer) -> None:
        if self.num_steps_taken == 2:
            raise RuntimeError("power cut")
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPTrainer, "step", until_two)
        with pytest.raises(RuntimeError, match="power cut"):
            run_curriculum(config, rows, output_dir=out)
    saved = yaml.safe_load((out / "run" / "config.yaml").read_text())
    revision = saved["autoencoder"]["vae_revision"]
    assert len(revision) == 64 and saved["autoencoder"]["vae_latent_channels"] == 4
    assert saved["pretraining"]["augmentation"] == "none" and saved["lessons"]["central_post_process"] is False
    before = (out / "run" / "privacy_ledger.jsonl").read_bytes()
    save_vae(folder, seed=1)
    with pytest.raises(ValueError, match=f"to be {revision}, as the run in"):
        run_curriculum(config, rows, output_dir=out, resume_from_checkpoint="latest")
    named = CurriculumConfig.from_yaml(out / "run" / "config.yaml")  # as the last line of a run says to resume it
    with pytest.raises(ValueError, match="to be what --vae_revision="):
        run_curriculum(named, rows, output_dir=out, resume_from_checkpoint="latest")
    assert (out / "run" / "privacy_ledger.jsonl").read_bytes() == before
    save_vae(folder)
    result = run_curriculum(named, rows, output_dir=out, resume_from_checkpoint="latest")
    assert result.finished


def test_an_autoencoder_on_the_hub_is_pinned_to_its_commit_and_its_card_is_read(
    hub: Hub, from_vae: FromVae, vae_folder: Path, tmp_path: Path
) -> None:
    files = {f"vae/{path.name}": path.read_bytes() for path in vae_folder.iterdir()}
    card = "---\nlicense: creativeml-openrail-m\ndatasets: [org/faces]\n---\n"
    hub.put("org/public", {**files, "README.md": card.encode()}, kind="model", private=False)
    commit = hub.repositories[("model", "org/public")].commits[-1][0]
    config, encoder = settle_autoencoder(from_vae(vae_name_or_path="org/public", dataset_name="org/faces"))
    assert encoder is not None and config.autoencoder.vae_revision == commit
    assert encoder.facts["name"] == "org/public" and encoder.facts["license"] == "creativeml-openrail-m"
    assert (
        encoder.facts["warning"] == NAMES_THE_DATASET
        and "names the dataset that is private here" in encoder.warnings[0]
    )
    again, _ = settle_autoencoder(config)
    assert again == config
    space = encoder.open(config, Accelerator(cpu=True))
    assert torch.equal(space.encode(random_pixels(2))[0], LatentSpace(tiny_vae()).encode(random_pixels(2))[0])


def test_a_plan_counts_encoding_and_decoding(
    from_vae: FromVae, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no weights."""
    folder = save_vae(tmp_path / "vae")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    config = from_vae(
        vae_name_or_path=str(folder), dataset_name="org/faces", public_dataset_size=1_000_000, num_classes=2
    )
    config.to_yaml(tmp_path / "config.yaml")
    assert main(["plan", "--config", str(tmp_path / "config.yaml")]) == 0
    said = capsys.readouterr().out
    assert "each image is encoded by itself, to latents of 4x8x8" in said and "each image by itself, as 4x8x8" in said
    assert ", encoding " in said and "the images take 3.33 GB until they are encoded, then 0.26 GB" in said


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    (said,) = [line for line in lines if line.startswith("dp-curriculum: error")]
    return said


@pytest.mark.parametrize(
    ("spoil", "fields", "said"),
    [
        (None, {"vae_name_or_path": "./nothing"}, "to be a folder: there is none"),
        (None, {"vae_name_or_path": "org/nothing"}, "to be a folder, or in the cache of huggingface_hub"),
        (None, {"vae_subfolder": "decoder"}, "--vae_subfolder=decoder to be a folder of"),
        (None, {"vae_subfolder": "../x"}, "--vae_subfolder=../x to be a folder within the model"),
        (None, {"vae_revision": "main"}, "to be what --vae_revision=main says"),
        (None, {"num_channels": 1}, "--num_channels=1 to be 3, the channels of the images of"),
        (None, {"resolution": 30}, "--resolution=30 to be a multiple of 4"),
        (None, {"vae_latent_channels": 16, "vae_downsampling": 4}, "--vae_latent_channels=16 to be left out: it is 4"),
        ({"_class_name": "VQModel"}, {}, "its class is VQModel"),
        ({"scaling_factor": 0}, {}, "its scaling_factor is 0"),
        ("pickles", {}, "pickles alone (diffusion_pytorch_model.bin)"),
        ("no numbers", {}, "to be finite: encoder.conv_in.weight is not"),
        ("too large", {}, "random pixels is not finite"),
    ],
)
def test_bad_input_is_one_line_and_spends_nothing(
    spoil: Any,
    fields: dict[str, Any],
    said: str,
    from_vae: FromVae,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save_vae(tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    if isinstance(spoil, dict):
        edit(folder / "config.json", **spoil)
    elif spoil == "pickles":
        weights.rename(weights.with_suffix(".bin"))
    elif spoil is not None:
        vae = tiny_vae()
        with torch.no_grad():
            for weight in (vae.encoder.conv_in.weight, vae.encoder.conv_out.weight, vae.quant_conv.weight):
                weight.mul_(math.nan if spoil == "no numbers" else 1e30)
        vae.save_pretrained(folder)
    config = from_vae(**{"vae_name_or_path": str(folder), "dataset_name": str(pictures), "num_classes": 2, **fields})
    config.to_yaml(tmp_path / "config.yaml")
    out = tmp_path / "out"
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--output_dir", str(out)]) == 2
    assert said in one_line(capsys) and not out.exists()


@pytest.mark.parametrize("what", ["missing", "revision", "gated", "offline"])
def test_a_model_on_the_hub_that_cannot_be_had_is_one_line(
    what: str,
    hub: Hub,
    from_vae: FromVae,
    vae_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    files = {path.name: path.read_bytes() for path in vae_folder.iterdir()}
    hub.put("org/public", files, kind="model", private=False)
    if what == "gated":
        hub.gated.add("org/public")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", what == "offline")
    name, revision = "org/nothing" if what == "missing" else "org/public", "v9" if what == "revision" else None
    from_vae(vae_name_or_path=name, vae_revision=revision).to_yaml(tmp_path / "config.yaml")
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    expected = {
        "missing": "look at its name",
        "revision": "at --vae_revision=v9",
        "gated": "it is gated: accept its terms on the Hub",
        "offline": "in the cache of huggingface_hub",
    }
    assert expected[what] in (said := one_line(capsys)) and f"--vae_name_or_path={name}" in said
    assert not (tmp_path / "out").exists()


def test_the_kinds_of_public_models_have_their_own_options() -> None:
    kinds = (model_source.NETWORK, model_source.AUTOENCODER)
    flags = [flag for kind in kinds for flag in (kind.option, kind.revision, kind.subfolder)]
    fields = {f"--{name}" for section in CurriculumConfig().to_dict().values() for name in section}
    assert len(set(flags)) == 6 and set(flags) <= fields
