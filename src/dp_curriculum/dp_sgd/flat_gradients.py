"""The gradients of a physical batch in one tensor: one row an image, all parameters side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


_BLOCK = 4096  # as many numbers in a row have a float32 norm that is true to 1e-6 on any device


class FlatGradients:
    r"""
    One gradient per image as a row of a tensor that is allocated once and written again in each backward pass.

    Args:
        parameters (`Sequence[torch.nn.Parameter]`): The parameters, in the order in which they lie in a row.

    Attributes:
        rows (`torch.Tensor` of shape `(images, width)`): The gradients of the last pass, float32 or wider. `width` is
            the number of parameters, made up by columns of zeros to a multiple of what one norm takes at a time.
        views (`dict[torch.nn.Parameter, torch.Tensor]`): The columns of each parameter, `(images, *shape)`.

    Privacy:
        Private until it is clipped, summed and noised. Every number in it is finite: what is not, is the largest
        finite one instead, so that the norm of its row is not finite and its factor, zero, makes a zero of it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.num_columns = sum(self.sizes)
        self.width = padded_width(self.num_columns)
        self.dtype = torch.float32
        for parameter in self.parameters:
            self.dtype = torch.promote_types(self.dtype, parameter.dtype)
        self.device = self.parameters[0].device
        self.rows = torch.empty(0, self.width, dtype=self.dtype, device=self.device)
        self._memory = self.rows
        self.views: dict[nn.Parameter, Tensor] = {}
        self._written: set[nn.Parameter] = set()

    def num_bytes(self, images: int) -> int:
        """Bytes that the gradients of so many images take."""
        return images * self.num_columns * self.rows.element_size()

    def begin(self, images: int) -> None:
        """Makes room for a pass over `images` images; what the last pass wrote is lost."""
        if images > len(self._memory):
            self.forget()  # before there are two of them
            self._memory = torch.empty(images, self.width, dtype=self.dtype, device=self.device)
            self._memory[:, self.num_columns :] = 0
        if images != len(self.rows) or not self.views:
            self.rows = self._memory[:images]
            self.views = dict(zip(self.parameters, self.columns(self.rows)))
        self._written.clear()

    def forget(self) -> None:
        """Lets go of the memory: views that others hold stay as they are."""
        self.rows = self._memory = torch.empty(0, self.width, dtype=self.dtype, device=self.device)
        self.views = {}
        self._written.clear()

    def columns(self, rows: Tensor) -> list[Tensor]:
        """Views `(*rest, *parameter.shape)` of `(*rest, width)`, one a parameter."""
        parts = rows[..., : self.num_columns].split(self.sizes, dim=-1)
        return [part.view(*rows.shape[:-1], *p.shape) for p, part in zip(self.parameters, parts)]

    def write(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Takes the gradients `(images, *shape)` of a parameter; those of a second use in the same pass are added."""
        target = self.views[parameter]
        if parameter in self._written:
            make_finite(target.add_(gradient), out=target)
        elif gradient.dtype == target.dtype:
            make_finite(gradient, out=target)
        else:
            make_finite(target.copy_(gradient), out=target)
        self._written.add(parameter)

    def finish(self) -> None:
        """Writes zero gradients of the parameters that the pass did not reach."""
        for parameter in self.parameters if len(self._written) < len(self.parameters) else ():
            if parameter not in self._written:
                self.views[parameter].zero_()

    def drop_broken_images(self) -> None:
        """Zero in place of the whole gradient of an image without a finite norm."""
        broken = ~_has_norm(norm_per_image(self.rows))
        if self.rows.is_cuda:  # one more pass over all of them, and no waiting for the norms
            self.rows.masked_fill_(broken[:, None], 0)
        elif bool(broken.any()):
            self.rows[broken] = 0


def padded_width(columns: int) -> int:
    """Columns of a row whose norm is taken in blocks."""
    return columns if columns <= _BLOCK else -(-columns // _BLOCK) * _BLOCK


def make_finite(gradient: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The largest finite number in place of one that is not: its square, and so the norm of its row, is infinite."""
    largest = torch.finfo(gradient.dtype).max
    return torch.nan_to_num(gradient, nan=largest, posinf=largest, neginf=-largest, out=out)


def norm_per_image(rows: Tensor) -> Tensor:
    """Norms `(images,)` of rows, true to 1e-6: the CPU's float32 norm of 1e7 numbers in one row is 4e-4 too small."""
    while rows.shape[1] > _BLOCK:
        if missing := padded_width(rows.shape[1]) - rows.shape[1]:
            rows = F.pad(rows, (0, missing))
        rows = torch.linalg.vector_norm(rows.unflatten(1, (-1, _BLOCK)), dim=2)
    return torch.linalg.vector_norm(rows, dim=1)


def clip_factors(norms: Tensor, max_grad_norm: float, counted: Tensor | None = None) -> Tensor:
    r"""
    Factors `(images,)` of a clipped sum: min(1, C / |g|), and exactly zero for an image that adds nothing.

    Nothing is decided on the host, which on a GPU would wait for all that came before.

    Args:
        norms (`torch.Tensor` of shape `(images,)`): Norm of each image's whole gradient.
        max_grad_norm (`float`): C.
        counted (`torch.BoolTensor` of shape `(images,)`, *optional*): Images that count; the others fill up a batch.

    Privacy:
        Zero where the norm is NaN, infinite, or so large that its square is: float32 then has no norm to clip by.
    """
    counts = _has_norm(norms)
    if counted is not None:
        counts = counts & counted
    return torch.where(counts, max_grad_norm / norms.clamp_min(max_grad_norm), 0.0)


def _has_norm(norms: Tensor) -> Tensor:
    return norms < torch.finfo(norms.dtype).max ** 0.5
