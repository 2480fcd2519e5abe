"""The small KL autoencoder: 64×64 pixels to a 4×16×16 latent, in diffusers' own class."""

import lightning as L
import torch
from diffusers import AutoencoderKL
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from g4seg_pl.world.classifier import SceneClassifier, one_cycle
from g4seg_pl.world.scenes import IMAGE_SIZE

# Rows: luma and two colour differences (BT.601). Hue is what a plain L1 gives up first.
_CHROMA = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
_CHROMA_WEIGHT = torch.tensor([1.0, 2.0, 2.0])


def build_autoencoder() -> AutoencoderKL:
    """The autoencoder of the embedded world with fresh weights (downsampling factor 4)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def colour_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 in luma and doubled colour differences, plus a squared term for PSNR."""
    difference = decoded - images
    turned = torch.einsum("rc,bchw->brhw", _CHROMA.to(difference), difference)
    weight = _CHROMA_WEIGHT.to(difference)[None, :, None, None]
    return (turned.abs() * weight).mean() + difference.square().mean()


class AutoencoderTask(L.LightningModule):
    """Fits the autoencoder: colour loss, the teacher's features and verdicts, a weak KL term.

    The verdicts are the teacher's logits of the classes at each place: a feature that moves a
    little may still cross the line between seen and not seen. With ``decoder_only`` the latents
    stay what they are (a U-Net was trained on them) and only the decoder learns.
    """

    def __init__(
        self,
        teacher: SceneClassifier | None = None,
        learning_rate: float = 1.5e-3,
        steps: int = 3500,
        perceptual_weight: float = 0.2,
        verdict_weight: float = 0.0,
        kl_weight: float = 1e-5,
        decoder_only: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["teacher"])
        self.vae = build_autoencoder()
        if decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.teacher = teacher or SceneClassifier().eval().requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss on ``(images, presence)``; presence is not used."""
        images = batch[0]
        self.teacher.eval()
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        found, wanted = self.teacher.features(decoded), self.teacher.features(images)
        pairs = zip(found, wanted, strict=True)
        seen = sum((F.l1_loss(ours, theirs) for ours, theirs in pairs), decoded.new_zeros(()))
        judged = F.smooth_l1_loss(self._verdicts(found[-1]), self._verdicts(wanted[-1]))
        pixels = colour_loss(decoded.float(), images)
        kl = posterior.kl().mean() / images[0].numel()
        parts = {"pixels": pixels, "seen": seen, "verdicts": judged, "kl": kl}
        self.log_dict(parts, prog_bar=True)
        weighted = (
            self.hparams["perceptual_weight"] * seen + self.hparams["verdict_weight"] * judged
        )
        total: Tensor = pixels + weighted + self.hparams["kl_weight"] * 256 * kl
        return total

    def _verdicts(self, features: Tensor) -> Tensor:
        """The teacher's logits, over 4, where its last map ``(B, C, h, w)`` has a place."""
        logits: Tensor = self.teacher.head(features.flatten(2).transpose(1, 2)).float()
        return logits.clamp(-8, 24) / 4

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """PSNR in dB of images in [0, 1], the mean over images; the teacher's recall kept."""
        images, presence = batch
        decoded = self.vae.decode(self.vae.encode(images).latent_dist.mode()).sample
        error = ((decoded.float().clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
        self.log("psnr", (-10 * error.log10()).mean(), prog_bar=True)
        before, after = (
            ((self.teacher(x) > 0) * presence).sum() for x in (images, decoded.float())
        )
        self.log("recall_kept", after / before, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW under a one-cycle schedule."""
        return one_cycle(self, self.hparams["learning_rate"], self.hparams["steps"])
