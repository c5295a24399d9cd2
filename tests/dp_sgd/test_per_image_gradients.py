"""Per-image gradients against autograd, one input at a time: whole UNets, then layers, then bad inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn as nn
from diffusers import UNet2DModel
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dp_curriculum.dp_sgd import gradient_engine
from dp_curriculum.dp_sgd.flat_gradients import clip_factors, make_finite, norm_per_image
from dp_curriculum.per_image_gradients import (
    PerImageGradientError,
    PerImageGradients,
    UnsupportedModelError,
)


IMAGES = 3
ATTENTION = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
NO_ATTENTION = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}

Losses = Callable[[Any], Tensor]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_unet(**config: Any) -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defaults = {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (4, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "attention_head_dim": 4,
            "num_class_embeds": 5,
            **ATTENTION,
        }
        return UNet2DModel(**{**defaults, **config}).train()


def unet_losses(model: UNet2DModel, rows: int, *, channels_last: bool = False) -> Losses:
    """One loss per row, as a function of the rows that are run."""
    generator = torch.Generator().manual_seed(1)
    dtype, config = model.dtype, model.config
    shape = (rows, config.in_channels, config.sample_size, config.sample_size)
    x, target = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    timesteps = torch.randint(0, 10, (rows,), generator=generator)
    labels: Tensor | None = torch.randint(0, 5, (rows,), generator=generator)
    if config.class_embed_type == "timestep":
        labels = 10 * torch.rand(rows, generator=generator)
    elif config.class_embed_type == "identity":
        labels = torch.randn(rows, model.time_embedding.linear_2.out_features, generator=generator).to(dtype)
    elif config.num_class_embeds is None:
        labels = None
    if config.time_embedding_type != "learned":
        timesteps = timesteps.to(dtype) + 0.5

    def losses(selected: Any) -> Tensor:
        chosen = None if labels is None else labels[selected]
        output = model(x[selected], timesteps[selected], class_labels=chosen).sample
        return (output - target[selected]).square().flatten(1).mean(1)

    return losses


def engine_gradients(model: nn.Module, losses: Losses, rows: int, draws: int) -> dict[str, Tensor]:
    with PerImageGradients(model, noise_multiplicity=draws):
        losses(slice(0, rows)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    return {name: p.grad_sample for name, p in model.named_parameters() if p.requires_grad}


def reference_gradients(model: nn.Module, losses: Losses, rows: int, draws: int) -> dict[str, Tensor]:
    """Autograd on one row at a time, averaged over the draws of each image."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    images = rows // draws
    result = {name: p.new_zeros(images, *p.shape) for name, p in parameters.items()}
    for row in range(rows):
        loss = losses(slice(row, row + 1)).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients):
            if gradient is not None:
                result[name][row % images] += gradient / draws
    return result


def worst_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error of a parameter; nil gradients are compared on the scale of the image's whole gradient."""
    assert actual.keys() == expected.keys()
    whole = torch.stack([g.flatten(1).norm(dim=1) for g in expected.values()]).norm(dim=0)
    errors = []
    for name, gradient in expected.items():
        assert actual[name].shape == gradient.shape, name
        scale = torch.maximum(gradient.flatten(1).norm(dim=1), 1e-3 * whole)
        errors.append(((actual[name] - gradient).flatten(1).norm(dim=1) / scale).max().item())
    return max(errors)


