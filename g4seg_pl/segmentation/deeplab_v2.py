"""DeepLabV2 (Chen et al., 2017): a ResNet at stride 8 under four summed dilated convolutions."""

from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from g4seg_pl.segmentation.normalisation import DEVIATION, MEAN
from g4seg_pl.segmentation.published import (
    backbone_weights,
    head_weights,
    is_caffe,
    read_weights,
)
from g4seg_pl.types import ConfigurationError

Depth = Literal["resnet50", "resnet101"]
Style = Literal["torchvision", "caffe"]
Start = Literal["imagenet", "coco", "random"]

RATES = (6, 12, 18, 24)
CAFFE_MEAN_BGR = (104.008, 116.669, 122.675)


class SummedASPP(nn.Module):
    """Atrous spatial pyramid pooling of DeepLabV2: parallel 3x3 classifiers, summed.

    Args:
        in_channels: of the features.
        num_labels: labels, background included.
        rates: dilation of each branch.
    """

    def __init__(self, in_channels: int, num_labels: int, rates: tuple[int, ...] = RATES) -> None:
        super().__init__()
        branches = [
            nn.Conv2d(in_channels, num_labels, 3, padding=rate, dilation=rate) for rate in rates
        ]
        self.branches = nn.ModuleList(branches)
        for branch in branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.constant_(cast(nn.Parameter, branch.bias), 0)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits ``(B, num_labels, h, w)`` of features ``(B, in_channels, h, w)``."""
        return torch.stack([branch(features) for branch in self.branches]).sum(0)


class DeepLabV2(nn.Module):
    """The field's network for weakly supervised segmentation; logits at an eighth of the size.

    Args:
        num_labels: labels, background included.
        depth: of the ResNet.
        weights: what it starts from: ``random``; torchvision's weights, ``imagenet`` or ``coco``,
            see :func:`load_torchvision`; or a file, such as the published COCO checkpoints
            (kazuto1011/deeplab-pytorch, isht7/pytorch-deeplab-resnet), whose classifiers are taken
            over where their number fits.
        style: ``caffe`` for checkpoints that stem from caffe: pictures in BGR from 0 to 255, the
            stride in a block's first convolution, and a pooling that rounds up.
    """

    def __init__(
        self,
        num_labels: int = 21,
        depth: Depth = "resnet101",
        weights: str = "imagenet",
        style: Style = "torchvision",
    ) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.depth: Depth = depth
        self.weights = weights
        self.style: Style = style
        self.backbone = dilated_resnet(depth, output_stride=8)
        if style == "caffe":
            _make_caffe(self.backbone)
        self.head = SummedASPP(2048, num_labels)

    def load_pretrained(self) -> None:
        """Load ``weights``.

        Raises:
            ConfigurationError: the file cannot be read, is of the other style, or fits no ResNet
                of this depth.
        """
        if self.weights in ("random", "imagenet", "coco"):
            load_torchvision(self.backbone, self.depth, cast(Start, self.weights))
            return
        weights = read_weights(Path(self.weights))
        found: Style = "caffe" if is_caffe(weights) else "torchvision"
        if found != self.style:
            msg = f"weights: {self.weights} is in {found} style; set network.style to {found}"
            raise ConfigurationError(msg)
        load_backbone(self.backbone, backbone_weights(weights), self.weights)
        head = head_weights(weights)
        if head and head["branches.0.weight"].shape[0] == self.num_labels:
            self.head.load_state_dict(head)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, num_labels, h, w)`` of normalised images ``(B, 3, H, W)``."""
        images = to_caffe(images) if self.style == "caffe" else images
        features: Tensor = self.head(self.backbone(images)["4"])
        return features


def dilated_resnet(depth: Depth, output_stride: Literal[8, 16]) -> nn.ModuleDict:
    """Return torchvision's ResNet without its classifier, its last stages dilated.

    Args:
        depth: which ResNet.
        output_stride: of the last features, 8 or 16.

    Returns:
        a module that gives the features of stage 1 and 4 as ``{"1": ..., "4": ...}``; its weights
        have torchvision's names.
    """
    dilate = [False, output_stride == 8, True]
    make = torchvision.models.resnet50 if depth == "resnet50" else torchvision.models.resnet101
    return ResNetFeatures(make(weights=None, replace_stride_with_dilation=dilate))


class ResNetFeatures(nn.ModuleDict):
    """A ResNet that returns features of its first and last stage.

    Args:
        resnet: torchvision's.
    """

    def __init__(self, resnet: ResNet) -> None:
        kept = [(name, part) for name, part in resnet.named_children() if name not in _UNUSED]
        super().__init__(OrderedDict(kept))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``{"1": (B, 256, h, w) at stride 4, "4": (B, 2048, h, w)}``."""
        features = {}
        hidden = images
        for name, part in self.items():
            hidden = part(hidden)
            if name in ("layer1", "layer4"):
                features[name[-1]] = hidden
        return features


_UNUSED = ("avgpool", "fc")


def load_torchvision(backbone: nn.Module, depth: Depth, start: Start) -> None:
    """Load torchvision's weights of a ResNet.

    Args:
        backbone: of :func:`dilated_resnet`.
        depth: its depth.
        start: ``imagenet`` for the classifier that torchvision's DeepLabs were trained from,
            ``coco`` for the backbone of its DeepLabV3, which was trained on pixel labels of COCO's
            pictures in VOC's twenty classes; ``random`` leaves it as it is.
    """
    if start == "random":
        return
    network = depth if start == "imagenet" else f"deeplabv3_{depth}"
    version = "IMAGENET1K_V1" if start == "imagenet" else "COCO_WITH_VOC_LABELS_V1"
    weights = torchvision.models.get_model_weights(network)[version].get_state_dict(progress=False)
    load_backbone(backbone, backbone_weights(weights), f"torchvision's {network}")


def load_backbone(backbone: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights under torchvision's names; a classifier among them is passed over.

    Raises:
        ConfigurationError: a weight is missing, or of another shape.
    """
    own = backbone.state_dict()
    kept = {name: value for name, value in weights.items() if name in own}
    # Old checkpoints do not count batches; the count matters to no run with a fixed momentum.
    missing = [name for name in own if name not in kept and "num_batches" not in name]
    wrong = [name for name, value in kept.items() if value.shape != own[name].shape]
    if missing or wrong:
        msg = (
            f"weights: {source} fits no such network: {len(missing)} weights are missing and "
            f"{len(wrong)} have another shape, among them {(missing + wrong)[:3]}; check depth"
        )
        raise ConfigurationError(msg)
    backbone.load_state_dict(kept, strict=False)


def to_caffe(images: Tensor) -> Tensor:
    """Turn normalised images ``(B, 3, H, W)`` into caffe's: BGR, 0 to 255, less a mean."""
    shape = (1, 3, 1, 1)
    mean, deviation, caffe = (
        images.new_tensor(values).view(shape) for values in (MEAN, DEVIATION, CAFFE_MEAN_BGR)
    )
    return ((images * deviation + mean) * 255).flip(1) - caffe


def _make_caffe(backbone: nn.ModuleDict) -> None:
    """Move each stage's stride and dilation to where the caffe models have them."""
    backbone["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
    for stage, dilation in (("layer1", 1), ("layer2", 1), ("layer3", 2), ("layer4", 4)):
        blocks: list[Any] = list(backbone[stage].children())
        for block in blocks:
            # torchvision dilates a stage from its second block on; the caffe models throughout.
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)
