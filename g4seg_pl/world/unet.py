"""The text-to-image U-Net of the embedded world, trained with its text encoder."""

import math
from pathlib import Path
from typing import cast

import lightning as L
import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextModel, CLIPTokenizer

from g4seg_pl.world.scenes import CLASS_NAMES
from g4seg_pl.world.text import TEXT_WIDTH, CaptionTokens, build_text_encoder

LATENT_SIZE = 16
GUIDE_CHANNELS, GUIDE_SIZE = 160, 8  # the teacher's last map

# What makes a folder a Stable Diffusion for diffusers.
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def build_unet() -> UNet2DConditionModel:
    """Three resolutions (16, 8, 4), cross-attention at each, fresh weights (5.9 M)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        layers_per_block=1,
        block_out_channels=(64, 96, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 3, 4),  # diffusers' name for the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's scaled-linear schedule, epsilon prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def draw_caption(presence: NDArray[np.uint8], rng: np.random.Generator) -> str:
    """A training caption: all classes in random order, one of them, or (1 in 10) nothing."""
    chance = rng.random()
    if chance < 0.1:
        return ""
    present = rng.permutation(np.flatnonzero(presence))
    if chance < 0.35:  # the refiner's own prompt names one class a pass
        present = present[:1]
    return "a photo of " + " and ".join(CLASS_NAMES[k] for k in present)


Shard = tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.uint8]]


class LatentBatches(torch.utils.data.IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """Endless random batches ``(latents, guides, token ids)``; shards encoded meanwhile join in."""

    def __init__(self, cache: Path, tokenizer: CLIPTokenizer, batch: int) -> None:
        self.cache = cache
        self.tokens = CaptionTokens(tokenizer)
        self.batch = batch

    def _shards(self) -> list[Shard]:
        files = sorted(self.cache.glob("latents_*.npy"))
        if not files:
            message = f"no latents in {self.cache}; run `python -m g4seg_pl.world.train latents`"
            raise FileNotFoundError(message)
        return [
            (
                np.load(file, mmap_mode="r"),
                np.load(file.with_name(file.name.replace("latents", "guides")), mmap_mode="r"),
                np.load(file.with_name(file.name.replace("latents", "scenes")), mmap_mode="r")[
                    :, -len(CLASS_NAMES) :
                ],
            )
            for file in files
        ]

    def __iter__(self) -> "LatentBatches":
        """Restart with a fresh random state."""
        self.rng = np.random.default_rng()
        self.served = 0
        return self

    def __next__(self) -> tuple[Tensor, Tensor, Tensor]:
        """One batch: latents ``(B, 4, 16, 16)``, guides ``(B, 160, 8, 8)``, ids ``(B, L)``."""
        if self.served % 1000 == 0:
            self.shards = self._shards()
        self.served += 1
        latents, guides, presence = self.shards[int(self.rng.integers(len(self.shards)))]
        rows = np.sort(self.rng.choice(len(latents), self.batch, replace=False))
        captions = [draw_caption(flags, self.rng) for flags in presence[rows]]
        ids = torch.tensor([self.tokens.ids(caption) for caption in captions])
        return torch.from_numpy(latents[rows]).float(), torch.from_numpy(guides[rows]).float(), ids


class TextToLatent(nn.Module):
    """U-Net and text encoder as one module, so that one average covers both."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = build_unet()
        # Explicit attention: the fused kernel's backward is slower at these sizes on a CPU.
        self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder = build_text_encoder(tokenizer)
        self.end_of_text = int(tokenizer.eos_token_id)
        channels = self.unet.config.block_out_channels[1]
        self.guide = nn.Sequential(
            nn.Conv2d(channels, 256, 1), nn.SiLU(), nn.Conv2d(256, GUIDE_CHANNELS, 1)
        )
        self._middle: Tensor | None = None
        self.unet.down_blocks[1].attentions[0].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        self._middle = output[0]

    def forward(
        self, noisy: Tensor, timesteps: Tensor, ids: Tensor, hide_padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predicted noise, and the guess at the teacher's map from the middle of the way down.

        ``hide_padding`` (B,) bool masks what follows the end of the text.
        """
        words = self.text_encoder(ids).last_hidden_state
        end = (ids == self.end_of_text).int().cumsum(1)
        keep = (end <= 1) & ((end == 0) | ((end == 1) & (ids == self.end_of_text)))
        visible = keep | ~hide_padding[:, None]
        predicted: Tensor = self.unet(
            noisy, timesteps, encoder_hidden_states=words, encoder_attention_mask=visible
        ).sample
        guessed: Tensor = self.guide(self._middle)
        return predicted, guessed


@torch.no_grad()
def warm_average(
    averages: tuple[Tensor, ...] | list[Tensor],
    weights: tuple[Tensor, ...] | list[Tensor],
    count: Tensor | int,
    decay: float = 0.9995,
) -> None:
    """Move averages towards weights in place, faster at first, in the signature of AveragedModel.

    At update n the decay is (1 + n) / (10 + n) at most, so that the start, which a short run would
    else keep a large part of, is soon forgotten.
    """
    updates = int(count)
    step = 1 - min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(averages, weights, step)


class UNetTask(L.LightningModule):
    """Denoising at uniform timesteps; warm-up, constant rate, then a cosine to zero; EMA.

    The squared error in ε is weighted by 1/ᾱ up to ``most_weight``, as the error in v would be: at
    high noise, where the picture's content is decided, the text is what makes the difference.

    The features half-way down also follow those of the recipe's teacher (a classifier that learnt
    from the same image-level labels) on the clean picture, which makes a diffusion model learn
    what things are many times sooner (REPA, Yu et al., ICLR 2025).
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        learning_rate: float = 8e-4,
        steps: int = 20_000,
        compile_model: bool = False,
        guidance: float = 0.2,
        most_weight: float = 8.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["tokenizer"])
        self.model = TextToLatent(tokenizer).to(memory_format=torch.channels_last)
        self.average = AveragedModel(self.model, multi_avg_fn=warm_average)
        self.average.requires_grad_(False)
        self.run_model = torch.compile(self.model) if compile_model else self.model
        self.alphas: Tensor
        self.register_buffer("alphas", build_scheduler().alphas_cumprod, persistent=False)

    def start_from(self, folder: Path) -> None:
        """Take over the weights of a diffusers folder, for the model and its average."""
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        for model in (self.model, cast(TextToLatent, self.average.module)):
            model.unet.load_state_dict(unet.state_dict())
            model.text_encoder.load_state_dict(text_encoder.state_dict())

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Loss on ``(latents, guides, ids)``.

        Half of the samples cannot see their padding: else a small model reads the whole sentence
        from there and its class tokens never learn to point at their things.
        """
        latents, guides, ids = batch
        hide = torch.rand(len(latents), device=latents.device) < 0.5
        timesteps = torch.randint(0, len(self.alphas), (len(latents),), device=latents.device)
        noise = torch.randn_like(latents)
        level = self.alphas[timesteps][:, None, None, None]
        noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted, guessed = self.run_model(noisy, timesteps, ids, hide)
        squares = (predicted.float() - noise).square()
        # The noise alone is easily guessed where there is most of it, but there the words count.
        weighted = ((1 / level).clamp(max=self.hparams["most_weight"]) * squares).mean()
        loss = squares.mean()
        followed = 1 - F.cosine_similarity(guessed.float(), guides, dim=1).mean()
        parts = {"loss": loss, "weighted": weighted, "followed": followed}
        self.log_dict(parts, prog_bar=True)
        total: Tensor = weighted + self.hparams["guidance"] * followed
        return total

    def on_train_batch_end(self, *_: object) -> None:
        """Move the average."""
        self.average.update_parameters(self.model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, 500 steps of warm-up, the last third annealed to zero."""
        steps = self.hparams["steps"]

        def rate(step: int) -> float:
            past = max(0.0, (step - 0.67 * steps) / (0.33 * steps))
            return min(1.0, (step + 1) / 500) * 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))

        weights = self.model.parameters()
        optimizer = torch.optim.AdamW(
            weights,
            lr=self.hparams["learning_rate"],
            betas=(0.9, 0.99),
            weight_decay=0.01,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