def assert_exact(model: nn.Module, losses: Losses, rows: int, draws: int, tolerance: float) -> None:
    actual = engine_gradients(model, losses, rows, draws)
    assert worst_error(actual, reference_gradients(model, losses, rows, draws)) <= tolerance


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("blocks", [ATTENTION, NO_ATTENTION], ids=["attention", "no_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_unet_equal_autograd_image_by_image(
    dtype: torch.dtype, blocks: dict[str, Any], draws: int, channels_last: bool
) -> None:
    model = tiny_unet(**blocks).to(dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    losses = unet_losses(model, IMAGES * draws, channels_last=channels_last)
    assert_exact(model, losses, IMAGES * draws, draws, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "config",
    [
        {"num_class_embeds": None},
        {"class_embed_type": "timestep", "num_class_embeds": None},
        {"class_embed_type": "identity", "num_class_embeds": None, "time_embedding_type": "fourier"},
        {"time_embedding_type": "learned", "num_train_timesteps": 10, "norm_num_groups": 4, "downsample_padding": 0},
        {"downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"},
        {
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "block_out_channels": (32, 64),
            "norm_num_groups": 32,
            "in_channels": 3,
            "out_channels": 3,
        },
        {
            "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
            "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
            "class_embed_type": "identity",
            "num_class_embeds": None,
        },
        {
            "down_block_types": ("KDownBlock2D",) * 2,
            "up_block_types": ("KUpBlock2D",) * 2,
            "block_out_channels": (32, 64),
            "norm_num_groups": 8,
        },
    ],
    ids=["no_classes", "timestep_classes", "identity_fourier", "learned_pad0", "scale_shift", "skip", "resnet", "k"],
)
def test_every_kind_of_block_and_embedding_is_exact(config: dict[str, Any]) -> None:
    model = tiny_unet(**config)
    # diffusers itself runs class_embed_type="timestep" in float32 only.
    dtype = torch.float32 if config.get("class_embed_type") == "timestep" else torch.float64
    model = model.to(dtype)
    assert_exact(model, unet_losses(model, 4), 4, 2, TOLERANCE[dtype])


@pytest.mark.parametrize("draws", [1, 4])
def test_physical_batches_change_nothing(draws: int) -> None:
    """1, 2 and 7 physical batches of the same 7 images give the same gradients."""
    model, images = tiny_unet().to(torch.float64), 7
    losses = unet_losses(model, images * draws)
    found = []
    with PerImageGradients(model, noise_multiplicity=draws):
        for splits in (1, 2, 7):
            parts = []
            for part in torch.arange(images).chunk(splits):
                rows = torch.cat([part + draw * images for draw in range(draws)])
                losses(rows).sum().backward()
                parts.append({name: p.grad_sample for name, p in model.named_parameters()})
            found.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    assert len(parts) == 7
    assert worst_error(found[1], found[0]) <= 1e-10 and worst_error(found[2], found[0]) <= 1e-10


def module_losses(model: nn.Module, inputs: Tensor, seed: int = 2) -> Losses:
    """One loss per row of any module: a fixed random projection of its squared output."""

    def losses(selected: Any) -> Tensor:
        output = model(inputs[selected]).flatten(1)
        weight = torch.randn(output.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (output.square() + output) @ weight.to(output.dtype)

    return losses


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Scale(nn.Module):
    """A parameter that no known layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor, *, power: int = 2) -> Tensor:
        return (x * self.scale) ** power


class Residual(nn.Module):
    """Calls one layer twice, and a second one with the weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.first(self.first(x).tanh()).tanh())


class CenterOverBatch(nn.Module):
    """Mixes the images of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * self.scale


class WeightOutside(nn.Module):
    """Uses the weight of a layer without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.layer(x), self.layer.weight)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear_positions": (lambda: nn.Linear(4, 3, bias=False), (2, 5, 4)),
    "linear_many_positions": (lambda: nn.Linear(4, 3), (2, 20, 4)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 5)),
    "conv_strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (4, 7, 6)),
    "conv_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 6, 5)),
    "conv_depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2), (4, 6, 5)),
    "conv_same": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (4, 6, 5)),
    "conv_valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (4, 6, 5)),
    "conv_reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (4, 6, 5)),
    "conv_circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 6, 5)),
    "conv_pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 6, 5)),
    "conv_pointwise_many_positions": (lambda: nn.Conv2d(4, 6, 1), (4, 8, 5)),
    "conv_pointwise_strided": (lambda: nn.Conv2d(4, 6, 1, stride=2), (4, 6, 5)),
    "conv_in": (lambda: nn.Conv2d(1, 32, 3, padding=1), (1, 6, 5)),
    "conv_out": (lambda: nn.Conv2d(32, 1, 3, padding=1), (32, 6, 5)),
    "conv_one_position": (lambda: nn.Conv2d(4, 6, 3), (4, 3, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv1d_pointwise": (lambda: nn.Conv1d(4, 6, 1), (4, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 2, 2, padding=1), (4, 3, 4, 3)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (4, 6, 5)),
    "group_norm_positions": (lambda: nn.GroupNorm(4, 4), (4, 9)),
    "layer_norm": (lambda: nn.LayerNorm((5, 4)), (2, 5, 4)),
    "layer_norm_no_bias": (lambda: nn.LayerNorm(4, bias=False), (4,)),
    "transposed_conv": (lambda: nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), (4, 3, 4)),
    "rms_norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "instance_norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 4)),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
    "scale": (Scale, (3, 4)),
    "twice_and_tied": (Residual, (4,)),
}


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_exact_in_both_modes(layer: str, mode: Any, draws: int) -> None:
    """The first of two layers, so that an input gradient is needed too, in float64 against autograd."""
    make, shape = LAYERS[layer]
    ahead = nn.Conv2d(shape[0], shape[0], 1) if len(shape) == 3 else nn.Linear(shape[-1], shape[-1])
    model = nn.Sequential(ahead, make()).to(torch.float64)
    rows = IMAGES * draws
    losses = module_losses(model, normal(rows, *shape))
    expected = reference_gradients(model, losses, rows, draws)
    if mode == "materialize":
        assert worst_error(engine_gradients(model, losses, rows, draws), expected) <= 1e-10
        return
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in expected.values()]).norm(dim=0)
    bound = float(norms.median())
    sums = clipped_sums(model, losses, rows, draws, bound, mode=mode)
    for name, gradient in expected.items():
        clipped = torch.einsum("b,b...->...", (bound / norms).clamp(max=1), gradient)
        torch.testing.assert_close(sums[name], clipped, rtol=0, atol=1e-10 * bound)


