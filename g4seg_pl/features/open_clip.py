"""Dense tokens of open_clip's vision transformers."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.features.base import (
    CLIP_MEAN,
    CLIP_STD,
    DenseFeatures,
    fit_to_patches,
    interpolate_positions,
    normalise,
)
from g4seg_pl.types import ConfigurationError


class OpenClipFeatures(DenseFeatures):
    """Patch tokens of a CLIP image encoder, position embeddings interpolated to any size."""

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        layer: int = -1,
        image_size: int | None = None,
        projected: bool = True,
    ) -> None:
        """Remember what to load.

        Args:
            model: a local folder (open_clip_config.json and open_clip_model.safetensors),
                ``hf-hub:owner/name``, or a name of open_clip's such as ``ViT-B-16``.
            pretrained: the weights of a named model, such as ``openai``.
            layer: the transformer block whose output is taken; -1 is the last.
            image_size: shorter side images are scaled to; None takes them as they are.
            projected: apply the final norm and the projection into the joint space.
        """
        super().__init__()
        self.model = model
        self.pretrained = pretrained
        self.layer = layer
        self.image_size = image_size
        self.projected = projected
        self.visual: Any = None

    def load(self, vae: AutoencoderKL | None = None) -> None:
        """Load the image tower only, frozen; a second call does nothing.

        Args:
            vae: not used.

        Raises:
            ConfigurationError: open_clip or the model is missing, or it is not a plain vision
                transformer with that many layers.
        """
        if self.visual is None:
            visual = load_open_clip(self.model, self.pretrained, "features").visual
            self._check(visual)
            self.visual = visual.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return one feature a patch, float32.

        Args:
            images: in [-1, 1], of any size.
        """
        visual = self.visual
        mean = getattr(visual, "image_mean", None) or CLIP_MEAN
        std = getattr(visual, "image_std", None) or CLIP_STD
        fitted = fit_to_patches(images, visual.patch_size, self.image_size)
        patches = visual.conv1(normalise(fitted, mean, std).to(visual.conv1.weight))
        grid = (patches.shape[2], patches.shape[3])
        tokens = self._encode(patches.flatten(2).transpose(1, 2), grid)
        if self.projected:
            tokens = visual.ln_post(tokens)
            tokens = tokens if visual.proj is None else tokens @ visual.proj
        dense: Tensor = tokens.transpose(1, 2).reshape(len(images), -1, *grid).float()
        return dense

    def _encode(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        visual = self.visual
        first = visual.class_embedding.to(patches).expand(len(patches), 1, -1)
        positions = interpolate_positions(visual.positional_embedding, visual.grid_size, grid)
        embedded = torch.cat([first, patches], dim=1) + positions.to(patches)
        tokens: Tensor = visual.ln_pre(embedded)
        blocks = visual.transformer.resblocks
        for block in blocks[: self.layer % len(blocks) + 1]:
            tokens = block(tokens)
        return tokens[:, 1:]

    def _check(self, visual: Any) -> None:
        from open_clip.transformer import VisionTransformer

        if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
            message = (
                f"features: the image tower of {self.model} is a {type(visual).__name__} without "
                "plain patch tokens; give a ViT model such as ViT-B-16"
            )
            raise ConfigurationError(message)
        count = len(visual.transformer.resblocks)
        if not -count <= self.layer < count:
            message = f"features: layer is {self.layer}; {self.model} has {count} layers"
            raise ConfigurationError(message)


def load_open_clip(model: str, pretrained: str | None, argument: str) -> Any:
    """Load a whole CLIP model of open_clip, as open_clip returns it.

    Args:
        model: a local folder, ``hf-hub:owner/name``, or a name of open_clip's.
        pretrained: the weights of a named model.
        argument: of the caller, for error messages.

    Raises:
        ConfigurationError: open_clip or the model is missing.
    """
    try:
        import open_clip
    except ImportError as error:
        message = f"{argument}: open_clip is not installed; pip install open_clip_torch"
        raise ConfigurationError(message) from error
    try:
        return open_clip.create_model(open_clip_name(model, pretrained, argument), pretrained)
    except (OSError, RuntimeError, ValueError) as error:
        message = f"{argument}: open_clip cannot load {model} (pretrained: {pretrained}): {error}"
        raise ConfigurationError(message) from error


def open_clip_name(model: str, pretrained: str | None, argument: str) -> str:
    """Return the name by which open_clip knows a model; a folder becomes ``local-dir:``.

    Args:
        model: a local folder, ``hf-hub:owner/name``, or a name of open_clip's.
        pretrained: the weights of a named model.
        argument: of the caller, for error messages.

    Raises:
        ConfigurationError: the folder lacks a file, or a named model its weights.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if ":" not in model and pretrained is None:
            message = (
                f"{argument}: {model!r} is no folder, and `pretrained` is not given; name the "
                "weights, such as pretrained: openai, or give a local folder"
            )
            raise ConfigurationError(message)
        return model
    for needed in ("open_clip_config.json", "open_clip_model.safetensors"):
        if not (folder / needed).is_file():
            message = f"{argument}: folder {folder} has no {needed}; give an open_clip folder"
            raise ConfigurationError(message)
    return f"local-dir:{folder}"
