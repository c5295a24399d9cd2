"""Whole runs that train a part of the weights: what they release, resume from and say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel

from dp_curriculum import DPCurriculumPipeline
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import digits_dataset
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.privacy.verification import verify_report
from dp_curriculum.runs.run_contents import load_unet
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.checkpointing import list_checkpoints, load_checkpoint
from dp_curriculum.runtime.hashing import hash_file
from dp_curriculum.sharing.export import export_release
from dp_curriculum.training import stages
from dp_curriculum.training.curriculum import initial_unet, run_curriculum
from dp_curriculum.training.run import make_accelerator
from dp_curriculum.training.validation import check_gradients


WAYS: dict[str, dict[str, Any]] = {
    "lora": {"trainable": "lora", "lora_rank": 2, "lora_alpha": 4.0},
    "attention": {"trainable": "attention"},
    "bias_norm": {"trainable": "bias_norm"},
}
OPTIONS = {"num_dp_steps": 4, "checkpointing_steps": 2, "sample_steps": 0, "num_inference_steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def few_digits() -> datasets.Dataset:
    return digits_dataset().select(range(64))


@pytest.fixture(scope="module", params=WAYS)
def trained(
    request: pytest.FixtureRequest, make_config: Any, few_digits: datasets.Dataset, tmp_path_factory: Any
) -> RunFolder:
    """A finished run of each way."""
    folder = tmp_path_factory.mktemp("trainable") / request.param
    run_curriculum(make_config(**OPTIONS, **WAYS[request.param]), few_digits, output_dir=folder)
    return RunFolder(folder)


def taught(folder: RunFolder) -> UNet2DModel:
    return load_unet(folder.lesson(1, "mean") / "unet")


def test_what_is_frozen_is_released_as_the_lesson_left_it(trained: RunFolder) -> None:
    kind = CurriculumConfig.from_yaml(trained.config).dp_sgd.trainable
    before, after = taught(trained).state_dict(), load_unet(trained.root / "unet").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    allowed = {
        "lora": lambda name: any(part in name for part in ("to_q", "to_k", "to_v", "to_out.0")) and "bias" not in name,
        "attention": lambda name: ".attentions." in name,
        "bias_norm": lambda name: after[name].ndim == 1,
    }[kind]
    assert moved == {name for name in after if allowed(name)} | {"class_embedding.weight"}


def test_the_release_is_a_stock_pipeline_that_loads_in_all_three_ways(trained: RunFolder, tmp_path: Path) -> None:
    exported = tmp_path / "shared"
    report = export_release(trained.root, exported, repo_id="org/model")
    ours = [DPCurriculumPipeline.from_pretrained(folder) for folder in (trained.root, exported)]
    stock = DiffusionPipeline.from_pretrained(exported, custom_pipeline=str(exported), trust_remote_code=True)
    drawn = []
    for pipeline in (*ours, stock):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn.append(pipeline(class_labels=[1, 2], generator=generator, output_type="pt").images)
    assert all(torch.equal(images, drawn[0]) for images in drawn)
    assert all(not check.fails for check in verify_report(report.to_dict()))
    assert report.epsilon <= 10 and not (exported / "adapter").exists()


def test_the_card_says_which_weights_were_trained(trained: RunFolder) -> None:
    kind = CurriculumConfig.from_yaml(trained.config).dp_sgd.trainable
    (line,) = [line for line in trained.card.read_text().splitlines() if line.startswith("- weights of DP-SGD: ")]
    words = {
        "lora": "LoRA of rank 2 and scale 2 on to_q, to_k, to_v, to_out.0",
        "attention": "the attention blocks",
        "bias_norm": "biases and normalization",
    }
    assert words[kind] in line and "and the class embedding: " in line


def test_an_adapter_of_peft_lies_beside_the_merged_network(trained: RunFolder) -> None:
    if CurriculumConfig.from_yaml(trained.config).dp_sgd.trainable != "lora":
        assert not trained.adapter.exists()
        return
    from peft import PeftModel

    assert sorted(path.name for path in trained.adapter.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    inputs, levels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(3)
    labels = torch.tensor([0, 3, 10])
    with torch.no_grad():
        merged = load_unet(trained.root / "unet")(inputs, levels, class_labels=labels).sample
        before = taught(trained)(inputs, levels, class_labels=labels).sample
        adapted = PeftModel.from_pretrained(taught(trained), trained.adapter).eval()
        found = adapted(inputs, levels, class_labels=labels).sample
    assert torch.allclose(found, merged, atol=1e-6) and not torch.allclose(before, merged, atol=1e-4)
    path = trained.adapter / "adapter_model.safetensors"
    with PrivacyLedger.open(trained.ledger) as ledger:
        assert ledger.digests("adapter/adapter_model.safetensors")[-1:] == (hash_file(path),)


def test_a_replaced_run_takes_its_adapter_along(few_digits: Any, make_config: Any, tmp_path: Path) -> None:
    run_curriculum(make_config(**OPTIONS, **WAYS["lora"]), few_digits, output_dir=tmp_path / "run")
    assert RunFolder(tmp_path / "run").adapter.exists()
    run_curriculum(make_config(**OPTIONS), few_digits, output_dir=tmp_path / "run", overwrite_output_dir=True)
    assert not RunFolder(tmp_path / "run").adapter.exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_from_its_checkpoint_exactly(
    way: str, few_digits: Any, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = make_config(**OPTIONS, **WAYS[way]), RunFolder(tmp_path / "run")
    step = DPTrainer.step

    def until_three(self: DPTrainer) -> None:
        if self.num_steps_taken == 3:
            raise RuntimeError("power cut")
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(DPTrainer, "step", until_three)
        with pytest.raises(RuntimeError, match="power cut"):
            run_curriculum(config, few_digits, output_dir=folder.root)
    saved = load_checkpoint(list_checkpoints(folder.checkpoints)[0])
    assert saved.step == 2 and len(saved.tensors["ema"]) < len(saved.tensors["unet"])
    taken_up: list[dict[str, dict[str, torch.Tensor]]] = []
    charged = stages._charged_before

    def look(run: Any, trainer: DPTrainer) -> int:
        taken_up.append({group: {n: t.clone() for n, t in named.items()} for group, named in trainer.state().items()})
        return charged(run, trainer)

    monkeypatch.setattr(stages, "_charged_before", look)
    result = run_curriculum(config, few_digits, output_dir=folder.root, resume_from_checkpoint="latest")
    assert result.report.fields["mechanisms"][-1]["num_steps"] == 4
    (state,) = taken_up
    assert state.keys() == saved.tensors.keys()
    for group, named in saved.tensors.items():
        assert state[group].keys() == named.keys() and all(torch.equal(state[group][n], t) for n, t in named.items())


@pytest.mark.parametrize(
    "changed",
    [{"trainable": "attention", "lora_rank": None, "lora_alpha": None}, {"lora_rank": 3}, {"lora_alpha": 1.0}],
    ids=["another part", "another rank", "another scale"],
)
def test_another_choice_of_weights_is_refused_on_resume(
    changed: dict[str, Any], trained: RunFolder, few_digits: Any
) -> None:
    config = CurriculumConfig.from_yaml(trained.config)
    if config.dp_sgd.trainable != "lora":
        changed = {"trainable": "all"}
    with pytest.raises(ValueError, match="resuming cannot change the mechanism"):
        run_curriculum(config.replace(**changed), few_digits, output_dir=trained.root, resume_from_checkpoint="latest")


def test_wrong_targets_are_refused_before_anything_is_made(few_digits: Any, make_config: Any, tmp_path: Path) -> None:
    config = make_config(trainable="lora", lora_target_modules=["query"])
    with pytest.raises(ValueError, match="--lora_target_modules=query to name linear layers or convolutions"):
        run_curriculum(config, few_digits, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", WAYS)
def test_the_self_check_covers_what_is_trained(way: str, make_config: Any, tmp_path: Path) -> None:
    config = make_config(**OPTIONS, **WAYS[way])
    unet = initial_unet(config, 10, make_accelerator(config, RunFolder(tmp_path)))
    found = check_gradients(unet, config, 10)
    everything = len(list(unet.parameters()))
    assert 0 < found["num_parameters"] < everything and len(found["frozen_parameters"]) > 0
    # A bias of keys moves no output: its gradient is nil.
    assert [name for name in found["unverified_parameters"] if "lora" in name] == []