def clipped_sums(
    model: nn.Module, losses: Losses, rows: int, draws: int, bound: float, **options: Any
) -> dict[str, Tensor]:
    """What one backward pass adds to `p.summed_grad`."""
    for parameter in model.parameters():
        parameter.summed_grad = None
    with PerImageGradients(model, noise_multiplicity=draws, **options) as engine:
        engine.backward(losses(slice(0, rows)))
        engine.accumulate_clipped(bound)
    assert all(p.grad is None and p.grad_sample is None for p in model.parameters() if p.requires_grad)
    return {name: p.summed_grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_embedding_is_exact(padding_idx: int | None, draws: int) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=padding_idx), nn.Linear(4, 3)).to(torch.float64)
    rows = IMAGES * draws
    for shape in ((rows,), (rows, 6)):
        indices = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0))
        assert_exact(model, module_losses(model, indices), rows, draws, 1e-10)


def test_attention_module_is_exact() -> None:
    """A module with parameters of its own and children, whose call has several tensors and keywords."""

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attend()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, context=x * 2, scale=0.5)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gain = nn.MultiheadAttention(4, 2, batch_first=True), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor, *, context: Tensor, scale: float) -> Tensor:
            return scale * self.gain * self.inner(x, context, context, need_weights=False)[0]

    model = nn.Sequential(nn.Linear(4, 4), SelfAttention()).to(torch.float64)
    assert_exact(model, module_losses(model, normal(6, 5, 4)), 6, 2, 1e-10)


def test_parameter_that_no_image_reaches_has_zero_gradients() -> None:
    model = Residual().to(torch.float64)
    gradients = engine_gradients(model, module_losses(model, normal(4, 4)), 4, 2)
    assert gradients["unused.weight"].shape == (2, 2, 2) and not gradients["unused.weight"].any()


