"""Part of the weights is trained: gradients per image against autograd, what stays, and what is merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from test_gradient_check import check
from test_per_image_gradients import IMAGES, NO_ATTENTION, reference_gradients, tiny_unet, unet_losses, worst_error
from torch import Tensor

from dp_curriculum.config import DPSGDConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.diffusion.trainable import (
    choose_weights,
    describe_weights,
    lora_layers,
    merge_weights,
    num_trained,
    weights_to_check,
)
from dp_curriculum.dp_sgd.flat_gradients import clip_factors
from dp_curriculum.dp_sgd.layer_gradients import LinearLayer
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.per_image_gradients import PerImageGradientError, PerImageGradients
from dp_curriculum.privacy.randomness import SecretGenerator


LORA = {"trainable": "lora", "lora_rank": 4, "lora_alpha": 8.0}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora on attention": (LORA, {}),
    "lora on convolutions": (LORA, NO_ATTENTION),
    "lora on all kinds": (
        {**LORA, "lora_target_modules": ["to_q", "conv2", "conv_shortcut", "conv", "time_emb_proj", "linear_2"]},
        {},
    ),
    "attention": ({"trainable": "attention"}, {}),
    "bias_norm": ({"trainable": "bias_norm"}, {"resnet_time_scale_shift": "scale_shift"}),
}
in_each_way = pytest.mark.parametrize("way", WAYS)
CLASSES = 5 * 16  # numbers of the class embedding


def network(way: str, dtype: torch.dtype = torch.float64) -> tuple[UNet2DModel, DPSGDConfig]:
    """A network with all its weights, before one is chosen."""
    options, config = WAYS[way]
    return tiny_unet(**config).to(dtype), DPSGDConfig(**options)


@in_each_way
@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
def test_gradients_of_what_is_trained_equal_autograd_image_by_image(way: str, draws: int, mode: Any) -> None:
    unet, options = network(way)
    with weights_to_check(unet, options):  # no matrix of LoRA is zero
        losses = unet_losses(unet, IMAGES * draws)
        trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        expected = reference_gradients(unet, losses, IMAGES * draws, draws)
        assert expected.keys() == trained.keys() and all(bool(gradient.any()) for gradient in expected.values())
        norm = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in expected.values()]).norm(dim=0)
        bound = float(norm.median())  # clips some images and not others
        with PerImageGradients(unet, noise_multiplicity=draws, mode=mode) as engine:
            engine.backward(losses(slice(0, IMAGES * draws)))
            if mode == "materialize":
                actual = {name: p.grad_sample for name, p in trained.items()}
                assert worst_error(actual, expected) <= 1e-10
            engine.accumulate_clipped(bound)
        factors = clip_factors(norm, bound)
        for name, parameter in trained.items():
            total = torch.einsum("b,b...->...", factors, expected[name])
            error = (parameter.summed_grad - total).norm()  # type: ignore[attr-defined]
            assert float(error) <= 1e-10 * bound * IMAGES, name
        assert all("summed_grad" not in p.__dict__ for p in unet.parameters() if not p.requires_grad)


@in_each_way
def test_the_gradients_of_an_image_are_of_what_is_trained_alone(way: str) -> None:
    unet, options = network(way)
    count = num_trained(unet, options)
    trained = choose_weights(unet, options)
    assert sum(parameter.numel() for parameter in trained) == count
    engine = PerImageGradients(unet)
    assert engine.num_bytes(1) == 8 * count and engine.trainable == trained
    assert engine.frozen_parameters == [name for name, p in unet.named_parameters() if not p.requires_grad]


@in_each_way
def test_frozen_layers_compute_no_weight_gradients(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient function that runs is of a weight that is trained; autograd leaves none on the others."""
    unet, options = network(way)
    choose_weights(unet, options)
    asked: list[Any] = []
    receive = PerImageGradients.receive_call

    def watched(self: PerImageGradients, functions: Any, *tensors: Tensor) -> None:
        asked.extend(parameter for parameter, _ in functions)
        receive(self, functions, *tensors)

    monkeypatch.setattr(PerImageGradients, "receive_call", watched)
    with PerImageGradients(unet) as engine:
        engine.backward(unet_losses(unet, IMAGES)(slice(0, IMAGES)))
    assert asked and all(parameter.requires_grad for parameter in asked)
    assert all(parameter.grad is None for parameter in unet.parameters())


