"""Dense tokens of transformers' CLIP vision models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from g4seg_pl.features.base import (
    CLIP_MEAN,
    CLIP_STD,
    DenseFeatures,
    fit_to_patches,
    normalise,
)
from g4seg_pl.types import ConfigurationError
from g4seg_pl.weights import load_whole


class TransformersClipFeatures(DenseFeatures):
    """Patch tokens of a CLIP image encoder from a transformers folder or hub id."""

    def __init__(
        self,
        model: str,
        layer: int = -1,
        image_size: int | None = None,
        projected: bool = True,
    ) -> None:
        """Remember what to load.

        Args:
            model: a folder with config.json and weights, or a hub id such as
                ``openai/clip-vit-base-patch16``.
            layer: the transformer block whose output is taken; -1 is the last.
            image_size: shorter side images are scaled to; None takes them as they are.
            projected: apply the final norm and the projection into the joint space.
        """
        super().__init__()
        self.model = model
        self.layer = layer
        self.image_size = image_size
        self.projected = projected
        self.network: Any = None
        self.mean: Sequence[float] = CLIP_MEAN
        self.std: Sequence[float] = CLIP_STD

    def load(self, vae: AutoencoderKL | None = None) -> None:
        """Load the image tower, frozen, and its normalisation; a second call does nothing.

        Args:
            vae: not used.

        Raises:
            ConfigurationError: the model cannot be loaded or has fewer layers.
        """
        if self.network is not None:
            return
        from transformers import CLIPVisionModelWithProjection

        folder = Path(self.model).expanduser()
        try:
            with torch.device("cpu"):  # whatever Lightning's context says, see `read_part`
                network = load_whole(
                    CLIPVisionModelWithProjection.from_pretrained,
                    str(folder) if folder.is_dir() else self.model,
                    # A CLIPVisionModel has none.
                    unused=() if self.projected else ("visual_projection.",),
                    dtype=torch.float32,
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            message = f"features: transformers cannot load {self.model} as CLIP: {error}"
            raise ConfigurationError(message) from error
        count = network.config.num_hidden_layers
        if not -count <= self.layer < count:
            message = f"features: layer is {self.layer}; {self.model} has {count} layers"
            raise ConfigurationError(message)
        self._read_normalisation()
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return one feature a patch, float32.

        Args:
            images: in [-1, 1], of any size.
        """
        config = self.network.config
        patch = config.patch_size
        fitted = fit_to_patches(images, (patch, patch), self.image_size)
        grid = (fitted.shape[2] // patch, fitted.shape[3] // patch)
        states = self.network.vision_model(
            normalise(fitted, self.mean, self.std).to(self.network.dtype),
            interpolate_pos_encoding=True,
            output_hidden_states=True,
        ).hidden_states
        # The first state is the embedding, before any block.
        tokens = states[self.layer % config.num_hidden_layers + 1][:, 1:]
        if self.projected:
            tokens = self.network.vision_model.post_layernorm(tokens)
            tokens = self.network.visual_projection(tokens)
        dense: Tensor = tokens.transpose(1, 2).reshape(len(images), -1, *grid).float()
        return dense

    def _read_normalisation(self) -> None:
        file = Path(self.model).expanduser() / "preprocessor_config.json"
        if file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            self.mean = config.get("image_mean", CLIP_MEAN)
            self.std = config.get("image_std", CLIP_STD)