def test_frozen_parameters_are_listed_and_get_nothing() -> None:
    model = tiny_unet().to(torch.float64)
    model.conv_in.requires_grad_(False)
    model.conv_norm_out.weight.requires_grad_(False)
    model.conv_out.bias.requires_grad_(False)
    frozen = {"conv_in.weight", "conv_in.bias", "conv_norm_out.weight", "conv_out.bias"}
    assert set(PerImageGradients(model).frozen_parameters) == frozen
    assert_exact(model, unet_losses(model, 4), 4, 2, 1e-10)
    assert all(p.grad is None and not hasattr(p, "grad_sample") for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_norms_first_gives_the_same_clipped_sum(
    monkeypatch: pytest.MonkeyPatch, channels_last: bool, draws: int
) -> None:
    """Also when a layer's gradients are computed for one image at a time."""
    model, rows = tiny_unet().to(torch.float64), IMAGES * draws
    losses = unet_losses(model, rows, channels_last=channels_last)
    gradients = engine_gradients(model, losses, rows, draws)
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
    bound = float(norms.median())
    expected = clipped_sums(model, losses, rows, draws, bound)
    for chunk in (64 * 1024**2, 1):
        monkeypatch.setattr(gradient_engine, "_CHUNK_BYTES", chunk)
        actual = clipped_sums(model, losses, rows, draws, bound, mode="norms_first")
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-12)


def test_auto_mode_follows_the_memory_limit() -> None:
    model = tiny_unet()
    gradient_bytes = 4 * IMAGES * sum(p.numel() for p in model.parameters())
    for limit, is_materialized in ((gradient_bytes, True), (gradient_bytes - 1, False)):
        with PerImageGradients(model, mode="auto", memory_limit=limit) as engine:
            engine.backward(unet_losses(model, IMAGES)(slice(None)))
            assert all((p.grad_sample is not None) == is_materialized for p in model.parameters())
            engine.accumulate_clipped(1.0)


@pytest.mark.parametrize("mode", ["materialize", "auto", "norms_first"])
@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("blocks", [ATTENTION, NO_ATTENTION], ids=["attention", "no_attention"])
def test_clipped_sum_of_a_unet_is_that_of_autograd(blocks: dict[str, Any], draws: int, mode: Any) -> None:
    """In two physical batches of five images each, of which the second is filled up by two that do not count."""
    model, images = tiny_unet(**blocks).to(torch.float64), 8
    losses = unet_losses(model, images * draws)
    gradients = reference_gradients(model, losses, images * draws, draws)
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
    bound = float(norms.median())
    for parameter in model.parameters():
        parameter.summed_grad = None
    with PerImageGradients(model, noise_multiplicity=draws, mode=mode) as engine:
        for batch, counted in (([0, 1, 2, 3, 4], None), ([5, 6, 7, 0, 1], torch.arange(5) < 3)):
            engine.backward(losses([image + draw * images for draw in range(draws) for image in batch]))
            engine.accumulate_clipped(bound, counted=counted)
    for name, parameter in model.named_parameters():
        expected = torch.einsum("b,b...->...", (bound / norms).clamp(max=1), gradients[name])
        torch.testing.assert_close(parameter.summed_grad, expected, rtol=0, atol=1e-10 * bound)


@pytest.mark.parametrize("mode", ["materialize", "auto", "norms_first"])
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf"), 1e30])
def test_images_that_do_not_count_add_exactly_zero(value: float, mode: Any) -> None:
    """Whatever they hold, and their neighbours' sum is that of the same batch with other images in their place."""
    model = tiny_unet()
    x = normal(6, 1, 8, 8).float()

    def sums(inputs: Tensor, counted: Tensor) -> Tensor:
        for parameter in model.parameters():
            parameter.summed_grad = None
        with PerImageGradients(model, noise_multiplicity=2, mode=mode) as engine:
            engine.backward(model(inputs, 3, class_labels=torch.ones(6).long()).sample.square().mean((1, 2, 3)))
            engine.accumulate_clipped(0.05, counted=counted)
        return torch.cat([p.summed_grad.flatten() for p in model.parameters()])

    filled = x.clone()
    filled[[2, 5]] = value  # both draws of image 2
    counted = torch.tensor([True, True, False])
    assert torch.equal(sums(filled, counted), sums(x, counted))
    assert not sums(filled, torch.zeros(3, dtype=torch.bool)).any()
    assert not torch.equal(sums(x, counted), sums(x, torch.ones(3, dtype=torch.bool)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38, 2e19])
