"""Masks through a segmentation ControlNet instead of attention (the paper's Table VIII)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from torch import Tensor, nn

from g4seg_pl.backbones.attention import checkpointed, installed
from g4seg_pl.backbones.control_image import (
    ColourChoice,
    colour_of,
    coloured,
    require_colours,
)
from g4seg_pl.backbones.kinds import read_part, require_hub_id
from g4seg_pl.backbones.stable_diffusion import Residuals, StableDiffusion
from g4seg_pl.core.injection import Injection
from g4seg_pl.core.layout import laid_out
from g4seg_pl.core.protocols import AttentionRecord, PredictionType
from g4seg_pl.core.steps import every_step
from g4seg_pl.types import ConfigurationError
from g4seg_pl.weights import load_whole

# In these a ControlNet must be like the U-Net it was copied from.
_ALIKE = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
)


@dataclass(frozen=True)
class ControlNetInjection:
    """Which ControlNet takes the place of attention, and how masks are painted for it.

    Attributes:
        model: folder or hub id of a diffusers ControlNet made for the generator's own version
            that reads segmentations in ADE20K's colours.
        scale: its residuals are multiplied with this; 0 or more.
        colours: by class name, an ADE20K class or red, green and blue; for classes without a
            namesake or near class in ADE20K, such as train, and for ControlNets with a palette
            of their own.
        background: the colour of what no mask covers.
        variant: of its weight files, such as ``fp16``.
        revision: branch, tag or commit of a hub id.
    """

    model: str
    scale: float = 1.0
    colours: dict[str, str | tuple[int, int, int]] | None = None
    background: tuple[int, int, int] = (0, 0, 0)
    variant: str | None = None
    revision: str | None = None

    def check(
        self, generator: str, revision: str | None = None, class_names: Sequence[str] = ()
    ) -> None:
        """Refuse what cannot work with a generator, reading configuration files only.

        Args:
            generator: its folder or hub id.
            revision: of the generator's hub id.
            class_names: all that may have to be painted, as in prompts.

        Raises:
            ConfigurationError: names the ControlNet or the classes, and the remedy.
        """
        require_colours(class_names, self.colours or {})
        place = {"revision": self.revision} if self.revision else {}
        config = self._read(ControlNetModel.load_config, **place)
        if config.get("_class_name") != "ControlNetModel":
            message = (
                f"controlnet {self.model}: it is a {config.get('_class_name')}; give a diffusers "
                "ControlNetModel"
            )
            raise ConfigurationError(message)
        place = {"revision": revision} if revision else {}
        folder = Path(generator).expanduser()
        generator = str(folder) if folder.is_dir() else generator
        unet = read_part(generator, "unet", UNet2DConditionModel.load_config, **place)
        _require_alike(self.model, config, unet)

    def load(self, generator: StableDiffusion, dtype: torch.dtype) -> "ControlledGenerator":
        """Load the ControlNet and put it before a generator.

        Args:
            generator: already loaded.
            dtype: number format of the ControlNet's weights.

        Raises:
            ConfigurationError: it cannot be loaded or belongs to another U-Net.
        """
        place = {"revision": self.revision} if self.revision else {}
        variant = {"variant": self.variant} if self.variant else {}
        load = partial(load_whole, ControlNetModel.from_pretrained)
        net = self._read(load, torch_dtype=dtype, **place, **variant)
        _require_alike(self.model, net.config, generator.unet.config)
        device = generator.alphas_cumprod.device
        return ControlledGenerator(
            generator, net.to(device), self.scale, self.colours, self.background
        )

    def _read(self, load: Any, **options: Any) -> Any:
        folder = Path(self.model).expanduser()
        if not folder.is_dir():
            require_hub_id(self.model)
        try:
            with torch.device("cpu"):  # as `read_part`
                return load(str(folder) if folder.is_dir() else self.model, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            message = (
                f"controlnet {self.model} cannot be loaded ({error}); check the folder or hub id"
            )
            raise ConfigurationError(message) from error


def require_injection(steps: Sequence[object]) -> None:
    """Refuse update steps of which none would ever use a ControlNet.

    Raises:
        ConfigurationError: no step, nor one that it holds, has an ``injection_weight`` above 0.
    """
    if not any(getattr(step, "injection_weight", 0) > 0 for step in every_step(steps)):
        message = (
            "controlnet is given, but no update step injects masks: give one whose "
            "injection_weight is above 0, such as Correspondence (recipe paper)"
        )
        raise ConfigurationError(message)


class ControlledGenerator(nn.Module):
    """A generator whose injected masks are painted for a ControlNet; attention is left alone.

    An injection's weight only switches it on (above 0) or off; its strength is ``scale``. A pass
    without injection, such as that of guidance without a prompt, gets no ControlNet either.
    """

    def __init__(
        self,
        generator: StableDiffusion,
        controlnet: ControlNetModel,
        scale: float = 1.0,
        colours: Mapping[str, ColourChoice] | None = None,
        background: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Take loaded parts; the ControlNet is frozen and laid out like the rest.

        Args:
            generator: whose U-Net the ControlNet was made for.
            controlnet: reads pictures in [0, 1] as large as the generator's.
            scale: of the ControlNet's residuals.
            colours: see ``ControlNetInjection``.
            background: the colour of what no mask covers.
        """
        super().__init__()
        self.generator = generator
        self.controlnet = controlnet.to(memory_format=torch.channels_last)
        self.scale = scale
        self.colours = dict(colours or {})
        self.background = background
        self.eval().requires_grad_(requires_grad=False)

    @property
    def vae(self) -> AutoencoderKL:
        """The generator's autoencoder."""
        return self.generator.vae

    @property
    def image_size(self) -> int:
        """Side of the square the generator was made for, in pixels."""
        return self.generator.image_size

    @property
    def prediction_type(self) -> PredictionType:
        """What ``denoise`` returns."""
        return self.generator.prediction_type

    @property
    def alphas_cumprod(self) -> Float[Tensor, " t"]:
        """The schedule's ᾱ_t of the generator."""
        return self.generator.alphas_cumprod

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return the generator's scaled latents of images in [-1, 1]."""
        return self.generator.encode(images)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Return the generator's images of scaled latents."""
        return self.generator.decode(latents)

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Return the generator's embeddings."""
        return self.generator.embed(prompts)

    def token_mask(self, prompt: str, name: str, start: int = 0) -> Bool[Tensor, " l"]:
        """Return the generator's marks of a name's tokens."""
        return self.generator.token_mask(prompt, name, start)

    def self_attention(
        self, noisy: Float[Tensor, "b c h w"], timestep: int, embeddings: Float[Tensor, "b l d"]
    ) -> list[AttentionRecord]:
        """Return the generator's queries and keys, without the ControlNet."""
        return self.generator.self_attention(noisy, timestep, embeddings)

    def attention(
        self, noisy: Float[Tensor, "b c h w"], timestep: int, embeddings: Float[Tensor, "b l d"]
    ) -> tuple[list[AttentionRecord], list[AttentionRecord]]:
        """Return the generator's records of both kinds of attention, without the ControlNet."""
        return self.generator.attention(noisy, timestep, embeddings)

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

        Args:
            noisy: z_t, of any height and width.
            timestep: t.
            embeddings: one prompt a row.
            injection: masks of the same rows, with their classes' names.
            checkpointing: see ``StableDiffusion.denoise``; the ControlNet recomputes too.

        Raises:
            ConfigurationError: the injection asks for what only attention can do, or a class has
                no colour.
        """
        residuals = None
        if injection is not None and injection.active:
            image = self.picture(injection, (noisy.shape[2], noisy.shape[3]))
            within = checkpointed if checkpointing else installed
            with within(self.controlnet, {}):
                residuals = self._residuals(noisy, timestep, embeddings, image)
        return self.generator.denoise(
            noisy, timestep, embeddings, checkpointing=checkpointing, residuals=residuals
        )

    def picture(self, injection: Injection, grid: tuple[int, int]) -> Float[Tensor, "b 3 H W"]:
        """Return what the ControlNet is shown, in [0, 1].

        Args:
            injection: masks with their classes' names.
            grid: height and width of the latents.
        """
        _require_plain(injection)
        steps = len(self.controlnet.config.conditioning_embedding_out_channels) - 1
        size = (grid[0] * 2**steps, grid[1] * 2**steps)
        masks = injection.on_grid(size).unflatten(-1, size)
        colours = [[colour_of(name, self.colours) for name in row] for row in injection.classes]
        return coloured(masks, colours, self.background)

    def _residuals(
        self, noisy: Tensor, timestep: int, embeddings: Tensor, image: Tensor
    ) -> Residuals:
        told = self.generator.conditions(noisy, embeddings)
        weight = next(self.controlnet.parameters())
        down, middle = self.controlnet(
            laid_out(noisy, weight),
            timestep,
            encoder_hidden_states=told.text.to(weight.dtype),
            controlnet_cond=image.to(weight),
            conditioning_scale=self.scale,
            added_cond_kwargs=told.added,
            return_dict=False,
        )
        return Residuals(tuple(down), middle)


def _require_plain(injection: Injection) -> None:
    """Refuse an injection that means something only in attention, or that names no classes."""
    if injection.rule != "eq5" or not (injection.cross_attention and injection.self_attention):
        message = (
            "controlnet: this update step chooses an attention rule or one kind of attention; "
            "leave injection_rule and inject_*_attention alone, or go without controlnet"
        )
        raise ConfigurationError(message)
    if len(injection.classes) != len(injection.foreground):
        message = (
            f"controlnet: the injection names classes of {len(injection.classes)} rows, masks are "
            f"of {len(injection.foreground)}; set Injection.classes"
        )
        raise ConfigurationError(message)


def _require_alike(model: str, net: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    for name in _ALIKE:
        if name in net and name in unet and _plain(net[name]) != _plain(unet[name]):
            message = (
                f"controlnet {model}: its {name} is {net[name]}, the generator's {unet[name]}; "
                "give one made for the same version of Stable Diffusion"
            )
            raise ConfigurationError(message)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
