"""The weight gradient of a convolution, image by image: several ways to the same numbers.

Which one is fastest hangs on the device, the shape and the dtype, so that it is found by measuring. All of them take
rows draw by draw, row `k * B + b` is draw `k` of image `b`, in either memory format, and sum over the draws. bfloat16
is multiplied as it is, and added up in float32.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """What a two-dimensional convolution is, beside its channels. Its padding is of zeros."""

    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_dense(self) -> bool:
        """Whether each output channel sees neighbouring pixels of all input channels."""
        return self.dilation == (1, 1) and self.groups == 1


# (inputs (K * B, C, H, W), output gradients (K * B, N, H', W'), geometry, K) -> (B, N, C, kh, kw) in float32 or wider.
# The numbers of an image are dense in memory, in an order that is the method's own.
WeightGradient = Callable[[Tensor, Tensor, Geometry, int], Tensor]


def grouped(inputs: Tensor, output_gradients: Tensor, geometry: Geometry, draws: int) -> Tensor:
    """One convolution whose groups are the images and whose batch are the draws: views alone, for contiguous rows."""
    images, channels, filters = inputs.shape[0] // draws, inputs.shape[1], output_gradients.shape[1]
    inputs = inputs.contiguous().view(draws, images * channels, *inputs.shape[2:])
    gradients = output_gradients.contiguous().view(draws, images * filters, *output_gradients.shape[2:])
    # Only its shape is read.
    weight = inputs.new_empty(images * filters, channels // geometry.groups, *geometry.kernel_size)
    result = torch.ops.aten.convolution_backward(
        gradients, inputs, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, [0, 0],
        images * geometry.groups, [False, True, False],
    )[1]  # fmt: skip
    return _widened(result.view(images, filters, *weight.shape[1:]))


def unfolded(inputs: Tensor, output_gradients: Tensor, geometry: Geometry, draws: int) -> Tensor:
    """One batched product with the patches of the inputs: kh * kw copies of them, channels ahead of positions."""
    _require(geometry.groups == 1, "one group")
    channels, filters = inputs.shape[1], output_gradients.shape[1]
    (height, width), (kh, kw) = output_gradients.shape[2:], geometry.kernel_size
    padded = F.pad(inputs, _both_sides(geometry.padding)).unflatten(0, (draws, -1)).permute(1, 2, 0, 3, 4)
    images, positions = padded.shape[0], draws * height * width
    room = -(-positions // 8) * 8  # rows that begin at 16 bytes
    patches = _with_empty_tail(inputs, (images, channels, kh, kw, room), positions)
    places = patches[..., :positions].unflatten(-1, (draws, height, width))
    for i in range(kh):
        for j in range(kw):
            top, left = i * geometry.dilation[0], j * geometry.dilation[1]
            bottom, right = (
                top + geometry.stride[0] * (height - 1) + 1,
                left + geometry.stride[1] * (width - 1) + 1,
            )
            taken = padded[..., top : bottom : geometry.stride[0], left : right : geometry.stride[1]]
            places[:, :, i, j].copy_(taken)
    gradients = _with_empty_tail(output_gradients, (images, filters, room), positions)
    by_image = output_gradients.unflatten(0, (draws, -1)).permute(1, 2, 0, 3, 4)
    gradients[..., :positions].unflatten(-1, (draws, height, width)).copy_(by_image)
    result = _product(gradients, patches.flatten(1, 3).mT)
    return result.view(images, filters, channels, kh, kw)


def row_unfolded(inputs: Tensor, output_gradients: Tensor, geometry: Geometry, draws: int) -> Tensor:
    """One batched product a row of the kernel: kw copies of the inputs, of which another row is another offset."""
    _require(geometry.is_dense and geometry.stride == (1, 1), "stride, dilation and groups of 1")
    (kh, kw), (height, width) = geometry.kernel_size, output_gradients.shape[2:]
    channels, filters = inputs.shape[1], output_gradients.shape[1]
    padded = _by_image(inputs, draws, geometry.padding, (height + kh - 1, width + kw - 1))
    images, rows = padded.shape[0], height + kh - 1
    patches = padded.unfold(3, kw, 1).movedim(-1, -2).reshape(images, draws * rows * width, kw * channels)
    gradients = _by_image(output_gradients, draws, (0, 0), (rows, width)).view(images, -1, filters)
    result = _empty_result(inputs, images, kh, filters, kw * channels)
    for i in range(kh):
        end = gradients.shape[1] - i * width
        _product(gradients[:, :end].mT, patches[:, i * width :], out=result[:, i])
    return result.view(images, kh, filters, kw, channels).permute(0, 2, 4, 1, 3)


def shifted(inputs: Tensor, output_gradients: Tensor, geometry: Geometry, draws: int) -> Tensor:
    """One batched product a weight of the kernel, without copies: in padded memory each weight is another offset."""
    _require(geometry.is_dense and geometry.stride == (1, 1), "stride, dilation and groups of 1")
    (kh, kw), (height, width) = geometry.kernel_size, output_gradients.shape[2:]
    channels, filters = inputs.shape[1], output_gradients.shape[1]
    shape = (height + kh - 1, width + kw - 1)
    padded = _by_image(inputs, draws, geometry.padding, shape).flatten(1, 3)
    gradients = _by_image(output_gradients, draws, (0, 0), shape).flatten(1, 3)
    result = _empty_result(inputs, padded.shape[0], kh * kw, filters, channels)
    for i in range(kh):
        for j in range(kw):
            offset = i * shape[1] + j
            end = gradients.shape[1] - offset
            _product(gradients[:, :end].mT, padded[:, offset:], out=result[:, i * kw + j])
    return result.view(-1, kh, kw, filters, channels).permute(0, 3, 4, 1, 2)


def fused(inputs: Tensor, output_gradients: Tensor, geometry: Geometry, draws: int) -> Tensor:
    """A kernel of its own, which reads patches where they lie; it needs Triton, and likes channels last."""
    _require(has_triton(), "Triton")
    _require(geometry.is_dense and geometry.kernel_size == (3, 3), "a dense 3x3 kernel")
    from dp_curriculum.dp_sgd.weight_gradient_kernel import three_by_three

    return three_by_three(inputs, output_gradients, geometry.stride, geometry.padding, draws)


CANDIDATES: dict[str, WeightGradient] = {
    "grouped": grouped,
    "unfolded": unfolded,
    "row unfolded": row_unfolded,
    "shifted": shifted,
    "fused": fused,
}


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; that it runs on a device is another matter."""
    return importlib.util.find_spec("triton") is not None