def kept_bytes(unet: UNet2DModel) -> int:
    """What a forward pass under the engine keeps for its backward pass, weights included."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, PerImageGradients(unet):
        losses = unet_losses(unet, 16)(slice(0, 16))
    del losses
    return sum(kept.values())


@pytest.mark.parametrize("way", ["attention", "bias_norm"])
def test_frozen_convolutions_keep_no_inputs(way: str) -> None:
    unet, options = network(way, torch.float32)
    everything = kept_bytes(unet)
    choose_weights(unet, options)
    assert kept_bytes(unet) < 0.85 * everything


def test_what_is_trained_of_a_network() -> None:
    names: dict[str, set[str]] = {}
    for kind in ("attention", "bias_norm", "all"):
        unet = tiny_unet()
        choose_weights(unet, DPSGDConfig(trainable=kind))  # type: ignore[arg-type]
        names[kind] = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert names["all"] == {name for name, _ in tiny_unet().named_parameters()}
    assert {name for name in names["all"] if ".attentions." in name} | {"class_embedding.weight"} == names["attention"]
    ones = {name for name, p in tiny_unet().named_parameters() if p.ndim == 1}  # biases and normalization
    assert ones | {"class_embedding.weight"} == names["bias_norm"]


def test_a_network_without_classes_trains_no_class_embedding() -> None:
    unet = tiny_unet(num_class_embeds=None)
    choose_weights(unet, DPSGDConfig(trainable="attention"))
    assert all(".attentions." in name for name, p in unet.named_parameters() if p.requires_grad)


@in_each_way
def test_at_first_and_after_merging_the_network_computes_what_it_did(way: str) -> None:
    unet, options = network(way)
    losses = unet_losses(unet, IMAGES)
    names, before = set(unet.state_dict()), losses(slice(0, IMAGES)).detach()
    choose_weights(unet, options, seed=3)
    # Sums of nothing may come in another memory format, for which there are other kernels.
    assert torch.allclose(losses(slice(0, IMAGES)).detach(), before, rtol=1e-12)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data += 0.1 * noise
    trained = losses(slice(0, IMAGES)).detach()
    assert not torch.allclose(trained, before)
    merge_weights(unet)
    assert set(unet.state_dict()) == names and all(parameter.requires_grad for parameter in unet.parameters())
    assert not hasattr(unet, "peft_config") and type(unet) is UNet2DModel
    assert torch.allclose(losses(slice(0, IMAGES)).detach(), trained, rtol=1e-10)


def test_lora_starts_from_public_matrices_that_a_seed_decides() -> None:
    drawn = []
    for seed in (0, None, 1):
        unet, options = network("lora on attention")
        state = torch.get_rng_state()
        choose_weights(unet, options, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)  # the caller's generator stands where it stood
        layers = list(lora_layers(unet).values())
        assert all(not layer.lora_B["default"].weight.any() for layer in layers)
        drawn.append(torch.cat([layer.lora_A["default"].weight.detach().flatten() for layer in layers]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert 0.25 < float(drawn[0].abs().max()) <= 8**-0.5  # uniform up to one over the root of 8 inputs


def test_the_self_check_sees_the_gradients_of_both_matrices() -> None:
    unet, options = network("lora on attention")
    before = copy.deepcopy(unet.state_dict())
    with weights_to_check(unet, options):
        found = check(unet)
    assert found["max_relative_error"] <= 1e-10 and not [n for n in found["unverified_parameters"] if "lora" in n]
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert set(unet.state_dict()) == set(before) and all(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_a_gradient_of_lora_that_forgets_the_scale_is_noticed(matrix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: gradients of one of the two matrices as they would be at a scale of 1; here it is 2."""
    right = LinearLayer.weight_gradient

    def wrong(self: LinearLayer, output_gradient: Tensor, x: Tensor, draws: int) -> Tensor:
        return right(self, output_gradient, x, draws) / (2 if f".{matrix}." in self.name else 1)

    unet, options = network("lora on attention")
    with weights_to_check(unet, options):
        check(unet)
        monkeypatch.setattr(LinearLayer, "weight_gradient", wrong)
        with pytest.raises(PerImageGradientError, match=rf"Parameter \S*{matrix}\S* has a gradient per image off by"):
            check(unet)


# --- steps -----------------------------------------------------------------------------------------------------------

TRAININGS: dict[str, dict[str, Any]] = {
    "lora": {"trainable": "lora", "lora_rank": 2, "lora_alpha": 4.0},
    "attention": {"trainable": "attention"},
    "bias_norm": {"trainable": "bias_norm"},
}
in_each_training = pytest.mark.parametrize("fields", TRAININGS.values(), ids=TRAININGS)
MakeTrainer = Callable[..., DPTrainer]


@pytest.fixture
def make_trainer(make_config: Any) -> MakeTrainer:
    def make(fields: dict[str, Any], **options: Any) -> DPTrainer:
        config = make_config(num_channels=1, **fields)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DModel(
                sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
                norm_num_groups=4, attention_head_dim=8, num_class_embeds=3, time_embedding_type="positional",
                down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
            )  # fmt: skip
        pixels = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        private = PrivateImages(pixels, torch.arange(6) % 2, ("a", "b"))
        return DPTrainer(
            unet, private, config, noise_multiplier=1.0, sample_rate=0.5, divisor=3.0, secret=SecretGenerator(),
            **options,
        )  # fmt: skip

    return make