def test_a_row_without_a_norm_has_a_factor_of_zero(value: float) -> None:
    """Its numbers are finite, so that zero times them is zero; a row of float32 is the same on every device."""
    rows = make_finite(torch.tensor([[3.0, 4.0], [value, 1.0], [0.0, 0.0]]))
    factors = clip_factors(norm_per_image(rows), 1.0)
    assert rows.isfinite().all() and factors.tolist() == [pytest.approx(0.2), 0.0, 1.0]
    wide = torch.zeros(2, 3 * 4096**2 // 1024).index_fill(1, torch.tensor([7]), value)
    assert clip_factors(norm_per_image(make_finite(wide)), 1.0).tolist() == [0.0, 0.0]


def test_gradients_that_were_exchanged_are_not_clipped_in_silence() -> None:
    model = tiny_unet()
    with PerImageGradients(model) as engine:
        engine.backward(unet_losses(model, 2)(slice(None)))
        model.conv_in.weight.grad_sample = 2 * model.conv_in.weight.grad_sample
        with pytest.raises(PerImageGradientError, match="as it left its gradients"):
            engine.accumulate_clipped(1.0)


def test_sums_are_added_to_what_a_user_put_there() -> None:
    model = tiny_unet()
    expected = clipped_sums(model, unet_losses(model, 2), 2, 1, 0.05)
    for parameter in model.parameters():
        parameter.summed_grad = torch.ones_like(parameter)
    model.conv_in.weight.summed_grad = None
    with PerImageGradients(model) as engine:
        for _ in range(2):
            engine.backward(unet_losses(model, 2)(slice(None)))
            engine.accumulate_clipped(0.05)
    for name, parameter in model.named_parameters():
        start = 0 if name == "conv_in.weight" else 1
        torch.testing.assert_close(parameter.summed_grad, start + 2 * expected[name])


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
@pytest.mark.parametrize("draws", [1, 4])
def test_one_image_moves_clipped_sum_by_at_most_max_grad_norm(draws: int, mode: Any) -> None:
    """|sum(D) - sum(D')| <= C for D' = D minus an image, and an image of NaN, infinity or 1e30 is one without it."""
    model, images, bound = tiny_unet(), 4, 0.05
    x = normal(images * draws, 1, 8, 8).float()

    def losses(inputs: Tensor) -> Tensor:
        labels = torch.ones(len(inputs), dtype=torch.int64)
        return (model(inputs, 3, class_labels=labels).sample - 1).square().mean((1, 2, 3))

    def sums(inputs: Tensor) -> Tensor:
        parts = clipped_sums(model, lambda rows: losses(inputs[rows]), len(inputs), draws, bound, mode=mode)
        return torch.cat([part.flatten() for part in parts.values()])

    whole = sums(x)
    last = torch.arange(images * draws) % images == images - 1
    without = sums(x[~last])
    assert bound / 2 < (whole - without).norm() <= bound + 1e-6
    for value in (float("nan"), float("inf"), 1e30):
        broken = torch.where(last.view(-1, 1, 1, 1), value, x)
        torch.testing.assert_close(sums(broken), without, rtol=1e-5, atol=1e-6)


def test_a_broken_image_leaves_its_neighbours_gradients_alone() -> None:
    model = tiny_unet()
    x = normal(6, 1, 8, 8).float()

    def gradients(inputs: Tensor) -> dict[str, Tensor]:
        labels = torch.arange(6) % 3

        def losses(rows: Any) -> Tensor:
            return model(inputs[rows], 3, class_labels=labels[rows]).sample.square().mean((1, 2, 3))

        return engine_gradients(model, losses, 6, 2)

    expected = gradients(x)
    broken = x.clone()
    broken[1] = float("nan")  # one draw of image 1
    actual = gradients(broken)
    for name, gradient in expected.items():
        assert not actual[name][1].any(), name
        torch.testing.assert_close(actual[name][[0, 2]], gradient[[0, 2]], rtol=1e-5, atol=1e-6)


def test_bf16_autocast_gives_float32_gradients() -> None:
    model = tiny_unet(block_out_channels=(8, 16))
    losses = unet_losses(model, 4)
    exact = engine_gradients(model, losses, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        low = engine_gradients(model, losses, 4, 2)
        reference = reference_gradients(model, losses, 4, 2)
    assert all(gradient.dtype == torch.float32 for gradient in low.values())
    flat = [torch.cat([g.flatten(1) for g in part.values()], dim=1) for part in (exact, low, reference)]
    assert 1e-4 < (flat[1] - flat[0]).norm() / flat[0].norm() < 3e-2
    assert (flat[1] - flat[2]).norm() / flat[2].norm() < 3e-2


@pytest.fixture
def coarse_matmul() -> Iterator[None]:
    """What a user may have set for speed: matrix products of float32 in bf16 or TF32, where the hardware can."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(precision)


def total_norm(sums: dict[str, Tensor]) -> float:
    return float(torch.cat([total.double().flatten() for total in sums.values()]).norm())


@pytest.mark.usefixtures("coarse_matmul")
@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
def test_bf16_clipped_sum_keeps_its_bound_to_float32_precision(mode: Any) -> None:
    """The sum is of the very gradients whose norms were measured, not of their bf16 rounding."""
    model, bound = tiny_unet(block_out_channels=(8, 16)), 1e-3
    losses = unet_losses(model, 4)
    with torch.autocast("cpu", torch.bfloat16):
        sums = clipped_sums(model, lambda rows: losses([0, 1, 2, 3])[rows], 4, 4, bound, mode=mode)
    assert bound * (1 - 1e-5) < total_norm(sums) < bound * (1 + 1e-5)


@pytest.mark.usefixtures("coarse_matmul")
def test_the_clip_computes_in_full_precision_and_restores_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 needs a GPU; that it is off while clipping can be seen anywhere."""
    measure, seen = gradient_engine.norm_per_image, set()

    def spy(gradients: Tensor) -> Tensor:
        seen.add(
            (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu"))
        )
        return measure(gradients)

    monkeypatch.setattr(gradient_engine, "norm_per_image", spy)
    model = tiny_unet()
    with torch.autocast("cpu", torch.bfloat16):
        clipped_sums(model, unet_losses(model, 2), 2, 1, 1.0)
    assert seen == {("highest", False, False)}
    assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("shape", [(5000, 2000), (1, 2999999)], ids=["even", "prime"])
@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
def test_long_parameter_keeps_the_bound_to_float32_precision(mode: Any, shape: tuple[int, int]) -> None:
    """The CPU's float32 norm of 1e7 elements is 4e-4 too small: the image would then add 4e-4 more than C."""
    model = nn.Linear(*shape, bias=False)
    losses = module_losses(model, normal(1, shape[0]).float())
    sums = clipped_sums(model, losses, 1, 1, 1e-3, mode=mode)
    assert 1e-3 * (1 - 1e-5) < total_norm(sums) < 1e-3 * (1 + 1e-5)


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("images", [1, 2])
def test_image_whose_terms_cancel_keeps_the_bound(images: int, layer: str, mode: Any) -> None:
    """Of draws of size 1e6 that nearly cancel, only the numbers that were measured sum to C, not their exact value."""
    draws, bound = 64, 1e-3
    model = nn.Conv2d(1, 3, 3, padding=1) if layer == "conv" else nn.Linear(1, 3)
    x = 1 + normal(draws // 2, images, 1, *((4, 4) if layer == "conv" else ())).float().abs()
    x = x.repeat_interleave(2, dim=0).flatten(0, 1)
    opposite = 1e6 * torch.tensor([1.0, -1.0]).repeat(draws // 2)
    weights = (opposite.view(-1, 1) + normal(draws, images)).float().flatten()

    def losses(rows: Any) -> Tensor:
        return model(x[rows]).flatten(1).sum(1) * weights[rows]

    sums = clipped_sums(model, losses, draws * images, draws, bound, mode=mode)
    assert total_norm(sums) < images * bound * (1 + 1e-5)


def test_model_looks_the_same_inside_and_is_restored_after_an_error(tmp_path: Path) -> None:
    model = tiny_unet()
    keys, instance = list(model.state_dict()), dict(model.conv_in.__dict__)

    def fail_inside() -> None:
        with PerImageGradients(model):
            assert type(model) is UNet2DModel and list(model.state_dict()) == keys
            model.save_pretrained(tmp_path)
            with pytest.raises(RuntimeError, match="outside of the PerImageGradients block"):
                copy.deepcopy(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert model.conv_in.__dict__.keys() == instance.keys()
    unet_losses(model, 2)(slice(None)).sum().backward()
    assert model.conv_in.weight.grad is not None and not hasattr(model.conv_in.weight, "grad_sample")
    reloaded = UNet2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reloaded.parameters()))
    copy.deepcopy(model)


def test_layer_with_its_own_instance_forward_keeps_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(torch.float64)
    plain = model[0].forward
    model[0].forward = lambda x: 2 * plain(x)
    patched = model[0].forward
    assert_exact(model, module_losses(model, normal(4, 4)), 4, 2, 1e-10)
    assert model[0].forward is patched


def test_sampling_inside_the_block_builds_no_graph() -> None:
    model = tiny_unet()
    with PerImageGradients(model, noise_multiplicity=4), torch.no_grad():
        assert not model(torch.zeros(3, 1, 8, 8), 0, class_labels=torch.zeros(3).long()).sample.requires_grad


def test_opacus_optimizer_takes_the_gradients() -> None:
    model = tiny_unet()
    losses = unet_losses(model, 6)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=0.05, expected_batch_size=4
    )
    sums = clipped_sums(model, losses, 6, 2, 0.05)
    optimizer.zero_grad()
    engine_gradients(model, losses, 6, 2)
    optimizer.step()
    for p, start, total in zip(model.parameters(), before, sums.values()):
        torch.testing.assert_close(start - p, total / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"channels": "last"}])
def test_empty_physical_batch_gives_empty_gradients(config: dict[str, str]) -> None:
    model = tiny_unet(**NO_ATTENTION)
    x = torch.zeros(0, 1, 8, 8)
    if config:
        x = x.contiguous(memory_format=torch.channels_last)
    with PerImageGradients(model, noise_multiplicity=4) as engine:
        engine.backward(model(x, 3, class_labels=torch.zeros(0).long()).sample.flatten(1).sum(1))
        assert all(p.grad_sample.shape == (0, *p.shape) for p in model.parameters())
        engine.set_empty()
        assert all(p.grad_sample.shape == (0, *p.shape) for p in model.parameters())
        engine.accumulate_clipped(1.0)
    assert all(p.summed_grad.shape == p.shape and not p.summed_grad.any() for p in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_is_exact_or_refused(use_reentrant: bool) -> None:
    """diffusers checkpoints with `use_reentrant=False`."""
    if not use_reentrant:
        model = tiny_unet().to(torch.float64)
        expected = engine_gradients(model, unet_losses(model, 4), 4, 2)
        model.enable_gradient_checkpointing()
        assert worst_error(engine_gradients(model, unet_losses(model, 4), 4, 2), expected) <= 1e-10
        return
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with PerImageGradients(layers), pytest.raises(PerImageGradientError, match="Layer 1 is under reentrant"):
        checkpoint(layers[1], layers[0](torch.ones(2, 4)), use_reentrant=True).sum().backward()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.BatchNorm2d(4), r"Module 1 \(BatchNorm2d\) mixes the images"),
        (lambda: nn.SyncBatchNorm(4), r"Module 1 \(SyncBatchNorm\) mixes the images"),
        (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), "Module 1 .* mixes the images"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "Embedding 1 uses max_norm"),
    ],
)
def test_layers_that_mix_images_are_refused_by_name(layer: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        PerImageGradients(nn.Sequential(nn.Conv2d(4, 4, 1), layer()))


@pytest.mark.parametrize("draws", [1, 2])
def test_unknown_module_that_mixes_images_is_refused_by_name(draws: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), CenterOverBatch())
    with PerImageGradients(model, noise_multiplicity=draws) as engine:
        with pytest.raises(UnsupportedModelError, match="Module 1 .CenterOverBatch. gives an image another output"):
            engine.backward(module_losses(model, normal(6, 4).float())(slice(None)))


