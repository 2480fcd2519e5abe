"""The small CLIP of the embedded world, in open_clip's own class and folder format."""

from typing import Any

import lightning as L
import open_clip
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import CLIPTokenizer

from g4seg_pl.world.classifier import SceneClassifier, one_cycle, training_precision
from g4seg_pl.world.scenes import CLASS_NAMES, IMAGE_SIZE
from g4seg_pl.world.text import CONTEXT_LENGTH, CaptionTokens

PATCH = 8
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def clip_config(vocabulary_size: int) -> dict[str, Any]:
    """open_clip's model configuration: ViT of 4 layers, 8×8 image tokens."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": 4,
            "width": 128,
            "head_width": 32,
            "patch_size": PATCH,
            "mlp_ratio": 2.0,
            "pool_type": "avg",  # learns much sooner than a class token
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
    clip = open_clip.CLIP(**clip_config(vocabulary_size))
    with torch.no_grad():
        positions = clip.visual.positional_embedding
        positions[1:] = _sine_positions(IMAGE_SIZE // PATCH, positions.shape[1]) * 0.1
    return clip


def _sine_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, ``(side², width)``: neighbours start out alike."""
    octaves = 2 ** torch.linspace(0, 3, width // 4) * torch.pi / side
    angles = torch.arange(side)[:, None] * octaves
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def fused(teacher: SceneClassifier) -> SceneClassifier:
    """The teacher with its norms folded into its convolutions, in bf16 where that is fast.

    On a CPU with AVX-512 that takes a third of the time.
    """
    quick = SceneClassifier()
    quick.load_state_dict(teacher.state_dict())
    quick.eval().requires_grad_(False)
    for stage in quick.stages:
        assert isinstance(stage, nn.Sequential)
        for at in (0, 3):
            convolution, norm = stage[at], stage[at + 1]
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            stage[at], stage[at + 1] = fuse_conv_bn_eval(convolution, norm), nn.Identity()
    fast = training_precision(gpu=torch.cuda.is_available()) == "bf16-mixed"
    quick = quick.to(torch.bfloat16 if fast else torch.float32)
    return quick.to(memory_format=torch.channels_last)


class ClipTask(L.LightningModule):
    """Image–text training with a sigmoid over all class prompts of every image.

    A batch holds few different captions, so each image is paired with the prompts of all twelve
    classes, the present ones positive, instead of with the captions of its neighbours. A vision
    transformer learns next to nothing in this world's minutes from that alone, so its tokens also
    follow the teacher, a convolutional network that learnt from the same image-level labels: its
    feature maps, and at each place its logits of the classes, which the tokens must give when they
    are compared with the texts.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        teacher: SceneClassifier | None = None,
        learning_rate: float = 1.5e-3,
        steps: int = 5000,
        distillation: float = 2.0,
        compile_model: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["tokenizer", "teacher"])
        self.clip = build_clip(len(tokenizer))
        self.clip.visual.output_tokens = True
        self.run_visual = torch.compile(self.clip.visual) if compile_model else self.clip.visual
        self.bias = nn.Parameter(torch.tensor(-4.0))
        self.place_bias = nn.Parameter(torch.tensor(-4.0))
        tokens = CaptionTokens(tokenizer)
        ids = torch.tensor([tokens.ids(f"a photo of {name}") for name in CLASS_NAMES])
        self.register_buffer("prompts", ids, persistent=False)
        self.teacher = fused(teacher or SceneClassifier())
        channels = sum(self.teacher.widths[-2:])
        self.follow = nn.Linear(self.clip.visual.transformer.width, channels)
        self.standard = nn.BatchNorm1d(channels, affine=False)
        # At first all images share one direction, and cosines tell nothing apart: a plain head on
        # standardised tokens gets the classes in, and the text follows. It is thrown away.
        width = self.clip.visual.transformer.width
        self.helper = nn.Sequential(
            nn.BatchNorm1d(2 * width, affine=False), nn.Linear(2 * width, len(CLASS_NAMES))
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines with the class prompts of images ``(B, 12)`` and tokens ``(B, N, 12)``; tokens.

        The tokens themselves are ``(B, N, D)``, before the projection.
        """
        pooled, tokens = self.run_visual(images)
        said = self.clip.encode_text(self.prompts, normalize=True).float()
        joint = F.normalize((tokens @ self.clip.visual.proj).float(), dim=-1)
        return F.normalize(pooled.float(), dim=-1) @ said.T, joint @ said.T, tokens

    def _taught(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher on the token grid: its maps, standardised, ``(B, N, C)``; its logits / 4."""
        side = IMAGE_SIZE // PATCH
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            dtype = self.teacher.head.weight.dtype
            pictures = images.to(dtype, memory_format=torch.channels_last)
            fine, coarse = self.teacher.eval().features(pictures)[-2:]
            maps = torch.cat([F.adaptive_avg_pool2d(each, side) for each in (fine, coarse)], 1)
            standard: Tensor = self.standard(maps.flatten(2).float())
            logits: Tensor = self.teacher.head(coarse.flatten(2).transpose(1, 2)).float()
        return standard.transpose(1, 2), logits.clamp(-8, 24) / 4

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss on ``(images, presence)``."""
        images, presence = batch
        similarity, dense, tokens = self.encode(images)
        scale = self.clip.logit_scale.exp()
        logits = similarity * scale + self.bias
        loss = F.binary_cross_entropy_with_logits(logits, presence)
        # A softmax between the classes too, so that zero-shot classification is trained as used.
        share = presence / presence.sum(1, keepdim=True)
        loss = loss + 0.2 * F.cross_entropy(logits, share)
        whole = torch.cat([tokens.mean(1), tokens.amax(1)], dim=1).float()
        helped = F.binary_cross_entropy_with_logits(self.helper(whole), presence)
        maps, places = self._taught(images)
        followed = F.smooth_l1_loss(self.follow(tokens).float(), maps)
        placed = F.smooth_l1_loss((dense * scale + self.place_bias) / 4, places)
        self.log_dict(
            {"loss": loss, "followed": followed, "placed": placed, "helped": helped}, prog_bar=True
        )
        total: Tensor = loss + helped + self.hparams["distillation"] * (followed + placed)
        return total

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Share of images whose nearest prompt names a class that is present."""
        images, presence = batch
        best = self.encode(images)[0].argmax(1)
        self.log("top1", presence.gather(1, best[:, None]).mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW under a one-cycle schedule."""
        return one_cycle(self, self.hparams["learning_rate"], self.hparams["steps"])
