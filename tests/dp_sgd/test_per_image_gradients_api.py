"""The engine on modules of a user's own, and what is said of those that it cannot do; its page, run as it stands."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dp_curriculum import per_image_gradients
from dp_curriculum.dp_sgd import gradient_check
from dp_curriculum.dp_sgd.layer_gradients import LinearLayer
from dp_curriculum.per_image_gradients import (
    PerImageGradientError,
    PerImageGradients,
    UnsupportedModelError,
    check_per_image_gradients,
)


PAGE = Path(__file__).parents[2] / "docs" / "per_image_gradients.md"
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class OwnModel(nn.Module):
    """Convolution, normalization, an embedding, attention by hand and by module, a parameter of its own, a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(dropout))
        self.site = nn.Embedding(5, 8)
        self.scale = Scale(8)
        self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor, sites: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.site(sites)[:, None]
        x = self.scale(x)
        x = x + F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        mixed, weights = self.attention(self.norm(x), x, x)
        return self.head(mixed.mean(1) + weights.mean((1, 2))[:, None])


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor, self.place = nn.Parameter(torch.ones(width)), nn.Parameter(normal(width, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.place


def made(build: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return build()


def own_rows(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return normal(rows, 2, 4, 4), torch.arange(rows) % 5, torch.arange(rows) % 3


def own_losses(model: nn.Module) -> Callable[..., Tensor]:
    return lambda images, sites, labels: F.cross_entropy(model(images, sites), labels, reduction="none")


# --- what is public ------------------------------------------------------------------------------------------------


def test_the_public_names_are_those_of_one_module() -> None:
    names = {"PerImageGradientError", "PerImageGradients", "UnsupportedModelError", "check_per_image_gradients"}
    assert set(per_image_gradients.__all__) == names
    assert per_image_gradients.check_per_image_gradients is gradient_check.check_per_image_gradients
    for name in names:
        text = getattr(per_image_gradients, name).__doc__
        assert text and f"`{name}`" in PAGE.read_text(encoding="utf-8")
    for public in (check_per_image_gradients, PerImageGradients, PerImageGradients.accumulate_clipped):
        assert all(section in (public.__doc__ or "") for section in ("Args:", "Privacy:", "Raises:")), public


def test_every_block_of_the_page_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {"__name__": "page"}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of batching rules
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102 - our own page


def test_the_page_lists_what_is_refused_and_what_works() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for words in (
        "batch normalization",
        "batch_first",
        "nn.LSTM",
        "spectral normalization",
        "DistributedDataParallel",
    ):
        assert words in text


# --- a model of one's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draws", [1, 2])
def test_a_model_of_ones_own_passes_the_check(draws: int, dtype: torch.dtype) -> None:
    model = made(lambda: OwnModel(dropout=0.5)).to(dtype)
    images, sites, labels = own_rows()
    found = check_per_image_gradients(
        model, own_losses(model), (images.to(dtype), sites, labels), noise_multiplicity=draws
    )
    assert found["max_relative_error"] <= found["tolerance"] == {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    assert found["num_parameters"] == len(list(model.parameters())) and found["num_images"] == 4 // draws
    assert found["unverified_parameters"] == []


@pytest.mark.parametrize("mode", ["materialize", "norms_first"])
def test_its_clipped_sum_is_that_of_autograd_and_moves_by_one_bound_at_most(mode: Any) -> None:
    model, bound = made(OwnModel), 0.05
    rows, losses = own_rows(6), own_losses(model)
    parameters = list(model.parameters())
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for row in range(6):
        gradients = torch.autograd.grad(losses(*[tensor[row : row + 1] for tensor in rows]).sum(), parameters)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert norm > bound, "all are clipped"
        for total, gradient in zip(expected, gradients):
            total += bound / norm * gradient

    def clipped_sum(rows: Any) -> list[Tensor]:
        for parameter in parameters:
            parameter.summed_grad = None
        with PerImageGradients(model, mode=mode) as engine:
            engine.backward(losses(*rows))
            engine.accumulate_clipped(bound)
        return [parameter.summed_grad for parameter in parameters]

    whole = clipped_sum(rows)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-7)
    without = clipped_sum([tensor[1:] for tensor in rows])
    moved = torch.cat([(one - other).flatten() for one, other in zip(whole, without)]).norm()
    assert float(moved) == pytest.approx(bound, rel=1e-4)


def test_a_wrong_gradient_in_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: one layer that is one per cent off."""
    right = LinearLayer.weight_gradient

    def wrong(self: LinearLayer, output_gradient: Tensor, x: Tensor, draws: int) -> Tensor:
        return right(self, output_gradient, x, draws) * (1.01 if self.name == "value" else 1)

    monkeypatch.setattr(LinearLayer, "weight_gradient", wrong)
    model = made(OwnModel)
    with pytest.raises(
        PerImageGradientError, match=r"Parameter value.weight has a gradient per image off by 1\.0e-02"
    ):
        check_per_image_gradients(model, own_losses(model), own_rows())


# --- other modules -------------------------------------------------------------------------------------------------


class Through(nn.Module):
    """Calls one module as a test says."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


class Several(nn.Module):
    """Returns a dictionary of tensors, one of indices, with something that is no tensor; one parameter is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.unused = nn.Parameter(normal(8)), nn.Parameter(normal(3))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = x * self.factor
        return {"first": y, "second": (y.square(), x), "largest": y.argmax(-1), "name": "a string", "nothing": None}


def use_all(module: Any, x: Tensor) -> Tensor:
    found = module(x)
    assert found["name"] == "a string" and found["nothing"] is None and found["largest"].dtype == torch.int64
    return found["first"] + 2 * found["second"][0] + found["second"][1]


WORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention that returns weights": (
        lambda: Through(nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
        (4, 5, 8),
    ),
    "attention without weights": (
        lambda: Through(nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x, need_weights=False)[0]),
        (4, 5, 8),
    ),
    "a transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (4, 5, 8)),
    "several outputs": (lambda: Through(Several(), use_all), (4, 5, 8)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 4, 3), (4, 3, 6, 6)),
    "weight normalization": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), (4, 8)),
    "affine instance normalization": (lambda: nn.InstanceNorm2d(3, affine=True), (4, 3, 6, 6)),
    "a learned activation": (lambda: nn.PReLU(3), (4, 3, 6, 6)),
    "a bilinear form": (lambda: Through(nn.Bilinear(8, 8, 4), lambda m, x: m(x, x)), (4, 8)),
    "a parameter beside layers": (lambda: nn.Sequential(Scale(8), nn.Linear(8, 8)), (4, 5, 8)),
}


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("name", WORKS)
def test_modules_that_are_no_layers_of_the_engine_are_exact(name: str, draws: int) -> None:
    build, shape = WORKS[name]
    model = made(build).double()
    found = check_per_image_gradients(
        model, lambda x: model(x).square().flatten(1).mean(1), [normal(*shape).double()], noise_multiplicity=draws
    )
    assert found["max_relative_error"] <= 1e-10
    expected = ["inner.unused"] if name == "several outputs" else []
    assert [n for n in found["unverified_parameters"] if n != "inner.in_proj_bias"] == expected


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(normal(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor if x.sum() < 1000 else x + self.factor


class Tells(Reads):
    def forward(self, x: Tensor) -> Any:
        return str((x * self.factor).sum().item())


class Uses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x), self.layer.weight)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.factor).real


def in_second_dimension(module: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return module(x, x, x, need_weights=False)[0].transpose(0, 1)


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "batch normalization": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        (4, 3, 6, 6),
        r"Module 1 \(BatchNorm2d\) mixes the images of a batch: use GroupNorm",
    ),
    "batch normalization alone": (lambda: nn.BatchNorm1d(8), (4, 8), r"The model \(BatchNorm1d\) mixes the images"),
    "functional batch normalization": (
        lambda: Through(nn.Linear(8, 8), lambda m, x: F.batch_norm(m(x), None, None, training=True)),
        (4, 8),
        "does not run on one row alone.*Expected more than 1 value per channel",
    ),
    "attention with images in the second dimension": (
        lambda: Through(nn.MultiheadAttention(8, 2), in_second_dimension),
        (4, 5, 8),
        r"Module inner \(MultiheadAttention\) gives an image another output .* Images belong in the first dimension",
    ),
    "dropout inside a module": (
        lambda: Through(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), lambda m, x: m(x, x, x)[0]),
        (4, 5, 8),
        r"Module inner \(MultiheadAttention\) gives an image another output .* a dropout inside it, to 0",
    ),
    "a recurrent network": (
        lambda: Through(nn.LSTM(8, 8, batch_first=True), lambda m, x: m(x)[0]),
        (4, 5, 8),
        r"Module inner \(LSTM\) returns tensors of shapes .*\(1, 4, 8\).*: expected 4 rows, one per image",
    ),
    "no tensor at all": (Tells, (4, 8), r"The model \(Tells\) returns str, which holds no tensor"),
    "values that decide": (Reads, (4, 8), r"The model \(Reads\) cannot run one image at a time"),
    "a weight outside of its layer": (Uses, (4, 8), "layer.weight is used outside of its layer's forward"),
    "a complex parameter": (Complex, (4, 8), "Parameter factor is complex64: gradients per image are those of real"),
    "a lazy layer": (lambda: nn.LazyLinear(8), (4, 8), "Parameter weight has no shape yet: run the model once"),
    "a wrapped model": (
        lambda: nn.DataParallel(nn.Linear(8, 8)),
        (4, 8),
        r"The model \(DataParallel\) is wrapped: pass model.module",
    ),
    "a sparse table": (
        lambda: Through(nn.Embedding(9, 8, sparse=True), table),
        (4, 8),
        "Embedding inner uses max_norm",
    ),
    "weights that a hook sets": (
        lambda: old_weight_norm(nn.Linear(8, 8)),
        (4, 8),
        r"The model \(Linear\) has a gradient per image off by",
    ),
    "rows that are folded": (
        lambda: Through(nn.Linear(8, 8), lambda m, x: m(x.reshape(-1, 8)).view(x.shape)),
        (4, 5, 8),
        "Expected one loss per row: 4 images in the losses, 20 in the model",
    ),
    "nothing to train": (lambda: nn.ReLU(), (4, 8), "at least one parameter that requires a gradient"),
}


def table(module: Any, x: Tensor) -> Tensor:
    return module(x.argmax(1)) + x


def old_weight_norm(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_cannot_do_is_refused_by_name(name: str) -> None:
    build, shape, message = REFUSED[name]
    model = made(build)

    def losses(x: Tensor) -> Tensor:
        found = model(x)
        return found.square().flatten(1).mean(1) if isinstance(found, Tensor) else x.sum(1)

    with pytest.raises(ValueError, match=message) as caught:
        check_per_image_gradients(model, losses, [normal(*shape)])
    assert isinstance(caught.value, (UnsupportedModelError, PerImageGradientError)) or name in (
        "rows that are folded",
        "nothing to train",
    )


def test_a_parameter_that_a_module_does_not_use_has_zero_gradients_with_draws() -> None:
    """One zero for all images, which no sum may be written into."""
    model = made(lambda: Through(Several(), use_all))
    with PerImageGradients(model, noise_multiplicity=2) as engine:
        for _ in range(2):  # twice: added up
            engine.backward(model(normal(4, 8)).square().mean(1))
    assert torch.equal(model.inner.unused.grad_sample, torch.zeros(2, 3))
