"""The recipe's two small multi-label classifiers of scenes; the refiner sees neither.

The teacher lends its perception to the autoencoder, the CLIP and the U-Net; the judge measures
them at the gates and has taught none of them.
"""

from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from g4seg_pl.world.scenes import CLASSES


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class SceneClassifier(nn.Module):
    """Four convolutional stages and one linear layer on their mean; 0.5 M parameters."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 160)) -> None:
        super().__init__()
        self.widths = widths
        inputs = (3, *widths)
        self.stages = nn.ModuleList(
            _stage(inputs[i], width, 1 if i == 1 else 2) for i, width in enumerate(widths)
        )
        self.head = nn.Linear(widths[-1], len(CLASSES))

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps after each stage for images ``(B, 3, H, W)`` in [-1, 1]."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Logits of presence, ``(B, 12)``."""
        # The largest response beside the mean: small objects must not drown in the ground.
        last = self.features(images)[-1]
        logits: Tensor = self.head(last.mean((2, 3)) * 0.5 + last.amax((2, 3)) * 0.5)
        return logits


class ClassifierTask(L.LightningModule):
    """Fits a classifier with binary cross-entropy on presence.

    With ``disturb``, half of the pictures are blurred, noisy or of another contrast, so that what
    it finds is the thing and not the sharpness of a pixel.
    """

    def __init__(
        self, learning_rate: float = 3e-3, steps: int = 4000, disturb: bool = False
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = SceneClassifier()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss on ``(images, presence)``."""
        images, presence = batch
        if self.hparams["disturb"]:
            images = disturbed(images)
        loss = F.binary_cross_entropy_with_logits(self.net(images), presence)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Recall and precision of presence at probability 0.5."""
        images, presence = batch
        found = self.net(images) > 0
        self.log("recall", (found * presence).sum() / presence.sum(), prog_bar=True)
        self.log(
            "precision",
            (found * presence).sum() / found.sum().clamp(min=1),
            prog_bar=True,
        )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW under a one-cycle schedule."""
        return one_cycle(self, self.hparams["learning_rate"], self.hparams["steps"])


def disturbed(images: Tensor) -> Tensor:
    """Half of the images ``(B, 3, H, W)`` in [-1, 1] blurred, of other contrast, and noisy."""
    images = images.clone()
    for part in images.split(8):
        if torch.rand(()) < 0.5:
            sigma = float(torch.empty(()).uniform_(0.3, 1.2))
            contrast = torch.empty(len(part), 1, 1, 1).uniform_(0.8, 1.15).to(part)
            part.copy_(gaussian_blur(part, [7, 7], [sigma, sigma]) * contrast)
            part.add_(torch.randn_like(part) * 0.06)
    return images


def training_precision(*, gpu: bool = False) -> Literal["bf16-mixed", "32-true"]:
    """bfloat16 where it saves time; a CPU without AVX-512 takes many times as long for it."""
    fast = gpu or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "bf16-mixed" if fast else "32-true"


def one_cycle(module: nn.Module, learning_rate: float, steps: int) -> OptimizerLRSchedulerConfig:
    """AdamW with decay 0.02, warmed up and annealed to zero over ``steps`` optimiser steps."""
    trainable = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=0.05
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }
