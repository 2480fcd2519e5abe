"""The multi-label classifier behind class activation maps: a ResNet with one linear layer.

The facts are those of jiwoon-ahn/irn @a2ece00 (``net/resnet50_cam.py``, ``net/resnet50.py``):
the last stage keeps its stride at 1 (features at 1/16), batch norms never adapt, no gradient goes
below the third stage, and the head is a 1×1 convolution without bias on the mean over places.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from g4seg_pl.types import ConfigurationError

Architecture = Literal["resnet18", "resnet50", "resnet101"]


class ResNetClassifier(nn.Module):
    """A torchvision ResNet with features at 1/16 and a head without bias.

    Args:
        architecture: of torchvision's ResNets.
        classes: how many.
        imagenet: begin with ImageNet's weights (downloaded by torchvision).
        train_all: every stage and every batch norm learns, as a network that begins with random
            weights must; otherwise what IRN freezes is frozen.
    """

    def __init__(
        self,
        architecture: Architecture,
        classes: int,
        *,
        imagenet: bool = False,
        train_all: bool = False,
    ) -> None:
        super().__init__()
        self.train_all = train_all
        from torchvision import models

        weights = "IMAGENET1K_V1" if imagenet else None
        self.resnet: Any = getattr(models, architecture)(weights=weights)
        width = self.resnet.fc.in_features
        self.resnet.fc = nn.Identity()
        _keep_resolution(self.resnet.layer4)
        self.head = nn.Conv2d(width, classes, 1, bias=False)
        self.requires_grad_()

    def features(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        """Return the last stage's maps of normalised images."""
        net = self.resnet
        maps = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images))))))
        deep: Tensor = net.layer4(net.layer3(maps))
        return deep

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b k"]:
        """Return logits of presence of normalised images."""
        pooled = self.features(images).mean((2, 3), keepdim=True)
        logits: Tensor = self.head(pooled)[:, :, 0, 0]
        return logits

    def requires_grad_(self, requires_grad: bool = True) -> "ResNetClassifier":
        """Ask for gradients of what is trained; the first two stages stay as ImageNet left them."""
        super().requires_grad_(requires_grad)
        if not self.train_all:
            # Said beforehand: processes that exchange gradients wait for all that are expected.
            net = self.resnet
            for stage in (net.conv1, net.bn1, net.layer1, net.layer2):
                stage.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> "ResNetClassifier":
        """Set the mode; batch norms stay in evaluation unless everything is trained."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not self.train_all:
                module.eval()
        return self


def activation_maps(
    network: ResNetClassifier,
    image: Float[Tensor, "1 3 H W"],
    classes: list[int],
) -> Float[Tensor, "k h w"]:
    """Return the head's response at every place, plus that of the mirrored image; never negative.

    Args:
        network: in evaluation mode.
        image: normalised.
        classes: indices of the classes, from 0.
    """
    both = torch.cat([image, image.flip(3)])
    responses = functional.conv2d(network.features(both), network.head.weight[classes]).relu()
    return responses[0] + responses[1].flip(2)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a classifier's weights: a checkpoint of ``fit``, a plain state dict, or one of IRN's.

    Returns:
        weights under this class's names.

    Raises:
        ConfigurationError: there is no such file, or it holds no such weights.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        message = f"weights: no file {file}; train it with fit, or give IRN's res50_cam.pth"
        raise ConfigurationError(message)
    content = torch.load(file, map_location="cpu", weights_only=True)
    found = content.get("state_dict", content)
    # IRN keeps every weight under the network's name and again under its stages.
    names = {"network.": "", "resnet50.": "resnet.", "classifier.": "head."}
    weights = {}
    for name, weight in found.items():
        for old, new in names.items():
            if name.startswith(old):
                weights[new + name.removeprefix(old)] = weight
        if name.startswith(("resnet.", "head.")):
            weights[name] = weight
    if "head.weight" not in weights:
        message = f"weights: {file} holds no classifier (no head.weight); train it with fit"
        raise ConfigurationError(message)
    return {name: weight for name, weight in weights.items() if ".fc." not in name}


def _keep_resolution(stage: Any) -> None:
    """Set a stage's strides to 1."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