def test_weight_used_outside_of_its_layer_is_refused_by_name() -> None:
    model = WeightOutside()
    with PerImageGradients(model), pytest.raises(PerImageGradientError, match="layer.weight is used outside"):
        model(torch.ones(2, 4)).sum().backward()


def test_layer_that_sees_other_rows_is_refused_by_name() -> None:
    layers = nn.ModuleDict({"image": nn.Linear(4, 4), "shared": nn.Linear(4, 4)})
    with PerImageGradients(layers), pytest.raises(PerImageGradientError, match="Expected . images at (image|shared)"):
        (layers["image"](torch.ones(3, 4)) + layers["shared"](torch.ones(1, 4))).sum().backward()


def test_bad_calls_are_refused_in_one_line() -> None:
    model = tiny_unet()
    losses = unet_losses(model, 6)
    with pytest.raises(ValueError, match=r"noise_multiplicity=0 in \[1, 4096\]"):
        PerImageGradients(model, noise_multiplicity=0)
    with pytest.raises(ValueError, match="Expected mode='fast'"):
        PerImageGradients(model, mode="fast")
    with pytest.raises(ValueError, match="at least one parameter"):
        PerImageGradients(nn.Linear(1, 1).requires_grad_(False))
    with PerImageGradients(model, noise_multiplicity=4) as engine:
        with pytest.raises(ValueError, match="Expected 6 rows at layer .* to be a multiple of noise_multiplicity=4"):
            losses(slice(None))
        with pytest.raises(PerImageGradientError, match="Expected a backward pass"):
            engine.accumulate_clipped(1.0)
    with PerImageGradients(model, noise_multiplicity=2) as engine:
        with pytest.raises(ValueError, match="Expected one loss per row"):
            engine.backward(losses(slice(None)).mean())
        with pytest.raises(ValueError, match="1 images in the losses, 3 in the model"):
            engine.backward(losses(slice(None)).view(2, 3).sum(1))
    for mode in ("materialize", "norms_first"):
        with PerImageGradients(model, mode=mode) as engine:
            engine.backward(losses(slice(None)))
            engine.accumulate_clipped(1.0)
            with pytest.raises(PerImageGradientError, match="Expected a backward pass"):
                engine.accumulate_clipped(1.0)
    with PerImageGradients(nn.Conv2d(1, 1, 1)) as engine, pytest.raises(ValueError, match="Expected a batched input"):
        next(iter(engine.layers)).module(torch.ones(1, 4, 4))


def test_a_pass_that_failed_leaves_nothing_behind() -> None:
    model = tiny_unet().to(torch.float64)
    losses = unet_losses(model, 6)
    with PerImageGradients(model, noise_multiplicity=2) as engine:
        output = losses(slice(None))
        hook = model.conv_in.weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.backward(output)
        hook.remove()
        engine.backward(losses(slice(None)))
        actual = {name: p.grad_sample for name, p in model.named_parameters()}
    assert worst_error(actual, reference_gradients(model, losses, 6, 2)) <= 1e-10
