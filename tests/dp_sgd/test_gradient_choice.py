"""The choice among ways to a weight gradient: right ones only, the fastest of them, and each exact in whole UNets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_per_image_gradients import (
    ATTENTION,
    NO_ATTENTION,
    assert_exact,
    clipped_sums,
    engine_gradients,
    tiny_unet,
    unet_losses,
    worst_error,
)

from dp_curriculum.dp_sgd import gradient_choice
from dp_curriculum.dp_sgd.gradient_choice import Shape, ShapeError, fastest
from dp_curriculum.dp_sgd.weight_gradients import CANDIDATES, Geometry, candidates_for, unfolded


SHAPE = Shape(Geometry(), (4, 6, 5), (3, 6, 5), 4, 2, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _measured_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU. Nothing is remembered."""
    monkeypatch.setattr(gradient_choice, "MEASURED_DEVICES", {"cpu"})
    fastest.cache_clear()
    yield
    fastest.cache_clear()


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("blocks", [ATTENTION, NO_ATTENTION], ids=["attention", "no_attention"])
@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != "fused"])
def test_each_way_is_exact_in_a_whole_unet(
    name: str, blocks: dict[str, Any], draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a way does not fit a shape, such as a stride, another one is taken."""
    taken: set[str] = set()

    def choose(shape: Shape) -> str:
        chosen = name if name in candidates_for(shape.geometry) else "unfolded"
        taken.add(chosen)
        return chosen

    monkeypatch.setattr(gradient_choice, "fastest", choose)
    model = tiny_unet(**blocks).to(torch.float64)
    assert_exact(model, unet_losses(model, 3 * draws), 3 * draws, draws, 1e-10)
    assert name in taken


def test_the_fastest_way_is_taken_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, Shape]] = []

    def seconds(name: str, shape: Shape, inputs: Any, gradients: Any) -> float:
        assert inputs.shape == (8, 4, 6, 5) and gradients.shape == (8, 3, 6, 5) and inputs.dtype == shape.dtype
        measured.append((name, shape))
        return {"shifted": 1.0, "grouped": 2.0}.get(name, 3.0)

    monkeypatch.setattr(gradient_choice, "_median_seconds", seconds)
    assert fastest(SHAPE) == fastest(SHAPE) == "shifted"
    names = [name for name, _ in measured]
    assert len(names) == len(set(names)) >= 4
    assert fastest(SHAPE._replace(draws=1, images=8)) in CANDIDATES and len(measured) > len(names)


def test_a_whole_network_with_measured_ways_is_exact_and_measures_each_shape_once() -> None:
    model = tiny_unet().to(torch.float64)
    losses = unet_losses(model, 6)
    assert_exact(model, losses, 6, 2, 1e-10)
    measured = fastest.cache_info().misses
    assert measured >= 5
    engine_gradients(model, losses, 6, 2)
    assert fastest.cache_info().misses == measured


def test_a_way_that_is_wrong_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By one part in a thousand; and a way that fails, as a kernel that does not compile."""

    def fails(*arguments: Any) -> Any:
        raise ValueError("no kernel")

    monkeypatch.setattr(gradient_choice, "_median_seconds", lambda name, *others: float(name == "grouped"))
    monkeypatch.setitem(CANDIDATES, "unfolded", lambda *arguments: 1.001 * unfolded(*arguments))
    monkeypatch.setitem(CANDIDATES, "shifted", fails)
    monkeypatch.setitem(CANDIDATES, "row unfolded", lambda *arguments: torch.nan * unfolded(*arguments))
    with caplog.at_level(logging.INFO):
        assert fastest(SHAPE) == "grouped"
    told = [record.message for record in caplog.records if "weight gradient" in record.message]
    for name, words in (("unfolded", "off by 1.0e-03"), ("shifted", "no kernel"), ("row unfolded", "off by nan")):
        assert any(line.startswith(f"weight gradient {name} of") and words in line for line in told)


def test_no_right_way_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CANDIDATES:
        monkeypatch.setitem(CANDIDATES, name, lambda *arguments: 2 * unfolded(*arguments))
    with pytest.raises(ShapeError, match="none gives the numbers of float64"):
        fastest(SHAPE)


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != "fused"])
def test_gradients_that_are_computed_again_take_one_way_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their norms and their sum must be of the same numbers, whatever is the fastest; in float32 the ways differ."""
    monkeypatch.setattr(gradient_choice, "fastest", lambda shape: 1 / 0)
    model = tiny_unet()
    again = clipped_sums(model, unet_losses(model, 4), 4, 2, 0.05, mode="norms_first")
    monkeypatch.setattr(
        gradient_choice, "fastest", lambda shape: name if name in candidates_for(shape.geometry) else "grouped"
    )
    kept = clipped_sums(model, unet_losses(model, 4), 4, 2, 0.05)
    assert worst_error({n: t[None] for n, t in kept.items()}, {n: t[None] for n, t in again.items()}) < 1e-4


def test_bfloat16_autocast_passes_the_self_check() -> None:
    model = tiny_unet(block_out_channels=(8, 16))
    exact = engine_gradients(model, unet_losses(model, 4), 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        low = engine_gradients(model, unet_losses(model, 4), 4, 2)
    assert all(gradient.dtype == torch.float32 for gradient in low.values())
    flat = [torch.cat([g.flatten(1) for g in part.values()], dim=1) for part in (exact, low)]
    assert 1e-4 < (flat[1] - flat[0]).norm() / flat[0].norm() < 3e-2
