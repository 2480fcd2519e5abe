"""The contestant ``plain``: the paper read line by line, in float32, one class at a time.

Nothing is shared between the classes of an image, every attention matrix is formed, and the match
compares all locations with all. It is what a first implementation looks like, it is checked to give
g4seg's masks, and it serves for nothing else.
"""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from g4seg_pl.bench.models import ModelFolders
from g4seg_pl.core.diffusion import seeded_noise
from g4seg_pl.core.steps import Correspondence
from g4seg_pl.features.base import CLIP_MEAN, CLIP_STD
from g4seg_pl.types import Sample


class ExplicitInjection:
    """softmax((QKᵀ + wA)/√d)·V with A_cross and A_self written out (Eq. 3-5)."""

    def __init__(
        self, mask: Float[Tensor, "H W"], tokens: Float[Tensor, " l"], weight: float
    ) -> None:
        """Remember the class.

        Args:
            mask: S.
            tokens: 1 at the class's tokens in the prompt.
            weight: w.
        """
        self.mask, self.tokens, self.weight = mask, tokens, weight

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "1 n c"],
        encoder_hidden_states: Float[Tensor, "1 l d"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "1 n c"]:
        """Return the layer's output."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(context))
        value = attn.head_to_batch_dim(attn.to_v(context))
        side = math.isqrt(query.shape[1])
        coarse = functional.adaptive_avg_pool2d(self.mask[None, None], (side, side))
        inside = (coarse.flatten() >= 0.5).float()
        other = inside if encoder_hidden_states is None else self.tokens
        injected = inside[:, None] * other[None, :]
        logits = (query @ key.transpose(1, 2) + self.weight * injected) / query.shape[2] ** 0.5
        mixed = attn.batch_to_head_dim(logits.softmax(-1) @ value)
        return torch.as_tensor(attn.to_out[0](mixed))


class Plain:
    """The paper's update for one image, class after class."""

    def __init__(self, models: ModelFolders, device: torch.device, seed: int = 0) -> None:
        """Load everything in float32.

        Args:
            models: generator and image encoder.
            device: where to run.
            seed: of the run.
        """
        folder, full = str(models.generator), {"torch_dtype": torch.float32}
        self.device, self.seed, self.step = device, seed, Correspondence()
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **full)
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", **full)
        self.text = CLIPTextModel.from_pretrained(
            folder, subfolder="text_encoder", dtype=torch.float32
        )
        self.clip = CLIPVisionModelWithProjection.from_pretrained(
            str(models.clip), dtype=torch.float32
        )
        for network in (self.unet, self.vae, self.text, self.clip):
            network.to(device).eval().requires_grad_(requires_grad=False)
        self.tokenizer = CLIPTokenizer.from_pretrained(str(Path(folder) / "tokenizer"))
        self.alphas = DDIMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
        self.side = (
            2 ** (len(self.vae.config.block_out_channels) - 1) * self.unet.config.sample_size
        )

    @torch.inference_mode()
    def refine(self, sample: Sample) -> Float[Tensor, "k h w"]:
        """Return the refined masks of an image at its own size.

        Args:
            sample: the image with its seed.
        """
        pairs = zip(sample.class_names, sample.seed.scores, strict=True)
        return torch.stack([self._one_class(sample, name, seed) for name, seed in pairs])

    def _one_class(self, sample: Sample, name: str, seed: Float[Tensor, "h w"]) -> Tensor:
        size = (self.side, self.side)
        image = _resized(sample.image[None].float() / 127.5 - 1, size).clamp(-1, 1)
        mask = _resized(seed[None, None], size)[0, 0].clamp(0, 1)
        image, mask = image.to(self.device), mask.to(self.device)
        generated = self._generate(image, mask, sample.image_id, name)
        refined = self._align(mask, self._features(image), self._features(generated))
        change = _resized((refined - mask)[None, None].cpu(), (seed.shape[0], seed.shape[1]))
        return (seed + change[0, 0]).clamp(0, 1)

    def _generate(self, image: Tensor, mask: Tensor, image_id: str, name: str) -> Tensor:
        """x̃₀: noise once, denoise once with the mask injected, decode (Eq. 2-5)."""
        factor = self.vae.config.scaling_factor
        clean = self.vae.encode(image).latent_dist.mode() * factor
        noise = seeded_noise(clean.shape[1:], self.seed, image_id, name)[None].to(clean)
        alpha = float(self.alphas[self.step.timestep])
        noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
        prompt = f"A photo of {name}"
        told, tokens = self._embed(prompt), self._tokens_of(name, prompt)
        injection = ExplicitInjection(mask, tokens, self.step.injection_weight)
        self.unet.set_attn_processor(injection)
        predicted = self.unet(noisy, self.step.timestep, told).sample
        estimate = (noisy - (1 - alpha) ** 0.5 * predicted) / alpha**0.5
        return torch.as_tensor(self.vae.decode(estimate / factor).sample).clamp(-1, 1)

    def _align(
        self, mask: Tensor, original: Float[Tensor, "c h w"], generated: Float[Tensor, "c h w"]
    ) -> Tensor:
        """S* = βS + (1-β)S[δ] for pixels of uncertain S (Eq. 8-9)."""
        grid = (original.shape[1], original.shape[2])
        offered = functional.normalize(original.flatten(1), dim=0)
        wanted = functional.normalize(generated.flatten(1), dim=0)
        match = (wanted.T @ offered).argmax(1)
        coarse = functional.adaptive_avg_pool2d(mask[None, None], grid)[0, 0]
        moved = (coarse.flatten()[match] - coarse.flatten()).view(1, 1, *grid)
        change = functional.interpolate(moved, mask.shape, mode="bilinear")[0, 0]
        low, high = self.step.confidence_range or (0.0, 1.0)
        uncertain = (mask >= low) & (mask <= high)
        return (mask + (1 - self.step.beta) * change * uncertain).clamp(0, 1)

    def _features(self, image: Float[Tensor, "1 3 H W"]) -> Float[Tensor, "c h w"]:
        """F: CLIP's patch tokens in the joint space."""
        patch = self.clip.config.patch_size
        count = round(self.side / patch)
        fitted = image
        if count * patch != self.side:
            fitted = _resized(image, (count * patch, count * patch))
        mean, spread = (image.new_tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
        normal = ((fitted + 1) / 2 - mean) / spread
        states = self.clip.vision_model(normal, interpolate_pos_encoding=True).last_hidden_state
        joint = self.clip.visual_projection(self.clip.vision_model.post_layernorm(states[:, 1:]))
        return torch.as_tensor(joint[0].T).reshape(-1, count, count)

    def _embed(self, prompt: str) -> Tensor:
        ids = torch.tensor([self._ids(prompt)], device=self.device)
        return torch.as_tensor(self.text(ids)[0])

    def _tokens_of(self, name: str, prompt: str) -> Float[Tensor, " l"]:
        ids, wanted = self._ids(prompt), self.tokenizer(name, add_special_tokens=False)["input_ids"]
        spans = range(len(ids) - len(wanted))
        start = next(i for i in spans if ids[i : i + len(wanted)] == wanted)
        marks = torch.zeros(len(ids), device=self.device)
        marks[start : start + len(wanted)] = 1
        return marks

    def _ids(self, prompt: str) -> list[int]:
        length = self.text.config.max_position_embeddings
        ids: list[int] = self.tokenizer(prompt, padding="max_length", max_length=length)[
            "input_ids"
        ]
        return ids


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[2:]) == size:
        return maps
    return functional.interpolate(maps, size, mode="bilinear", antialias=True)
