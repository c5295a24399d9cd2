"""The self-check passes what is right, names what is wrong, and leaves the model as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn as nn
from diffusers import UNet2DModel
from test_per_image_gradients import TOLERANCE, normal, tiny_unet
from torch import Tensor

from dp_curriculum.dp_sgd.gradient_check import check_per_image_gradients
from dp_curriculum.dp_sgd.layer_gradients import LinearLayer
from dp_curriculum.per_image_gradients import PerImageGradientError


def check(model: UNet2DModel) -> dict[str, Any]:
    """The self-check on four random rows of a UNet."""
    x = normal(4, 1, 8, 8).to(model.dtype)
    labels, steps = torch.tensor([0, 1, 2, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=model.dtype)

    def losses(images: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        return (model(images, timesteps, class_labels=classes).sample - images).square().mean((1, 2, 3))

    return check_per_image_gradients(model, losses, (x, steps, labels), noise_multiplicity=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_self_check_passes_and_leaves_the_model_alone(dtype: torch.dtype) -> None:
    model = tiny_unet(dropout=0.5).to(dtype)
    model.conv_in.weight.grad_sample = kept = torch.ones(1)
    state, training = torch.get_rng_state(), [m.training for m in model.modules()]
    result = json.loads(json.dumps(check(model)))
    assert result["max_relative_error"] <= result["tolerance"] == TOLERANCE[dtype]
    assert result["num_parameters"] == len(list(model.parameters())) and result["num_images"] == 2
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == training
    assert model.conv_in.weight.grad_sample is kept
    assert all(p.grad is None and "summed_grad" not in p.__dict__ for p in model.parameters())
    assert not hasattr(model.conv_out.weight, "grad_sample")


def test_self_check_under_autocast_uses_the_coarser_tolerance() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        result = check(tiny_unet(block_out_channels=(8, 16)))
    assert result["dtype"] == "bfloat16" and result["tolerance"] == 5e-2


def test_self_check_lists_what_it_could_not_verify() -> None:
    model = tiny_unet()
    nn.init.zeros_(model.conv_out.weight)
    unverified = check(model)["unverified_parameters"]
    assert "conv_in.weight" in unverified and "conv_out.weight" not in unverified


def test_self_check_names_the_parameter_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a per-image gradient that is off by one per cent in one layer."""
    right = LinearLayer.weight_gradient

    def wrong(self: LinearLayer, output_gradient: Tensor, x: Tensor, draws: int) -> Tensor:
        return right(self, output_gradient, x, draws) * (1.01 if self.name == "time_embedding.linear_2" else 1)

    monkeypatch.setattr(LinearLayer, "weight_gradient", wrong)
    with pytest.raises(PerImageGradientError, match="time_embedding.linear_2.weight has a gradient per image off by"):
        check(tiny_unet())


def test_self_check_refuses_modules_that_mix_images_without_parameters() -> None:
    """The mean over the batch has nothing to attach to: only the comparison finds it."""

    class Center(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    model = nn.Sequential(nn.Linear(4, 4), Center(), nn.Linear(4, 2))
    with pytest.raises(PerImageGradientError, match="Parameter .* has a gradient per image off by"):
        check_per_image_gradients(model, lambda x: model(x).square().sum(1), (normal(4, 4).float(),))
