"""The one scale in which pictures enter the networks: RGB less ImageNet's mean, over its deviation.

The statistics are those of torchvision's, timm's and transformers' ImageNet weights. Networks that
expect something else (caffe's) convert within themselves, so that data and networks can be freely
combined.
"""

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


def normalise(pictures: Tensor) -> Tensor:
    """Scale pictures for a network.

    Args:
        pictures: uint8 ``(..., 3, H, W)``, RGB.

    Returns:
        float32 of the same shape; black is about -2.1, white about 2.6.
    """
    mean, deviation = _statistics(pictures.device)
    return (pictures.float() / 255 - mean) / deviation


def denormalise(images: Tensor) -> Tensor:
    """Undo :func:`normalise`: uint8 ``(..., 3, H, W)``, RGB; exact for what it returned."""
    mean, deviation = _statistics(images.device)
    return ((images.float() * deviation + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation, each ``(3, 1, 1)``."""
    mean, deviation = (torch.tensor(values, device=device) for values in (MEAN, DEVIATION))
    return mean[:, None, None], deviation[:, None, None]
