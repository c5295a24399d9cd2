"""What bfloat16 autocast leaves to the engine: casts that are kept, and normalization that is not widened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_per_image_gradients import engine_gradients, tiny_unet, unet_losses

from dp_curriculum.dp_sgd import layer_gradients
from dp_curriculum.dp_sgd.gradient_check import check_per_image_gradients
from dp_curriculum.dp_sgd.layer_gradients import Layer
from dp_curriculum.per_image_gradients import PerImageGradients


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of parameters, one for each cast to bfloat16."""
    made: list[str] = []
    lowered = Layer.lowered

    def watched(self: Layer, key: str, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        kept = self.kept_casts is not None and (key, dtype) in self.kept_casts
        if parameter.dtype != dtype and not kept:
            made.append(f"{self.name}.{key}")
        return lowered(self, key, parameter, dtype)

    monkeypatch.setattr(Layer, "lowered", watched)
    return made


def test_weights_that_stand_still_are_cast_once(casts: list[str]) -> None:
    model = tiny_unet()
    losses = unet_losses(model, 4)

    def passes(engine: PerImageGradients) -> None:
        for _ in range(3):
            engine.backward(losses(slice(None)))
            engine.accumulate_clipped(1.0)

    with PerImageGradients(model, noise_multiplicity=2) as engine, torch.autocast("cpu", torch.bfloat16):
        passes(engine)
        names = set(casts)
        assert len(names) > 50 and len(casts) == 3 * len(names)
        casts.clear()
        with engine.fixed_weights():
            passes(engine)
        assert sorted(casts) == sorted(names)


def test_casts_are_forgotten_when_weights_may_change() -> None:
    """Also by `data`, which counts no version."""
    model = tiny_unet()
    losses = unet_losses(model, 2)

    def gradients(engine: PerImageGradients) -> torch.Tensor:
        with engine.fixed_weights(), torch.autocast("cpu", torch.bfloat16):
            engine.backward(losses(slice(None)))
        return model.conv_in.weight.grad_sample.clone()

    with PerImageGradients(model) as engine:
        first = gradients(engine)
        model.conv_out.weight.data.mul_(2)
        second = gradients(engine)
    assert not torch.allclose(first, second)
    assert all(layer.kept_casts is None for layer in engine.layers)


@pytest.mark.parametrize("scale_shift", ["default", "scale_shift"])
@pytest.mark.parametrize("draws", [1, 2])
def test_normalization_in_bfloat16_passes_the_self_check(
    draws: int, scale_shift: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose autocast would compute it in float32; here it is done on the CPU."""
    monkeypatch.setattr(layer_gradients, "_WIDENS_NORMALIZATION", {"cpu"})
    model = tiny_unet(block_out_channels=(8, 16), norm_num_groups=4, resnet_time_scale_shift=scale_shift)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(4 * draws, 1, 8, 8, generator=generator) for _ in range(2)]
    seen: set[tuple[torch.dtype, ...]] = set()
    group_norm = torch.group_norm

    def watched(x: torch.Tensor, groups: int, weight: Any, bias: Any, eps: float) -> torch.Tensor:
        seen.add((x.dtype, weight.dtype, bias.dtype))
        assert not torch.is_autocast_enabled("cpu")
        return group_norm(x, groups, weight, bias, eps)

    def losses(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x, 3, class_labels=torch.ones(len(x)).long()).sample
        return (output.float() - target).square().mean((1, 2, 3))

    with PerImageGradients(model, noise_multiplicity=draws) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "group_norm", watched)
            engine.backward(losses(*rows))
    assert seen == {(torch.bfloat16,) * 3}
    found = check_per_image_gradients(model, losses, rows, noise_multiplicity=draws)
    assert found["max_relative_error"] <= found["tolerance"] and found["dtype"] == "bfloat16"


def test_normalization_in_float32_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_unet()
    expected = engine_gradients(model, unet_losses(model, 4), 4, 2)
    monkeypatch.setattr(layer_gradients, "_WIDENS_NORMALIZATION", {"cpu"})
    found = engine_gradients(model, unet_losses(model, 4), 4, 2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
