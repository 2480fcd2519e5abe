"""The small CLIP of the embedded world, in open_clip's own class and folder format."""

from typing import Any

import lightning as L
import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from g4seg_pl.world.classifier import SceneClassifier, one_cycle
from g4seg_pl.world.scenes import CLASS_NAMES, IMAGE_SIZE
from g4seg_pl.world.text import CONTEXT_LENGTH, CaptionTokens

PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def clip_config(vocabulary_size: int) -> dict[str, Any]:
    """open_clip's model configuration: ViT of 4 layers, patches of 4 pixels, 16×16 image tokens."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": 4,
            "width": 128,
            "head_width": 32,
            "patch_size": 4,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary_size,
            "width": 64,
            "heads": 2,
            "layers": 1,
            "hf_tokenizer_name": "tokenizer",
            "tokenizer_kwargs": {"clean": "lower"},
        },
    }


def build_clip(vocabulary_size: int) -> open_clip.CLIP:
    """The CLIP with fresh weights (0.7 M parameters)."""
    return open_clip.CLIP(**clip_config(vocabulary_size))


class ClipTask(L.LightningModule):
    """Image–text training with a sigmoid over all class prompts of every image.

    A batch holds few different captions, so each image is paired with the prompts of all twelve
    classes, the present ones positive, instead of with the captions of its neighbours. A vision
    transformer learns next to nothing in this world's minutes from that alone, so its tokens also
    follow the feature maps of the judge, a convolutional network that learnt from the same
    image-level labels.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        judge_weights: dict[str, Tensor] | None = None,
        learning_rate: float = 1.5e-3,
        steps: int = 5000,
        distillation: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["tokenizer", "judge_weights"])
        self.clip = build_clip(len(tokenizer))
        self.clip.visual.output_tokens = True
        self.bias = nn.Parameter(torch.tensor(-4.0))
        tokens = CaptionTokens(tokenizer)
        ids = torch.tensor([tokens.ids(f"a photo of {name}") for name in CLASS_NAMES])
        self.register_buffer("prompts", ids, persistent=False)
        self.judge = SceneClassifier().eval().requires_grad_(False)
        if judge_weights is not None:
            self.judge.load_state_dict(judge_weights)
        channels = sum(self.judge.widths[-2:])
        self.follow = nn.Linear(self.clip.visual.transformer.width, channels)
        self.standard = nn.BatchNorm1d(channels, affine=False)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine of images and class prompts ``(B, 12)``, and the image tokens ``(B, N, D)``."""
        pooled, tokens = self.clip.visual(images)
        said = self.clip.encode_text(self.prompts, normalize=True)
        return F.normalize(pooled.float(), dim=-1) @ said.float().T, tokens

    def _judged(self, images: Tensor) -> Tensor:
        """The judge's last two maps on the token grid, standardised, ``(B, N, C)``."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            self.judge.eval()
            fine, coarse = self.judge.features(images)[-2:]
            coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear")
            maps = torch.cat([fine, coarse], 1).flatten(2)
            return self.standard(maps).transpose(1, 2)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss on ``(images, presence)``."""
        images, presence = batch
        similarity, tokens = self.encode(images)
        logits = similarity * self.clip.logit_scale.exp() + self.bias
        loss = F.binary_cross_entropy_with_logits(logits, presence)
        # A softmax between the classes too, so that zero-shot classification is trained as used.
        share = presence / presence.sum(1, keepdim=True)
        loss = loss + 0.2 * F.cross_entropy(logits, share)
        followed = F.smooth_l1_loss(self.follow(tokens).float(), self._judged(images))
        self.log_dict({"loss": loss, "followed": followed}, prog_bar=True)
        return loss + self.hparams["distillation"] * followed

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Share of images whose nearest prompt names a class that is present."""
        images, presence = batch
        best = self.encode(images)[0].argmax(1)
        self.log("top1", presence.gather(1, best[:, None]).mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW under a one-cycle schedule."""
        return one_cycle(self, self.hparams["learning_rate"], self.hparams["steps"])
