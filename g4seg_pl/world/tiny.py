"""A tiny decoder of the embedded world's latents, in diffusers' AutoencoderTiny (TAESD's layout).

It stands to the embedded autoencoder as TAESD stands to Stable Diffusion's: trained on the same
latents, an eighth of the weights, to say what cheap decoding costs in quality.
"""

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from g4seg_pl.world.autoencoder import colour_loss
from g4seg_pl.world.classifier import SceneClassifier, one_cycle
from g4seg_pl.world.data import held_out, split_row

WIDTH = 16


def build_tiny() -> AutoencoderTiny:
    """An AutoencoderTiny of factor 4 with fresh weights.

    Its encoder is as small as the class allows, is not trained and serves nobody: encoding stays
    the full autoencoder's.
    """
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(0, 0, 0),
        decoder_block_out_channels=(WIDTH, WIDTH, WIDTH),
        num_decoder_blocks=(3, 3, 1),
    )


class ScenesWithLatents(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless random batches ``(images, scaled latents)`` of the shards that were encoded."""

    def __init__(self, cache: Path, batch: int) -> None:
        """Open the shards.

        Args:
            cache: with ``scenes_*.npy`` and ``latents_*.npy``.
            batch: images at once.

        Raises:
            FileNotFoundError: nothing was encoded.
        """
        self.batch = batch
        self.shards: list[tuple[NDArray[np.uint8], NDArray[np.float16]]] = [
            (
                np.load(file.with_name(file.name.replace("latents", "scenes")), mmap_mode="r"),
                np.load(file, mmap_mode="r"),
            )
            for file in sorted(cache.glob("latents_*.npy"))
        ]
        if not self.shards:
            message = f"no latents in {cache}; run `python -m g4seg_pl.world.train latents`"
            raise FileNotFoundError(message)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches for ever; every start draws anew."""
        rng = np.random.default_rng()
        while True:
            scenes, latents = self.shards[int(rng.integers(len(self.shards)))]
            rows = np.sort(rng.choice(len(latents), self.batch, replace=False))
            images, _ = split_row(torch.from_numpy(scenes[rows]))
            yield images, torch.from_numpy(latents[rows]).float()


def held_out_latents(vae: AutoencoderKL, scale: float, count: int = 256) -> tuple[Tensor, Tensor]:
    """Validation scenes with their scaled latents.

    Args:
        vae: the full autoencoder.
        scale: brings latents to deviation 1.
        count: how many.
    """
    images = held_out("val", count)[0]
    with torch.inference_mode():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
    return images, latents.clone() * scale


class TinyDecoderTask(L.LightningModule):
    """Fits the decoder to the pictures behind the latents: colour loss, the teacher's features.

    The pictures, and not what the full decoder makes of the latents: so it does not inherit that
    one's faults, and outlives it.
    """

    def __init__(
        self,
        teacher: SceneClassifier | None = None,
        learning_rate: float = 2e-3,
        steps: int = 3500,
        perceptual_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["teacher"])
        self.tiny = build_tiny()
        self.tiny.encoder.requires_grad_(False)
        self.teacher = teacher or SceneClassifier().eval().requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss on ``(images, scaled latents)``."""
        images, latents = batch
        self.teacher.eval()
        decoded = self.tiny.decode(latents).sample
        pairs = zip(self.teacher.features(decoded), self.teacher.features(images), strict=True)
        seen = sum((F.l1_loss(ours, theirs) for ours, theirs in pairs), decoded.new_zeros(()))
        pixels = colour_loss(decoded.float(), images)
        self.log_dict({"pixels": pixels, "seen": seen}, prog_bar=True)
        total: Tensor = pixels + self.hparams["perceptual_weight"] * seen
        return total

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """PSNR in dB of images in [0, 1], the mean over images."""
        images, latents = batch
        decoded = self.tiny.decode(latents).sample.float().clamp(-1, 1)
        error = ((decoded - images) / 2).square().mean((1, 2, 3))
        self.log("psnr", (-10 * error.log10()).mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW under a one-cycle schedule."""
        return one_cycle(self, self.hparams["learning_rate"], self.hparams["steps"])
