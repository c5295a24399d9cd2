"""Models to start from: what is read of them, what is made of their classes, and what is refused with a cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ddpm import PREDICTION_TYPES, save_tiny, tiny_unet
from diffusers import DDPMScheduler, EDMEulerScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.edm import SIGMA_DATA, build_unet
from dp_curriculum.diffusion.pretrained import check_channels, check_options, read_network
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.sharing.model_source import NETWORK, open_source


LABEL = "--pretrained_model_name_or_path=x"


def save_ours(folder: Path, *, names: tuple[str, ...] = ("cat", "dog"), **options: Any) -> Path:
    """A pipeline of this package for two classes."""
    patch_size = options.get("patch_size", 1)
    config = CurriculumConfig().replace(block_out_channels=[8, 16], patch_size=patch_size)
    unet = build_unet(config.model, resolution=8 * patch_size, num_channels=1, num_classes=len(names))
    scheduler = EDMEulerScheduler(sigma_data=SIGMA_DATA)
    pipeline = DPCurriculumPipeline(unet, scheduler, id2label=dict(enumerate(names)), **options)
    pipeline.save_pretrained(folder)
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# --- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("layout", ["pipeline", "flat", "bare", "named"])
def test_a_ddpm_network_is_found_in_each_layout(layout: str, prediction_type: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", prediction_type)
    if layout == "flat":  # as old repositories have it: all files at the root
        for path in [*folder.glob("unet/*"), *folder.glob("scheduler/*")]:
            shutil.move(path, folder / path.name)
    elif layout == "bare":
        shutil.move(folder / "scheduler", folder / "unet" / "scheduler")
        (folder / "model_index.json").unlink()
        folder = folder / "unet"
    elif layout == "named":
        folder = folder / "unet"
    found = read_network(folder, LABEL)
    assert found.schedule is not None and found.schedule.prediction_type == prediction_type
    assert (found.num_channels, found.resolution(), found.class_names, found.patch_size) == (1, 8, (), 1)
    unet = found.build(resolution=8, num_classes=2)
    found.load_into(unet, ("cat", "dog"))
    weights = unet.state_dict()
    assert not weights.pop("class_embedding.weight").any(), "samples stay what they were"
    assert all(torch.equal(value, weights[name]) for name, value in tiny_unet().state_dict().items())


def test_a_network_of_ours_keeps_what_its_classes_are(tmp_path: Path) -> None:
    found = read_network(save_ours(tmp_path / "model"), LABEL)
    assert found.schedule is None and found.class_names == ("cat", "dog")
    before = load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")["class_embedding.weight"]
    for names, rows in ((("cat", "dog"), [0, 1, 2]), (("dog", "cat"), [2, 2, 2]), (("a", "b", "c"), [2, 2, 2, 2])):
        unet = found.build(resolution=8, num_classes=len(names))
        found.load_into(unet, names)
        assert torch.equal(unet.class_embedding.weight, before[rows]), names


def test_a_network_of_ours_that_began_as_ddpm_or_has_patches_is_read_as_one(tmp_path: Path) -> None:
    fields = {"num_train_timesteps": 50, "beta_schedule": "linear", "beta_start": 0.01, "beta_end": 0.1}
    save_ours(tmp_path / "ddpm", noise_schedule={"prediction_type": "sample", **fields})
    for folder in (tmp_path / "ddpm", tmp_path / "ddpm" / "unet"):  # the scheduler beside it says EDM
        schedule = read_network(folder, LABEL).schedule
        assert schedule is not None and (schedule.prediction_type, schedule.beta_end) == ("sample", 0.1)
    save_ours(tmp_path / "patches", patch_size=2)
    found = read_network(tmp_path / "patches", LABEL)
    assert (found.patch_size, found.num_channels, found.resolution()) == (2, 1, 16)
    assert found.build(resolution=16, num_classes=1).config.sample_size == 8


def test_dropout_is_turned_off_and_half_precision_widened(tmp_path: Path) -> None:
    unet = tiny_unet(dropout=0.3).half()
    unet.save_pretrained(tmp_path)
    DDPMScheduler(prediction_type="epsilon").save_pretrained(tmp_path)
    found = read_network(tmp_path, LABEL)
    built = found.build(resolution=8, num_classes=2)
    found.load_into(built, ("a", "b"))
    assert built.config.dropout == 0 and built.dtype == torch.float32
    assert torch.equal(built.conv_in.weight, unet.conv_in.weight.float())


def test_old_names_of_attention_weights_are_read(tmp_path: Path) -> None:
    """Repositories of 2022 have query, key, value and proj_attn; diffusers renames them."""
    save_tiny(tmp_path)
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for now, before in renamed.items():
        weights = {name.replace(f".{now}.", f".{before}."): value for name, value in weights.items()}
    assert any("proj_attn" in name for name in weights)
    save_file(weights, path)
    found = read_network(tmp_path, LABEL)
    unet = found.build(resolution=8, num_classes=1)
    found.load_into(unet, ("a",))
    assert torch.equal(unet.mid_block.attentions[0].to_q.weight, tiny_unet().mid_block.attentions[0].to_q.weight)


# --- what is refused -----------------------------------------------------------------------------------------------


def _forget_type(folder: Path) -> None:
    edit(folder / "scheduler/scheduler_config.json", lambda config: config.pop("prediction_type"))


def _set(file: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / file, lambda config: config.update(values))


def _pickle(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_forget_type, 'does not say its prediction_type, .* Add "prediction_type": "epsilon" to a copy'),
        (_set(SCHEDULER, beta_schedule=None), "does not say its beta_schedule"),
        (_set(SCHEDULER, prediction_type="flow_prediction"), "prediction_type='flow_prediction'"),
        (_set(SCHEDULER, trained_betas=[0.1, 0.2]), "has trained_betas"),
        (_set(SCHEDULER, rescale_betas_zero_snr=True), "has rescale_betas_zero_snr"),
        (_set(SCHEDULER, _class_name="EDMEulerScheduler", sigma_data=0.5), "sigma_data=0.5"),
        (_set(UNET, _class_name="UNet2DConditionModel"), "text or other conditions. Start from a UNet2DModel"),
        (_set(UNET, time_embedding_type="fourier"), "time_embedding_type=fourier"),
        (_set(UNET, class_embed_type="timestep"), "class_embed_type=timestep"),
        (_set(UNET, out_channels=2), "takes 1 channels and gives 2"),
        (_set(UNET, num_class_embeds=10), "has 10 classes, and nothing says which"),
        (_set(UNET, sample_size=[8, 16]), "square images"),
        (_set(UNET, new_field=1), "has a new_field"),
        (_set(INDEX, vqvae=["diffusers", "VQModel"]), "works with its vqvae"),
        (_set(INDEX, prior=["dp_curriculum", "ClosedFormPrior"]), "adds to a prior"),
        (_pickle, r"pickles alone \(diffusion_pytorch_model.bin\), .* never read"),
        (
            lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
            "weights are in several files",
        ),
        (lambda folder: (folder / SCHEDULER).unlink(), "say what its network was trained for"),
        (lambda folder: (folder / UNET).unlink(), "no config.json and no unet/config.json. Name the folder"),
        (lambda folder: (folder / UNET).write_text("{"), "config.json .* to be JSON"),
        (
            lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").unlink(),
            "to hold diffusion_pytorch_model.safetensors",
        ),
    ],
)
def test_a_model_that_is_no_start_is_refused_in_one_line(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "model")
    assert open_source(str(tmp_path / "model"), NETWORK).model.schedule is not None
    spoil(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as refusal:
        open_source(str(tmp_path / "model"), NETWORK)
    assert "\n" not in str(refusal.value) and str(tmp_path / "model") in str(refusal.value)


@pytest.mark.parametrize("what", ["missing", "extra", "shape", "nan", "broken"])
def test_weights_that_are_not_of_the_network_are_refused(what: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "conv_out.weight"
    if what == "missing":
        del weights[name]
    elif what == "extra":
        weights["more.weight"] = torch.zeros(1)
    elif what == "shape":
        weights[name] = torch.zeros(1, 9, 3, 3)
    elif what == "nan":
        weights[name][0] = torch.nan
    save_file(weights, path)
    if what == "broken":
        path.write_bytes(path.read_bytes()[:-100])
    found = read_network(tmp_path, LABEL)
    with pytest.raises(ValueError, match="weights") as refusal:
        found.load_into(found.build(resolution=8, num_classes=1), ("a",))
    assert "\n" not in str(refusal.value) and LABEL in str(refusal.value)


def test_a_folder_is_pinned_by_the_hash_of_what_is_read(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    first = open_source(str(folder), NETWORK).revision
    assert len(first) == 64 and open_source(str(folder), NETWORK, revision=first).revision == first
    (folder / "notes.txt").write_text("not read")
    assert open_source(str(folder), NETWORK).revision == first
    for change in (_set(SCHEDULER, beta_end=0.03), _set(UNET, norm_eps=1e-4)):
        change(folder)
        with pytest.raises(ValueError, match="--revision="):
            open_source(str(folder), NETWORK, revision=first)
    assert open_source(str(folder), NETWORK).revision != first


@pytest.mark.parametrize(
    ("name", "subfolder", "message"),
    [
        ("./nowhere", None, "to be a folder: there is none"),
        ("a/b/c", None, "to be a folder: there is none"),
        ("not a name", None, "neither"),
        ("MODEL", "../other", "--subfolder=../other"),
        ("MODEL", "none", "--subfolder=none"),
    ],
)
def test_a_place_that_is_none_is_refused(name: str, subfolder: str | None, message: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        open_source(str(folder) if name == "MODEL" else name, NETWORK, subfolder=subfolder)


# --- beside the options --------------------------------------------------------------------------------------------


@pytest.fixture
def found(tmp_path: Path) -> Any:
    return read_network(save_tiny(tmp_path), LABEL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_out_channels": [16, 16]}, r"--block_out_channels=16 16 to be left out: .* with \[8, 16\]"),
        ({"layers_per_block": 3}, "--layers_per_block=3"),
        ({"patch_size": 2}, "--patch_size=2"),
        ({"attention_resolutions": [8], "block_out_channels": [8, 16]}, "--attention_resolutions=8"),
        ({"resolution": 16}, "--resolution=16 to be 8, .* add --resolution 8"),
    ],
)
def test_options_of_another_network_are_refused_by_name(fields: dict[str, Any], message: str, found: Any) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(CurriculumConfig().replace(**{"resolution": 8, **fields}), found)


def test_options_that_say_the_same_are_fine(found: Any) -> None:
    config = CurriculumConfig().replace(resolution=8, num_channels=1)
    check_options(config, found)
    check_options(config.replace(**found.options()), found)
    check_channels(config, found)
    assert found.options()["attention_resolutions"] == [4]
    with pytest.raises(ValueError, match="--num_channels=3 to be 1, .* add --num_channels 1"):
        check_channels(config.replace(num_channels=3), found)


def test_the_built_network_is_the_one_that_is_described(found: Any) -> None:
    """Its number of parameters, which plans and cards state, differs from the source by the classes alone."""
    built = found.build(resolution=8, num_classes=5)
    classes = built.class_embedding.weight.numel()
    assert classes == 6 * 32
    assert sum(p.numel() for p in built.parameters()) - classes == sum(p.numel() for p in tiny_unet().parameters())
    assert isinstance(built, UNet2DModel)