def candidates_for(geometry: Geometry) -> dict[str, WeightGradient]:
    """The methods that compute this convolution on any device, `fused` also among them where Triton is installed."""
    simple = geometry.is_dense and geometry.stride == (1, 1)
    fits = {
        "grouped": True,
        "unfolded": geometry.groups == 1,
        "row unfolded": simple,
        "shifted": simple,
        "fused": has_triton() and geometry.is_dense and geometry.kernel_size == (3, 3),
    }
    return {name: method for name, method in CANDIDATES.items() if fits[name]}


def relative_error(
    method: WeightGradient, inputs: Tensor, output_gradients: Tensor, geometry: Geometry, draws: int
) -> float:
    """How far a method is from the same products in float64, over all images; not a number if any number is none."""
    result = method(inputs, output_gradients, geometry, draws).double()
    reference = grouped if geometry.groups > 1 else unfolded
    expected = reference(inputs.double(), output_gradients.double(), geometry, draws)
    return float((result - expected).norm() / expected.norm())


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise NotImplementedError(f"this weight gradient needs {what}")


def _both_sides(padding: tuple[int, int]) -> list[int]:
    return [padding[1], padding[1], padding[0], padding[0]]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _with_empty_tail(like: Tensor, shape: tuple[int, ...], filled: int) -> Tensor:
    """Memory of which the last dimension is zero from `filled` on, and not written before."""
    result = like.new_empty(shape)
    result[..., filled:] = 0
    return result


def _by_image(rows: Tensor, draws: int, before: tuple[int, int], sides: tuple[int, int]) -> Tensor:
    """`(K * B, C, H, W)` as `(B, K, *sides, C)`, images `before` pixels from top and left, zero around them."""
    height, width = (min(side, total - first) for side, total, first in zip(rows.shape[2:], sides, before))
    images = rows.shape[0] // draws
    result = rows.new_zeros(images, draws, *sides, rows.shape[1])
    inside = result[:, :, before[0] : before[0] + height, before[1] : before[1] + width]
    inside.copy_(rows.unflatten(0, (draws, -1)).permute(1, 0, 3, 4, 2)[:, :, :height, :width])
    return result


def _empty_result(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """A batched product that is added up, and given, in float32 or wider."""
    if left.dtype in (torch.float32, torch.float64):
        return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)
    if left.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):
        product = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        product = torch.bmm(left.float(), right.float())
    return product if out is None else out.copy_(product)
