"""A DeepLab small enough for the embedded world: pictures of 64 by 64, minutes on two CPU cores."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class SmallDeepLab(nn.Module):
    """Residual stages at strides 2 to 8, a dilated pyramid, and a decoder at half the size.

    Batch norm and plain convolutions only: on a CPU, group norm and depthwise convolutions take
    longer than what they save.

    Args:
        num_labels: labels, background included.
        width: channels of the first stage; later ones have two and four times as many.
    """

    def __init__(self, num_labels: int = 13, width: int = 24) -> None:
        super().__init__()
        self.num_labels, self.width = num_labels, width
        self.stem = _convolution(3, width, stride=2)
        self.fine = _Residual(width, width)
        self.middle = nn.Sequential(
            _Residual(width, 2 * width, stride=2), _Residual(2 * width, 2 * width)
        )
        self.coarse = nn.Sequential(
            _Residual(2 * width, 4 * width, stride=2),
            _Residual(4 * width, 4 * width, dilation=2),
        )
        self.head = _Decoder(width, num_labels)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, num_labels, H / 2, W / 2)`` of normalised images ``(B, 3, H, W)``."""
        images = images.contiguous(memory_format=torch.channels_last)
        fine = self.fine(self.stem(images))
        middle = self.middle(fine)
        logits: Tensor = self.head(fine, middle, self.coarse(middle))
        return logits


class _Decoder(nn.Module):
    """Parallel dilated convolutions on the coarse features, then two steps up."""

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.pyramid = nn.ModuleList(
            [_convolution(4 * width, width, size=1)]
            + [_convolution(4 * width, width, dilation=rate) for rate in (1, 2, 4)]
        )
        self.context = _convolution(4 * width, width, size=1)
        self.join_middle = _convolution(7 * width, 2 * width)
        self.join_fine = _convolution(3 * width, 2 * width)
        self.classify = nn.Conv2d(2 * width, num_labels, 1)

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        """Return logits at the size of the fine features."""
        parts = [branch(coarse) for branch in self.pyramid]
        whole = self.context(coarse).mean((2, 3), keepdim=True).expand_as(parts[0])
        hidden = self.join_middle(_joined([*parts, whole], middle))
        logits: Tensor = self.classify(self.join_fine(_joined([hidden], fine)))
        return logits


class _Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.first = _convolution(in_channels, out_channels, stride=stride, dilation=dilation)
        self.second = _convolution(out_channels, out_channels, dilation=dilation, activate=False)
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or stride != 1:
            self.shortcut = _convolution(in_channels, out_channels, size=1, activate=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the block's own width and stride."""
        # The pixels are picked here and not by a strided 1x1 convolution, which would compute the
        # same: with channels last and fewer than 16 channels, oneDNN's gradient of its weights
        # writes beyond its buffer (uxlfoundation/oneDNN#6035; torch 2.14 on a CPU with AVX-512).
        picked = features[..., :: self.stride, :: self.stride]
        return functional.relu(self.second(self.first(features)) + self.shortcut(picked))


def _joined(coarse: list[Tensor], fine: Tensor) -> Tensor:
    """Coarse features brought to the size of the fine ones and put beside them."""
    whole = torch.cat(coarse, dim=1)
    size = fine.shape[-2:]
    larger = functional.interpolate(whole, size=size, mode="bilinear", align_corners=False)
    return torch.cat([larger, fine], dim=1)


def _convolution(
    in_channels: int,
    out_channels: int,
    size: int = 3,
    stride: int = 1,
    dilation: int = 1,
    *,
    activate: bool = True,
) -> nn.Sequential:
    """A convolution with batch norm and, if asked for, ReLU."""
    padding = dilation * (size // 2)
    convolution = nn.Conv2d(in_channels, out_channels, size, stride, padding, dilation, bias=False)
    layers: list[nn.Module] = [convolution, nn.BatchNorm2d(out_channels)]
    if activate:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
