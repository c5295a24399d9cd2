"""Every way to the weight gradient of a convolution gives the numbers of autograd, image by image."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dp_curriculum.dp_sgd.weight_gradients import CANDIDATES, Geometry, candidates_for, has_triton, relative_error


GEOMETRIES = (
    Geometry(),
    Geometry(stride=(2, 2)),
    Geometry(padding=(0, 2)),
    Geometry(kernel_size=(1, 1), padding=(0, 0)),
    Geometry(kernel_size=(5, 2), padding=(1, 1)),
    Geometry(stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
    Geometry(groups=2),
)
IMAGES, CHANNELS, FILTERS = 2, 4, 6
CASES = [(name, geometry) for geometry in GEOMETRIES for name in candidates_for(geometry) if name != "fused"]


def rows(geometry: Geometry, draws: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, output gradients, and the gradients of each image from autograd."""
    generator = torch.Generator().manual_seed(draws)
    inputs = torch.randn(draws * IMAGES, CHANNELS, 9, 7, generator=generator, dtype=dtype)
    weight = torch.randn(FILTERS, CHANNELS // geometry.groups, *geometry.kernel_size, dtype=dtype, requires_grad=True)
    outputs = F.conv2d(inputs, weight, None, *geometry[1:])
    gradients = torch.randn(outputs.shape, generator=generator, dtype=dtype)
    image = (torch.arange(draws * IMAGES) % IMAGES).view(-1, 1, 1, 1)
    expected = [
        torch.autograd.grad(outputs, weight, torch.where(image == index, gradients, 0), retain_graph=True)[0]
        for index in range(IMAGES)
    ]
    return inputs, gradients, torch.stack(expected)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize(("name", "geometry"), CASES)
def test_gradients_are_those_of_autograd(name: str, geometry: Geometry, draws: int, form: torch.memory_format) -> None:
    inputs, gradients, expected = rows(geometry, draws)
    pair = [tensor.contiguous(memory_format=form) for tensor in (inputs, gradients)]
    found = CANDIDATES[name](*pair, geometry, draws)
    assert found.shape == expected.shape and found.dtype == torch.float64
    assert (found - expected).norm() <= 1e-10 * expected.norm()
    # Whoever writes them into a buffer of one row an image needs no more than a view of each.
    assert all(sum((n - 1) * s for n, s in zip(one.shape, one.stride())) == one.numel() - 1 for one in found)


@pytest.mark.parametrize("name", ["grouped", "unfolded", "row unfolded", "shifted"])
def test_bfloat16_is_added_up_in_float32(name: str) -> None:
    inputs, gradients, _ = rows(Geometry(), 3, torch.bfloat16)
    assert CANDIDATES[name](inputs, gradients, Geometry(), 3).dtype == torch.float32
    assert relative_error(CANDIDATES[name], inputs, gradients, Geometry(), 3) < 1e-2


@pytest.mark.parametrize("name", ["unfolded", "row unfolded", "shifted"])
def test_what_a_way_cannot_compute_it_refuses(name: str) -> None:
    geometry = Geometry(groups=2)
    inputs, gradients, _ = rows(geometry, 1)
    with pytest.raises(NotImplementedError):
        CANDIDATES[name](inputs, gradients, geometry, 1)


def test_an_error_is_noticed() -> None:
    """Negative control: a gradient moved by one column, or not written."""
    inputs, gradients, _ = rows(Geometry(), 2)
    right = CANDIDATES["shifted"]
    assert relative_error(lambda *args: right(*args).roll(1, -1), inputs, gradients, Geometry(), 2) > 0.5
    assert not relative_error(lambda *args: right(*args) * torch.nan, inputs, gradients, Geometry(), 2) < 1


INTERPRETED = """
import torch
from dp_curriculum.dp_sgd.weight_gradients import Geometry, fused, relative_error
generator = torch.Generator().manual_seed(0)
for channels, filters in ((16, 16), (3, 20), (80, 16)):
    for geometry in (Geometry(), Geometry(stride=(2, 2)), Geometry(padding=(0, 2))):
        for draws in (1, 3):
            inputs = torch.randn(2 * draws, channels, 9, 7, generator=generator)
            weight = torch.randn(filters, channels, 3, 3)
            outputs = torch.nn.functional.conv2d(inputs, weight, None, *geometry[1:])
            gradients = torch.randn(outputs.shape, generator=generator)
            assert relative_error(fused, inputs, gradients, geometry, draws) < 1e-6
"""


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dp_curriculum.dp_sgd.weight_gradient_kernel import _weight_gradient_kernel as kernel
channels, types = CHANNELS_OF_THE_TEST, {"inputs": "*bf16", "gradients": "*bf16", "result": "*fp32", "images": "i32"}
sides = ("HEIGHT", "WIDTH", "OUT_HEIGHT", "OUT_WIDTH")
block = 64 if channels > 16 else 16
constants = {
    "POSITIONS": 784, "CHANNELS": channels, "FILTERS": channels, **dict.fromkeys(sides, 28), "STRIDE_H": 1,
    "STRIDE_W": 1, "PADDING_H": 1, "PADDING_W": 1, "BLOCK_C": block, "BLOCK_N": block, "BLOCK_L": 64,
}
source = ASTSource(
    kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants,
    {(index,): [["tt.divisibility", 16]] for index in range(3)},
)
print(compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3}).asm["ptx"])
"""


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
def test_the_kernel_is_right_in_its_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    assert subprocess.run([sys.executable, "-c", INTERPRETED], env=environment).returncode == 0


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize("channels", [16, 48, 64])
def test_the_kernel_compiles_for_a_device_that_is_not_here(channels: int) -> None:
    """What the interpreter lets pass, the compiler may refuse. Large tiles reach the matrix units of Hopper."""
    code = COMPILED.replace("CHANNELS_OF_THE_TEST", str(channels))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert ("wgmma" if channels > 16 else "mma.sync") in found.stdout


@pytest.mark.skipif(has_triton(), reason="needs to be without Triton")
def test_without_triton_there_are_other_ways() -> None:
    assert "fused" not in candidates_for(Geometry())
    with pytest.raises(NotImplementedError, match="Triton"):
        CANDIDATES["fused"](*rows(Geometry(), 1)[:2], Geometry(), 1)
