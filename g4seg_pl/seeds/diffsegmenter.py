"""DiffSegmenter: where the prompt's class name is attended to, spread by self-attention.

Wang et al., TIP 2025; the facts are those of VCG-team/DiffSegmenter @b3a8686
(``open_vocabulary/voc12/ptp_stable_best.py``, ``ptp_utils.py``):

- one pass of the conditional U-Net at t = 100, the image brought to the model's square bilinearly
  without smoothing, for each class with the prompt ``a photograph of {}``;
- cross-attention to the name's tokens, averaged over heads and layers of a resolution, brought to
  the finest one bilinearly, each by its minimum and maximum, and summed with weights
  0.3/0.5/0.1/0.1 from the coarsest (8, 16, 32, 64);
- times the finest self-attention of the same pass, averaged over heads and layers, once;
- normalisation: each class by its minimum and maximum at native size.

The name's tokens are emphasised by 1.21 (``++`` of compel): moved that much further from the empty
prompt's embedding. Names are the class list's: where the public code says plane, buses, table,
people, plant and monitor of VOC, give it a list of those. The public code draws the latent from its
posterior and the noise from the global generator, takes one token of most names, and adds a caption
by BLIP; here the latent is the posterior's mode, the noise comes from the image's name, all tokens
of the name count, and the prompt is the template alone.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from g4seg_pl.backbones.kinds import check_model
from g4seg_pl.backbones.loading import place_to_run, resolve_dtype
from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.core.background import PowerBackground, Threshold
from g4seg_pl.core.diffusion import add_noise, seeded_noise
from g4seg_pl.core.grounding import (
    LEVEL_WEIGHTS,
    cross_attention_map,
    spread_by_self_attention,
)
from g4seg_pl.core.resize import min_max, resize_maps
from g4seg_pl.seeds.base import SeedMaker, require_classes
from g4seg_pl.types import ConfigurationError, RefinedMask, Sample

# The public code guards no division; this one only keeps flat maps from becoming NaN.
GUARD = 1e-12


def emphasise(
    embeddings: Float[Tensor, "b l d"],
    empty: Float[Tensor, "1 l d"],
    tokens: Bool[Tensor, "b l"],
    weight: float,
) -> Float[Tensor, "b l d"]:
    """Return embeddings with the marked tokens moved away from the empty prompt's.

    Args:
        embeddings: of the prompts.
        empty: of the empty prompt.
        tokens: which to move.
        weight: 1 leaves them, 1.21 is compel's ``++``.
    """
    factors = torch.where(tokens, weight, 1.0)[..., None].to(embeddings)
    return empty + (embeddings - empty) * factors


class DiffSegmenter(SeedMaker):
    """DiffSegmenter's maps of the classes an image is known to have.

    Args:
        model: a diffusers folder or hub id of Stable Diffusion 1.x or 2.x.
        timestep: t.
        level_weights: of the resolutions of cross-attention, from the coarsest.
        prompt_template: with one ``{}``.
        emphasis: of the class name; 1 is none.
        seed: from which the noise derives, with the image's id.
        dtype: number format of the weights; ``auto`` is bfloat16 on a GPU, float32 elsewhere.
        masks_per_pass: classes that enter the U-Net at once: the bound on memory.
        variant: of the model's weight files, such as ``fp16``.
        revision: branch, tag or commit of a hub id.
        background: how the background is scored when label maps are made.
    """

    def __init__(
        self,
        model: str,
        timestep: int = 100,
        level_weights: list[float] | None = None,
        prompt_template: str = "a photograph of {}",
        emphasis: float = 1.21,
        seed: int = 0,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        masks_per_pass: int = 8,
        variant: str | None = None,
        revision: str | None = None,
        background: Threshold | PowerBackground | None = None,
    ) -> None:
        super().__init__(background)
        self.model, self.variant, self.revision = model, variant, revision
        self.timestep = timestep
        self.level_weights = LEVEL_WEIGHTS if level_weights is None else tuple(level_weights)
        self.prompt_template, self.emphasis = prompt_template, emphasis
        self.seed = seed
        self.number_format: Literal["auto", "float32", "bfloat16", "float16"] = dtype
        self.masks_per_pass = masks_per_pass
        self.generator: StableDiffusion | None = None

    def configuration(self) -> dict[str, object]:
        """The arguments, for the run record; ``dtype`` is a property of every LightningModule."""
        names = ("model", "timestep", "level_weights", "prompt_template", "emphasis", "seed")
        more = ("masks_per_pass", "variant", "revision", "background")
        kept = {name: getattr(self, name) for name in (*names, *more)}
        return kept | {"dtype": self.number_format}

    def setup(self, stage: str) -> None:
        """Refuse a model or classes that cannot work, before any weights are loaded."""
        super().setup(stage)
        if self._needs_loading(self.generator):
            check_model(self.model, self.revision, kinds=("stable_diffusion",))

    def configure_model(self) -> None:
        """Load the model, once."""
        if self._needs_loading(self.generator):
            dtype = resolve_dtype(self.number_format, place_to_run(self))
            self.generator = StableDiffusion.from_pretrained(
                self.model, dtype, self.variant, self.revision
            )

    def make(self, sample: Sample) -> RefinedMask:
        """Make one map a class of the image.

        Raises:
            BadItemError: the image has no image-level classes.
        """
        require_classes(sample)
        noisy = self._noisy(sample)
        names = sample.class_names
        parts = [
            names[start : start + self.masks_per_pass]
            for start in range(0, len(names), self.masks_per_pass)
        ]
        maps = torch.cat([self._maps(noisy, part) for part in parts])
        size = (sample.image.shape[1], sample.image.shape[2])
        return self.composed(sample, min_max(resize_maps(maps, size), GUARD))

    def _noisy(self, sample: Sample) -> Tensor:
        """z_t of the image at the model's size."""
        generator = self._loaded()
        side = generator.image_size
        pixels = functional.interpolate(
            sample.image[None].float() / 127.5 - 1, (side, side), mode="bilinear"
        )
        clean = generator.encode(pixels.to(self.device))
        noise = seeded_noise(clean.shape[1:], self.seed, sample.image_id, "")[None].to(clean)
        return add_noise(clean, noise, generator.alphas_cumprod, self.timestep)

    def _maps(self, noisy: Tensor, names: Sequence[str]) -> Tensor:
        """Maps of classes at the finest resolution."""
        generator = self._loaded()
        prompts = [self.prompt_template.format(name) for name in names]
        start = self.prompt_template.index("{}")
        tokens = torch.stack(
            [
                generator.token_mask(prompt, name, start)
                for prompt, name in zip(prompts, names, strict=True)
            ]
        ).to(noisy.device)
        embeddings = generator.embed(prompts)
        embeddings = emphasise(embeddings, generator.embed([""]), tokens, self.emphasis)
        batch = noisy.expand(len(names), -1, -1, -1)
        own, cross = generator.attention(batch, self.timestep, embeddings)
        return spread_by_self_attention(own, cross_attention_map(cross, tokens, self.level_weights))

    def _loaded(self) -> StableDiffusion:
        if self.generator is None:
            message = "the model is not loaded: use Trainer.predict, or call configure_model first"
            raise ConfigurationError(message)
        return self.generator
