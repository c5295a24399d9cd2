"""No loader of ours reads a pickle, whatever lies where the weights are looked for."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from dp_curriculum.cli import main
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.runs.run_contents import load_unet


@pytest.fixture
def model(finished_run: Path, tmp_path: Path) -> Path:
    """A pipeline's files, as they are shared."""
    for name in ("unet", "scheduler"):
        shutil.copytree(finished_run / name, tmp_path / "model" / name)
    shutil.copyfile(finished_run / "model_index.json", tmp_path / "model" / "model_index.json")
    return tmp_path / "model"


def images_of(folder: Path) -> torch.Tensor:
    pipeline = DPCurriculumPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(generator=torch.Generator().manual_seed(0), output_type="pt").images


class _Payload:
    """As a pickle, it leaves a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def write_pickle(folder: Path, name: str, kind: str) -> None:
    """Weights as a pickle in the place of safetensors: harmless ones, which diffusers reads, or code."""
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    if kind == "code":
        (folder / "unet" / name).write_bytes(pickle.dumps(_Payload(folder / "executed")))
    else:
        torch.save(tensors, folder / "unet" / name)
    if name == "shard.bin":
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["tensors", "code"])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "shard.bin"])
def test_weights_in_a_pickle_are_never_read(
    name: str, kind: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where an index of safetensors lists one, which diffusers reads although it is asked for safetensors."""
    write_pickle(model, name, kind)
    read: list[Any] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: (read.append(args), load(*args, **kwargs))[1])
    for options in ({}, {"use_safetensors": None}, {"use_safetensors": True}, {"use_safetensors": False}):
        with pytest.raises((OSError, ValueError), match="safetensors"):
            DPCurriculumPipeline.from_pretrained(model, **options)
    assert main(["sample", str(model), "--output_dir", str(model / "images")]) == 2
    assert read == [] and not (model / "executed").exists() and not (model / "images").exists()
    if kind == "tensors":  # the stock loader does read them: the test would notice
        assert UNet2DModel.from_pretrained(model / "unet") is not None and read


def test_a_pickle_beside_safetensors_is_not_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = images_of(model)
    payload = pickle.dumps(_Payload(model / "executed"))
    for name in ("unet/diffusion_pytorch_model.bin", "unet/pytorch_model.bin", "diffusion_pytorch_model.bin"):
        (model / name).write_bytes(payload)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle is read"))
    assert torch.equal(images_of(model), before) and not (model / "executed").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "x.bin"}}'])
def test_an_index_that_is_none_of_safetensors_is_refused(content: str, model: Path) -> None:
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="Refusing to load .*index.json: it lists weights that are no safetensors"):
        DPCurriculumPipeline.from_pretrained(model)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "shard.bin"])
def test_pickles_of_a_repository_are_not_read(
    name: str, model: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pickle(model, name, "code")
    files = [path for path in model.rglob("*") if path.is_file()]
    hub.put("org/faces", {path.relative_to(model).as_posix(): path.read_bytes() for path in files})
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle is read"))
    with pytest.raises((OSError, ValueError), match="safetensors"):
        DPCurriculumPipeline.from_pretrained("org/faces")


def test_parts_that_are_safetensors_are_loaded(model: Path, tmp_path: Path) -> None:
    DPCurriculumPipeline.from_pretrained(model).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts" / "unet").glob("*.safetensors"))) > 1
    whole, parts = (DPCurriculumPipeline.from_pretrained(f).unet.state_dict() for f in (model, tmp_path / "parts"))
    assert set(whole) == set(parts) and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "shard.bin"])
def test_taught_weights_are_read_from_their_safetensors_alone(name: str, model: Path) -> None:
    """As `--resume_from_checkpoint` and `evaluate --each_stage` read them."""
    taught = load_unet(model / "unet")
    expected = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in taught.state_dict().items()) and not taught.training
    write_pickle(model, name, "tensors")
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
        load_unet(model / "unet")
