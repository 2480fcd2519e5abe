"""What all feature extractors share: cheap to construct, loaded later, any input size."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

# The normalisation OpenAI's CLIP and nearly all of open_clip's models were trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class DenseFeatures(nn.Module, ABC):
    """A frozen encoder; constructing it costs nothing, ``load`` brings the weights."""

    @abstractmethod
    def load(self, vae: AutoencoderKL | None = None) -> None:
        """Load the weights, frozen and in evaluation mode; a second call does nothing.

        Args:
            vae: the generator's autoencoder, for extractors that share it.

        Raises:
            ConfigurationError: the model cannot be loaded or has no dense tokens.
        """

    @abstractmethod
    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return dense float32 features.

        Args:
            images: in [-1, 1], of any size.
        """


def normalise(
    images: Float[Tensor, "b 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b 3 H W"]:
    """Return images in [-1, 1] normalised by a mean and deviation meant for [0, 1]."""
    centre = images.new_tensor(mean)[:, None, None]
    spread = images.new_tensor(std)[:, None, None]
    return ((images + 1) / 2 - centre) / spread


def fit_to_patches(
    images: Float[Tensor, "b 3 H W"], patch: tuple[int, int], shorter_side: int | None
) -> Float[Tensor, "b 3 H2 W2"]:
    """Return images whose sides are multiples of the patch.

    Args:
        images: of any size.
        patch: height and width of a patch.
        shorter_side: to which the image is scaled, in pixels, aspect kept; None keeps the size
            but for rounding to the nearest multiple.
    """
    height, width = images.shape[2:]
    scale = 1.0 if shorter_side is None else shorter_side / min(height, width)
    size = (_nearest_multiple(height * scale, patch[0]), _nearest_multiple(width * scale, patch[1]))
    if size == (height, width):
        return images
    return functional.interpolate(
        images, size, mode="bilinear", align_corners=False, antialias=True
    )


def interpolate_positions(
    positions: Float[Tensor, "n d"], trained: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "m d"]:
    """Return position embeddings, the class token's first, for another grid of patches.

    Args:
        positions: one for the class token and one for each patch, rows first.
        trained: the grid they were trained on.
        grid: the grid wanted.
    """
    if trained == grid:
        return positions
    maps = positions[1:].T.reshape(1, -1, *trained).float()
    maps = functional.interpolate(maps, grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], maps[0].flatten(1).T.to(positions)])


def _nearest_multiple(length: float, patch: int) -> int:
    return max(1, round(length / patch)) * patch
