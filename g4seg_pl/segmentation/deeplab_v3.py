"""DeepLabV3 and V3+ (Chen et al., 2017 and 2018), of torchvision's parts."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabHead

from g4seg_pl.segmentation.deeplab_v2 import Depth, Start, dilated_resnet, load_torchvision

RATES = {8: (12, 24, 36), 16: (6, 12, 18)}


class DeepLabV3(nn.Module):
    """DeepLabV3; logits at ``1 / output_stride`` of the size.

    Args:
        num_labels: labels, background included.
        depth: of the ResNet.
        weights: of the ResNet: torchvision's, ``imagenet`` or ``coco``, or ``random``.
        output_stride: 8 or 16.
    """

    def __init__(
        self,
        num_labels: int = 21,
        depth: Depth = "resnet50",
        weights: Start = "imagenet",
        output_stride: Literal[8, 16] = 8,
    ) -> None:
        super().__init__()
        self.num_labels, self.depth = num_labels, depth
        self.weights, self.output_stride = weights, output_stride
        self.backbone = dilated_resnet(depth, output_stride)
        self.head = DeepLabHead(2048, num_labels, RATES[output_stride])

    def load_pretrained(self) -> None:
        """Load ``weights``."""
        load_torchvision(self.backbone, self.depth, self.weights)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, num_labels, h, w)`` of normalised images ``(B, 3, H, W)``."""
        logits: Tensor = self.head(self.backbone(images)["4"])
        return logits


class PlusHead(nn.Module):
    """The decoder of DeepLabV3+: pyramid features joined to fine ones of stride 4.

    Args:
        coarse_channels: of the last stage.
        fine_channels: of the first stage.
        num_labels: labels, background included.
        rates: of the pyramid.
    """

    def __init__(
        self, coarse_channels: int, fine_channels: int, num_labels: int, rates: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.pyramid = ASPP(coarse_channels, rates)
        self.reduce = _convolution(fine_channels, 48, 1)
        self.refine = nn.Sequential(_convolution(304, 256, 3), _convolution(256, 256, 3))
        self.classify = nn.Conv2d(256, num_labels, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Return logits ``(B, num_labels, h, w)`` at the size of the fine features."""
        context = functional.interpolate(
            self.pyramid(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False
        )
        joined = torch.cat([context, self.reduce(fine)], dim=1)
        logits: Tensor = self.classify(self.refine(joined))
        return logits


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+; logits at a quarter of the size.

    Args:
        num_labels: labels, background included.
        depth: of the ResNet.
        weights: of the ResNet: torchvision's, ``imagenet`` or ``coco``, or ``random``.
        output_stride: 8 or 16.
    """

    def __init__(
        self,
        num_labels: int = 21,
        depth: Depth = "resnet50",
        weights: Start = "imagenet",
        output_stride: Literal[8, 16] = 16,
    ) -> None:
        super().__init__()
        self.num_labels, self.depth = num_labels, depth
        self.weights, self.output_stride = weights, output_stride
        self.backbone = dilated_resnet(depth, output_stride)
        self.head = PlusHead(2048, 256, num_labels, RATES[output_stride])

    def load_pretrained(self) -> None:
        """Load ``weights``."""
        load_torchvision(self.backbone, self.depth, self.weights)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, num_labels, h, w)`` of normalised images ``(B, 3, H, W)``."""
        features = self.backbone(images)
        logits: Tensor = self.head(features["1"], features["4"])
        return logits


def _convolution(in_channels: int, out_channels: int, size: int) -> nn.Sequential:
    """A convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
