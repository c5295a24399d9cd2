"""How useful generated images are: classifiers that see only them, tested on real ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline


def sample_images(
    pipeline: DPCurriculumPipeline, num_images: int, *, batch_size: int = 250, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Generates images with the classes in turn, so that all are as frequent.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Images `(num_images, C, H, W)` in [0, 1] and labels `(num_images,)`, on
        the CPU.
    """
    generator = torch.Generator(pipeline.device).manual_seed(seed)
    labels = torch.arange(num_images) % pipeline.num_classes
    images = [
        pipeline(class_labels=part, generator=generator, output_type="pt", return_dict=False)[0].cpu()
        for part in labels.split(batch_size)
    ]
    return torch.cat(images), labels


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers; images of any size from 8 pixels a side."""

    def __init__(self, num_channels: int, resolution: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(num_channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * (resolution // 4) ** 2, 128), nn.ReLU(), nn.Dropout(0.5),
        )  # fmt: skip
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images * 2 - 1))


def train_classifier(
    images: torch.Tensor, labels: torch.Tensor, *, num_classes: int, num_steps: int = 800, seed: int = 0
) -> SmallCNN:
    """
    Trains a [`SmallCNN`] on images `(N, C, H, W)` in [0, 1] with Adam, a batch of 128 and a cosine schedule.

    Nothing is selected: the weights of the last step are returned.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = SmallCNN(images.shape[1], images.shape[2], num_classes)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        model.train()
        for _ in range(num_steps):
            rows = torch.randint(len(images), (128,))
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: SmallCNN, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images `(N, C, H, W)` whose most likely class is their label."""
    predicted = torch.cat([model(part).argmax(1) for part in images.split(1000)])
    return float((predicted == labels).float().mean())
