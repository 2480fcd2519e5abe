"""Stable Diffusion 1.x and 2.x, and LCMs with their layout, as a Generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from jaxtyping import Bool, Float
from torch import Tensor, nn

from g4seg_pl.backbones.attention import (
    InjectedProcessor,
    Processor,
    attention_layers,
    checkpointed,
    installed,
    record_attention,
    token_grids,
)
from g4seg_pl.backbones.guidance import guidance_embedding
from g4seg_pl.backbones.kinds import Kind
from g4seg_pl.backbones.loading import Components, load_components
from g4seg_pl.backbones.text import mark_tokens, tokenise
from g4seg_pl.core.injection import Injection
from g4seg_pl.core.layout import in_slices, laid_out
from g4seg_pl.core.protocols import AttentionRecord, PredictionType
from g4seg_pl.types import ConfigurationError


@dataclass(frozen=True)
class Conditions:
    """What a U-Net, or a ControlNet beside it, is told beside the noisy latent and the timestep.

    Attributes:
        text: one row of tokens a prompt.
        added: diffusers' ``added_cond_kwargs``; None where the model has none.
    """

    text: Float[Tensor, "b l d"]
    added: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds to the U-Net's skip connections and to its middle block.

    Attributes:
        down: one tensor a skip connection, in order.
        middle: for the middle block.
    """

    down: tuple[Tensor, ...]
    middle: Tensor


