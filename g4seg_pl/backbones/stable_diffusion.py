"""Stable Diffusion 1.x and 2.x as a Generator."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from g4seg_pl.backbones.attention import (
    InjectedProcessor,
    Processor,
    RecordingProcessor,
    attention_layers,
    checkpointed,
    installed,
    token_grids,
)
from g4seg_pl.backbones.loading import Components, load_components
from g4seg_pl.core.injection import Injection
from g4seg_pl.core.protocols import AttentionRecord, PredictionType
from g4seg_pl.types import ConfigurationError


class StableDiffusion(nn.Module):
    """The U-Net, autoencoder and text encoder of one model, frozen, as submodules.

    Latents are float32 (or whatever the caller gives ``denoise``) outside the networks, whatever
    number format the weights have.
    """

    alphas_cumprod: Tensor

    def __init__(self, components: Components) -> None:
        """Take loaded parts; they are frozen, set to evaluation and laid out channels last.

        Args:
            components: as ``load_components`` returns them.

        Raises:
            ConfigurationError: the U-Net is not made for square latents.
        """
        super().__init__()
        self.unet = components.unet.to(memory_format=torch.channels_last)
        self.vae = components.vae.to(memory_format=torch.channels_last)
        self.text_encoder = components.text_encoder
        self.tokenizer = components.tokenizer
        schedule = components.scheduler
        self._prediction_type: PredictionType = schedule.config.prediction_type
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod.float(), persistent=False)
        self._image_size = _image_size(components)
        self.eval().requires_grad_(requires_grad=False)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        revision: str | None = None,
    ) -> "StableDiffusion":
        """Load from a diffusers folder or hub id.

        Args:
            model: the folder or hub id.
            dtype: number format of the weights; float16 may overflow in Stable Diffusion 2.x.
            variant: the weight files' variant, such as ``fp16``.
            revision: branch, tag or commit of a hub id.

        Raises:
            ConfigurationError: a part is missing or of another kind of model.
        """
        return cls(load_components(model, dtype, variant, revision))

    @property
    def image_size(self) -> int:
        """Side of the square the model was made for, in pixels."""
        return self._image_size

    @property
    def prediction_type(self) -> PredictionType:
        """What ``denoise`` returns, as the model's own scheduler configuration says."""
        return self._prediction_type

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return the scaled mode of the latent posterior, float32.

        Args:
            images: in [-1, 1]; sides are multiples of the autoencoder's factor.
        """
        config = self.vae.config
        posterior = self.vae.encode(self._laid_out(images, self.vae)).latent_dist
        latents = _at_least_float32(posterior.mode())
        return (latents - (config.shift_factor or 0)) * float(config.scaling_factor)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Return float32 images clamped to [-1, 1].

        Args:
            latents: scaled, as ``encode`` returns them.
        """
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (config.shift_factor or 0)
        images: Tensor = self.vae.decode(self._laid_out(unscaled, self.vae)).sample
        return _at_least_float32(images).clamp(-1, 1)

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Return the text encoder's last hidden states, one row a prompt.

        Raises:
            ConfigurationError: a prompt has more tokens than the model reads.
        """
        ids = torch.stack([self._tokenise(prompt) for prompt in prompts])
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
        ids = self._tokenise(prompt).tolist()
        wanted = self._words(name)
        first = 1 + len(self._words(prompt[:start]))
        mask = torch.zeros(len(ids), dtype=torch.bool)
        for place in range(first, len(ids) - len(wanted) + 1):
            if wanted and ids[place : place + len(wanted)] == wanted:
                mask[place : place + len(wanted)] = True
                return mask
        message = f"class name {name!r} is not in the prompt {prompt[start:]!r}; name it there"
        raise ConfigurationError(message)

    def denoise(
        self,
        noisy: Float[Tensor, "b c h w"],
        timestep: int,
        embeddings: Float[Tensor, "b l d"],
        injection: Injection | None = None,
        *,
        checkpointing: bool = False,
    ) -> Float[Tensor, "b c h w"]:
        """Return the raw output of one U-Net pass, in the dtype of ``noisy``.

        Without an active injection the U-Net is called untouched.

        Args:
            noisy: z_t, of any height and width.
            timestep: t.
            embeddings: one prompt a row.
            injection: masks and tokens of the same rows.
            checkpointing: keep few activations for a gradient taken later, and compute the
                others again, the injection included.
        """
        layers: dict[str, Processor] = {}
        if injection is not None and injection.active:
            processor = InjectedProcessor(injection, self._grids(noisy))
            layers = {name: processor for name, _ in attention_layers(self.unet)}
        within = checkpointed if checkpointing else installed
        with within(self.unet, layers):
            return self._call_unet(noisy, timestep, embeddings)

    def self_attention(
        self, noisy: Float[Tensor, "b c h w"], timestep: int, embeddings: Float[Tensor, "b l d"]
    ) -> list[AttentionRecord]:
        """Return queries and keys of every self-attention layer of one pass, in order.

        Args:
            noisy: z_t, of any height and width.
            timestep: t.
            embeddings: one prompt a row.
        """
        records: list[AttentionRecord] = []
        grids = self._grids(noisy)
        layers = {
            name: RecordingProcessor(name, grids, records)
            for name, _ in attention_layers(self.unet)
        }
        with installed(self.unet, layers):
            self._call_unet(noisy, timestep, embeddings)
        return records

    def _call_unet(self, noisy: Tensor, timestep: int, embeddings: Tensor) -> Tensor:
        sample = self._laid_out(noisy, self.unet)
        text = embeddings.to(sample.dtype)
        output: Tensor = self.unet(sample, timestep, text, return_dict=False)[0]
        return output.to(noisy.dtype)

    def _grids(self, noisy: Tensor) -> dict[int, tuple[int, int]]:
        levels = len(self.unet.config.block_out_channels)
        return token_grids(noisy.shape[2], noisy.shape[3], levels)

    def _laid_out(self, tensor: Tensor, network: nn.Module) -> Tensor:
        weight = next(network.parameters())
        return tensor.to(weight).contiguous(memory_format=torch.channels_last)

    def _tokenise(self, prompt: str) -> Int[Tensor, " l"]:
        length = self.text_encoder.config.max_position_embeddings
        tokens = self.tokenizer(prompt, padding="max_length", max_length=length)["input_ids"]
        if len(tokens) > length:
            message = f"prompt {prompt!r} has {len(tokens)} tokens; the model reads {length}"
            raise ConfigurationError(message)
        return torch.tensor(tokens)

    def _words(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _image_size(components: Components) -> int:
    side = components.unet.config.sample_size
    if not isinstance(side, int):
        message = f"unet/config.json: sample_size is {side}; only square models are supported"
        raise ConfigurationError(message)
    return int(side * 2 ** (len(components.vae.config.block_out_channels) - 1))
