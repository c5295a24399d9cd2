"""The private images where the network is, as bytes, so that a batch of them is an index and not a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from dp_curriculum.data.images import PrivateImages, to_unit_range
from dp_curriculum.dp_sgd.memory import free_bytes


_SHARE_OF_FREE_MEMORY = 0.2


class DeviceImages:
    r"""
    Images and classes by row, on the device of the network.

    Args:
        private ([`~data.PrivateImages`]): The images. They are copied to the device at once where they take at most a
            fifth of its free memory; else rows are copied when they are asked for.
        device (`torch.device`): Of the network.
    """

    def __init__(self, private: PrivateImages, device: torch.device) -> None:
        self.device, self.filler = device, 0
        self.images, self.labels = private.images, private.labels
        if len(self.labels) == 0:  # one to point at, where all rows of a batch are filled up
            self.images = self.images.new_zeros(1, *self.images.shape[1:])
            self.labels = self.labels.new_full((1,), self.filler)
        num_bytes = self.images.numel() * self.images.element_size()
        if device.type == "cuda" and num_bytes <= _SHARE_OF_FREE_MEMORY * free_bytes(device):
            self.images, self.labels = self.images.to(device), self.labels.to(device)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        Images in `[-1, 1]`, and classes; in place of a row below 0, which fills up a batch, grey and class 0.

        Args:
            rows (`torch.LongTensor` of shape `(B,)`): Indices.

        Returns:
            Images `(B, C, H, W)` in float32 and classes `(B,)`, both on the device.
        """
        index = rows.clamp_min(0).to(self.images.device)
        images = to_unit_range(self.images[index], self.device) * 2 - 1
        labels = self.labels[index].to(self.device)
        is_image = (rows >= 0).to(self.device)
        return torch.where(is_image.view(-1, 1, 1, 1), images, 0.0), torch.where(is_image, labels, self.filler)