class StableDiffusion(nn.Module):
    """The U-Net, autoencoder and text encoder of one model, frozen, as submodules.

    ``decoder`` is an AutoencoderTiny that decodes in place of the autoencoder, or None.

    Latents are float32 (or whatever the caller gives ``denoise``) outside the networks, whatever
    number format the weights have.
    """

    _kind: Kind = "stable_diffusion"

    _alphas_cumprod: Tensor

    def __init__(self, components: Components, embedded_guidance: float = 0.0) -> None:
        """Take loaded parts; they are frozen, set to evaluation and laid out channels last.

        Args:
            components: as ``load_components`` returns them.
            embedded_guidance: w, which an LCM's U-Net is told with the timestep; diffusers'
                guidance scale less 1, so that 0 is no guidance.

        Raises:
            ConfigurationError: the U-Net is not made for square latents, or it has no place for
                the guidance given.
        """
        super().__init__()
        self.unet = components.unet.to(memory_format=torch.channels_last)
        self.vae = components.vae.to(memory_format=torch.channels_last)
        tiny = components.decoder
        self.decoder: AutoencoderTiny | None = None
        if tiny is not None:
            self.decoder = tiny.to(memory_format=torch.channels_last)
        self.text_encoder = components.text_encoder
        self.tokenizer = components.tokenizer
        schedule = components.scheduler
        self._prediction_type: PredictionType = schedule.config.prediction_type
        self.register_buffer("_alphas_cumprod", schedule.alphas_cumprod.float(), persistent=False)
        self._image_size = _image_size(components)
        self.embedded_guidance = _checked_guidance(components, embedded_guidance)
        self.eval().requires_grad_(requires_grad=False)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        revision: str | None = None,
        embedded_guidance: float = 0.0,
        decoder: str | None = None,
    ) -> "StableDiffusion":
        """Load from a diffusers folder or hub id.

        Args:
            model: the folder or hub id.
            dtype: number format of the weights; float16 may overflow in Stable Diffusion 2.x.
            variant: the weight files' variant, such as ``fp16``.
            revision: branch, tag or commit of a hub id.
            embedded_guidance: w of an LCM; 0 is no guidance.
            decoder: folder or hub id of an AutoencoderTiny that decodes instead of the model's
                own autoencoder.

        Raises:
            ConfigurationError: a part is missing or of another kind of model.
        """
        components = load_components(model, dtype, variant, revision, (cls._kind,), decoder)
        return cls(components, embedded_guidance)

    @property
    def image_size(self) -> int:
        """Side of the square the model was made for, in pixels."""
        return self._image_size

    @property
    def prediction_type(self) -> PredictionType:
        """What ``denoise`` returns, as the model's own scheduler configuration says."""
        return self._prediction_type

    @property
    def alphas_cumprod(self) -> Float[Tensor, " t"]:
        """The schedule's ᾱ_t, float32, on the networks' device."""
        return self._alphas_cumprod

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return the scaled mode of the latent posterior, float32.

        Args:
            images: in [-1, 1]; sides are multiples of the autoencoder's factor.
        """
        config = self.vae.config
        modes = in_slices(self._mode, images, images.shape[2] * images.shape[3])
        return (modes - (config.shift_factor or 0)) * float(config.scaling_factor)

    def _mode(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode(_laid_out(images, self.vae)).latent_dist
        return _at_least_float32(posterior.mode())

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Return float32 images clamped to [-1, 1].

        Args:
            latents: scaled, as ``encode`` returns them.
        """
        height, width = (side * self._factor for side in latents.shape[2:])
        return in_slices(self._decode, latents, height * width)

    def _decode(self, latents: Tensor) -> Tensor:
        network: AutoencoderKL | AutoencoderTiny = (
            self.vae if self.decoder is None else self.decoder
        )
        # Each by its own numbers: a tiny decoder's scaling factor is 1.
        config = network.config
        unscaled = latents / config.scaling_factor + (config.shift_factor or 0)
        images: Tensor = network.decode(_laid_out(unscaled, network)).sample
        return _at_least_float32(images).clamp(-1, 1)

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Return the text encoder's last hidden states, one row a prompt.

        Raises:
            ConfigurationError: a prompt has more tokens than the model reads.
        """
        ids = torch.stack([tokenise(self.tokenizer, each, self._length) for each in prompts])
        embeddings: Tensor = self.text_encoder(ids.to(self.alphas_cumprod.device))[0]
        return embeddings

    def token_mask(self, prompt: str, name: str, start: int = 0) -> Bool[Tensor, " l"]:
        """Mark the tokens of the first ``name`` in ``prompt`` at or after character ``start``.

        Args:
            prompt: as given to ``embed``.
            name: a class name; it may span several tokens.
            start: where to begin; at a word's beginning.

        Raises:
            ConfigurationError: the name is empty or not in the prompt.
        """
        return mark_tokens(self.tokenizer, prompt, name, start, self._length)

    def denoise(
        self,
        noisy: Float[Tensor, "b c h w"],
        timestep: int,
        embeddings: Float[Tensor, "b l d"],
        injection: Injection | None = None,
        *,
        checkpointing: bool = False,
        residuals: Residuals | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the raw output of one U-Net pass, in the dtype of ``noisy``.

        Without an active injection or residuals the U-Net is called untouched.

        Args:
            noisy: z_t, of any height and width.
            timestep: t.
            embeddings: one prompt a row.
            injection: masks and tokens of the same rows.
            checkpointing: keep few activations for a gradient taken later, and compute the
                others again, the injection included.
            residuals: of a ControlNet.
        """
        layers: dict[str, Processor] = {}
        if injection is not None and injection.active:
            processor = InjectedProcessor(injection, self._grids(noisy))
            layers = {name: processor for name, _ in attention_layers(self.unet)}
        within = checkpointed if checkpointing else installed
        with within(self.unet, layers):
            return self._call_unet(noisy, timestep, embeddings, residuals)

    def self_attention(
        self, noisy: Float[Tensor, "b c h w"], timestep: int, embeddings: Float[Tensor, "b l d"]
    ) -> list[AttentionRecord]:
        """Return queries and keys of every self-attention layer of one pass, in order.

        The pass ends with the last of them.

        Args:
            noisy: z_t, of any height and width.
            timestep: t.
            embeddings: one prompt a row.
        """
        return self._record_attention(noisy, timestep, embeddings, cross=False)[0]

    def attention(
        self, noisy: Float[Tensor, "b c h w"], timestep: int, embeddings: Float[Tensor, "b l d"]
    ) -> tuple[list[AttentionRecord], list[AttentionRecord]]:
        """Return queries and keys of every self- and of every cross-attention layer of one pass.

        The pass ends with the last of them.

        Args:
            noisy: z_t, of any height and width.
            timestep: t.
            embeddings: one prompt a row.
        """
        return self._record_attention(noisy, timestep, embeddings, cross=True)

    def _record_attention(
        self, noisy: Tensor, timestep: int, embeddings: Tensor, *, cross: bool
    ) -> tuple[list[AttentionRecord], list[AttentionRecord]]:
        run = partial(self._call_unet, noisy, timestep, embeddings)
        return record_attention(self.unet, self._grids(noisy), run, cross=cross)

    def conditions(
        self, noisy: Float[Tensor, "b c h w"], embeddings: Float[Tensor, "b l d"]
    ) -> Conditions:
        """Return what the U-Net is told, in its number format.

        Args:
            noisy: z_t.
            embeddings: as ``embed`` returns them.
        """
        return Conditions(embeddings.to(self._number_format))

    def _call_unet(
        self,
        noisy: Tensor,
        timestep: int,
        embeddings: Tensor,
        residuals: Residuals | None = None,
    ) -> Tensor:
        sample = _laid_out(noisy, self.unet)
        told = self.conditions(noisy, embeddings)
        output: Tensor = self.unet(
            sample,
            timestep,
            told.text,
            timestep_cond=self._timestep_condition(sample),
            added_cond_kwargs=told.added,
            down_block_additional_residuals=None if residuals is None else residuals.down,
            mid_block_additional_residual=None if residuals is None else residuals.middle,
            return_dict=False,
        )[0]
        return output.to(noisy.dtype)

    def _timestep_condition(self, sample: Tensor) -> Tensor | None:
        size = self.unet.config.time_cond_proj_dim
        if size is None:
            return None
        return guidance_embedding(self.embedded_guidance, size).expand(len(sample), -1).to(sample)

    @property
    def _number_format(self) -> torch.dtype:
        dtype: torch.dtype = next(self.unet.parameters()).dtype
        return dtype

    @property
    def _length(self) -> int:
        """How many tokens the text encoder reads."""
        return int(self.text_encoder.config.max_position_embeddings)

    def _grids(self, noisy: Tensor) -> dict[int, tuple[int, int]]:
        levels = len(self.unet.config.block_out_channels)
        return token_grids(noisy.shape[2], noisy.shape[3], levels)

    @property
    def _factor(self) -> int:
        """Pixels of an image beside each other that one of a latent stands for."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


def _laid_out(tensor: Tensor, network: nn.Module) -> Tensor:
    return laid_out(tensor, next(network.parameters()))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _image_size(components: Components) -> int:
    side = components.unet.config.sample_size
    if not isinstance(side, int):
        message = f"unet/config.json: sample_size is {side}; only square models are supported"
        raise ConfigurationError(message)
    return int(side * 2 ** (len(components.vae.config.block_out_channels) - 1))


def _checked_guidance(components: Components, guidance: float) -> float:
    if guidance and components.unet.config.time_cond_proj_dim is None:
        message = (
            f"embedded_guidance is {guidance}, but the unet has no time_cond_proj_dim; only LCMs "
            "take it, for others set guidance_scale of an update step"
        )
        raise ConfigurationError(message)
    return guidance
