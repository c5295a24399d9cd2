"""Classifiers that measure what images are good for: trained on one set, tested on another.

Nothing is selected on the test set: what the last step leaves is what is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification


SEEN_SIDE = 64  # pixels
_BATCH = 128


def as_classifiers_see(images: torch.Tensor) -> torch.Tensor:
    """Images `(M, C, h, w)` as classifiers see them: larger ones are averaged down, which saves hours on a CPU."""
    return images if images.shape[-1] <= SEEN_SIDE else F.adaptive_avg_pool2d(images, SEEN_SIDE)


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers, for images of 8 pixels per side or more."""

    def __init__(self, num_channels: int, resolution: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(num_channels, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * (resolution // 4) ** 2, 128), nn.ReLU(), nn.Dropout(0.5),
        )  # fmt: skip
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `(B, classes)` of images `(B, C, H, W)` in `[0, 1]`."""
        return self.classifier(self.features(images * 2 - 1))


class SmallResNet(nn.Module):
    """A ResNet of `transformers` with a basic block at each of three resolutions."""

    def __init__(self, num_channels: int, num_classes: int) -> None:
        super().__init__()
        self.resnet = ResNetForImageClassification(
            ResNetConfig(
                num_channels=num_channels,
                embedding_size=32,
                hidden_sizes=[32, 64, 128],
                depths=[1, 1, 1],
                layer_type="basic",
                num_labels=num_classes,  # type: ignore[call-arg]
            )
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `(B, classes)` of images `(B, C, H, W)` in `[0, 1]`."""
        # The stem makes an image four times smaller; that of a small image would leave nothing.
        side = max(56, images.shape[-1])
        return self.resnet(F.interpolate(images * 2 - 1, size=(side, side), mode="nearest")).logits


def _fit(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, num_steps: int) -> nn.Module:
    """Adam with a cosine schedule, one batch of 128 drawn with replacement a step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    model.train()
    for _ in tqdm(range(num_steps), desc="training a classifier", leave=False):
        rows = torch.randint(len(images), (_BATCH,))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Randomness of the CPU and of the device from a seed; what is drawn later is what it would have been."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.random.default_generator.manual_seed(seed)
        for used in devices:
            torch.cuda.default_generators[used.index or 0].manual_seed(seed)
        yield


def train_cnn(
    images: torch.Tensor, labels: torch.Tensor, *, num_classes: int, seed: int = 0, num_steps: int = 800
) -> SmallCNN:
    """Trains a [`SmallCNN`] on images `(N, C, H, W)` in `[0, 1]` and labels `(N,)`, on their device: CPU or CUDA."""
    with _seeded(seed, images.device):
        # Channels last, and pooling ahead of the rectifier, compute the same in 0.6 times the time.
        model = SmallCNN(images.shape[1], images.shape[2], num_classes).to(images.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _fit(model, images, labels, num_steps)
    return model


@torch.no_grad()
def network_features(model: SmallCNN, images: torch.Tensor) -> np.ndarray:
    """Activations `(N, 128)` ahead of the last layer."""
    return torch.cat([model.features(part * 2 - 1) for part in images.split(1000)]).double().cpu().numpy()


Predict = Callable[[torch.Tensor], np.ndarray]


def _predict_with(model: nn.Module) -> Predict:
    @torch.no_grad()
    def predict(images: torch.Tensor) -> np.ndarray:
        return torch.cat([model(part).argmax(1) for part in images.split(500)]).cpu().numpy()

    return predict


def _cnn(images: torch.Tensor, labels: torch.Tensor, num_classes: int, seed: int) -> Predict:
    return _predict_with(train_cnn(images, labels, num_classes=num_classes, seed=seed))


def _resnet(images: torch.Tensor, labels: torch.Tensor, num_classes: int, seed: int) -> Predict:
    with _seeded(seed, images.device):
        model = SmallResNet(images.shape[1], num_classes).to(images.device)
        return _predict_with(_fit(model, images, labels, num_steps=800))


def _flat(images: torch.Tensor) -> np.ndarray:
    return images.flatten(1).cpu().numpy()


def _logistic(images: torch.Tensor, labels: torch.Tensor, num_classes: int, seed: int) -> Predict:
    model = LogisticRegression(max_iter=200, random_state=seed).fit(_flat(images), labels.cpu().numpy())
    return lambda rows: model.predict(_flat(rows))


def _mlp(images: torch.Tensor, labels: torch.Tensor, num_classes: int, seed: int) -> Predict:
    model = MLPClassifier(max_iter=40, random_state=seed).fit(_flat(images), labels.cpu().numpy())
    return lambda rows: model.predict(_flat(rows))


CLASSIFIERS: dict[str, Callable[[torch.Tensor, torch.Tensor, int, int], Predict]] = {
    "logistic": _logistic,
    "mlp": _mlp,
    "cnn": _cnn,
    "resnet": _resnet,
}