@in_each_training
def test_steps_move_what_is_trained_and_nothing_else(fields: dict[str, Any], make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(fields)
    before = {name: p.detach().clone() for name, p in trainer.unet.named_parameters()}
    for _ in range(2):
        trainer.step()
    for name, parameter in trainer.unet.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
    count = sum(parameter.numel() for parameter in trainer.trained)
    sizes = (len(trainer.ema.shadow_params), len(trainer.adam.state), len(trainer.optimizer.params))
    assert sizes == (len(trainer.trained),) * 3
    assert trainer.gradients.num_bytes(1) == 4 * count < 4 * sum(p.numel() for p in trainer.unet.parameters())


@in_each_training
def test_a_checkpoint_holds_all_that_steps_go_on_from(fields: dict[str, Any], make_trainer: MakeTrainer) -> None:
    """Exactly: weights, frozen ones among them, averages and moments; then both take the same step without noise."""
    first = make_trainer(fields)
    for _ in range(3):
        first.step()
    state = {group: {name: t.detach().clone() for name, t in named.items()} for group, named in first.state().items()}
    second = make_trainer({**fields, "seed": 7})  # other matrices at first
    second.load_state(3, state)
    for group, named in second.state().items():
        assert named.keys() == state[group].keys()
        assert all(torch.equal(tensor, state[group][name]) for name, tensor in named.items()), group
    for trainer in (first, second):  # the same noised gradient for both
        for number, parameter in enumerate(trainer.trained):
            parameter.grad = torch.full_like(parameter, 0.01 * (1 + number % 3))
        trainer.adam.step()
        trainer.ema.step(trainer.trained)
    pairs = (*zip(first.trained, second.trained), *zip(first.ema.shadow_params, second.ema.shadow_params))
    assert all(torch.equal(one, two) for one, two in pairs)


@in_each_training
def test_the_averaged_network_can_be_lent_and_is_whole_in_the_end(
    fields: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(fields)
    stock = set(tiny_unet_names(trainer))
    trainer.step()
    now = [parameter.detach().clone() for parameter in trainer.trained]
    with trainer.averaged_weights() as unet:
        averaged = {name: value.clone() for name, value in unet.state_dict().items()}
    assert all(torch.equal(parameter, value) for parameter, value in zip(trainer.trained, now))
    trainer.unet.load_state_dict(averaged)
    merge_weights(trainer.unet)
    assert set(trainer.unet.state_dict()) == stock


def tiny_unet_names(trainer: DPTrainer) -> set[str]:
    """Names of the tensors of a stock network of the same configuration."""
    return set(UNet2DModel.from_config(trainer.unet.config).state_dict())


# --- what is refused, and words --------------------------------------------------------------------------------------


def test_attention_of_a_network_that_has_none_is_refused() -> None:
    with pytest.raises(ValueError, match="--trainable=attention to come with a network that has attention blocks"):
        choose_weights(tiny_unet(**NO_ATTENTION), DPSGDConfig(trainable="attention"))


def test_targets_that_there_are_not_are_refused_with_those_that_there_are() -> None:
    unet, options = tiny_unet(), DPSGDConfig(trainable="lora", lora_target_modules=["to_q", "query"])
    with pytest.raises(ValueError, match=r"--lora_target_modules=query to name .* It has: conv, conv1, .*to_out\.0"):
        choose_weights(unet, options)
    assert not lora_layers(unet) and all(parameter.requires_grad for parameter in unet.parameters())
    norms = DPSGDConfig(trainable="lora", lora_target_modules=["norm1"])
    with pytest.raises(ValueError, match="--lora_target_modules=norm1"):
        num_trained(unet, norms)


def test_a_rank_larger_than_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--lora_rank=9 to be at most 8, the smaller side of \S*to_"):
        choose_weights(tiny_unet(), DPSGDConfig(trainable="lora", lora_rank=9))


def test_lora_without_peft_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"library peft: pip install 'dp_curriculum\[lora\]'"):
        choose_weights(tiny_unet(), DPSGDConfig(trainable="lora"))


def test_words_of_a_card() -> None:
    unet = tiny_unet()
    assert describe_weights(unet, DPSGDConfig()) is None
    words = describe_weights(unet, DPSGDConfig(trainable="lora"))
    count = num_trained(unet, DPSGDConfig(trainable="lora"))
    assert words == (
        "LoRA of rank 4 and scale 1 on to_q, to_k, to_v, to_out.0 and the class embedding: "
        f"{count:,} weights; the others are as the stages before left them"
    )
    assert count == CLASSES + 4 * 4 * 4 * (8 + 8)
    assert str(describe_weights(unet, DPSGDConfig(trainable="bias_norm"))).startswith("biases and normalization and")
