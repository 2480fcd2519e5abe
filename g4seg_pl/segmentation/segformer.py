"""SegFormer (Xie et al., 2021) through transformers."""

from typing import Any

import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from g4seg_pl.types import ConfigurationError
from g4seg_pl.weights import load_whole


class SegFormer(nn.Module):
    """SegFormer; logits at a quarter of the size.

    Args:
        num_labels: labels, background included.
        model: a transformers folder or hub id that the encoder is loaded from, such as
            ``nvidia/mit-b1``; also its configuration is taken. None: the configuration is
            ``config``, the weights random.
        config: arguments of ``transformers.SegformerConfig``, used without ``model``; B0's are the
            default.
    """

    def __init__(
        self,
        num_labels: int = 21,
        model: str | None = "nvidia/mit-b1",
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if model is not None and config is not None:
            msg = f"network: both model {model!r} and config are given; give one of them"
            raise ConfigurationError(msg)
        self.num_labels, self.model, self.config = num_labels, model, config
        whole = transformers.SegformerForSemanticSegmentation(self._configuration())
        self.backbone, self.head = whole.segformer, whole.decode_head

    def load_pretrained(self) -> None:
        """Load the encoder of ``model``; the decoder stays as it was initialised."""
        if self.model is None:
            return
        try:
            encoder = load_whole(transformers.SegformerModel.from_pretrained, self.model)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            msg = f"network.model: {self.model!r} cannot be loaded: {error}"
            raise ConfigurationError(msg) from error
        self.backbone.load_state_dict(encoder.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, num_labels, h, w)`` of normalised images ``(B, 3, H, W)``."""
        features = self.backbone(images, output_hidden_states=True, return_dict=True)
        logits: Tensor = self.head(features.hidden_states)
        return logits

    def _configuration(self) -> transformers.SegformerConfig:
        """The configuration of ``model``, or the one given."""
        if self.model is None:
            return transformers.SegformerConfig(**(self.config or {}), num_labels=self.num_labels)
        try:
            return transformers.SegformerConfig.from_pretrained(
                self.model, num_labels=self.num_labels
            )
        except OSError as error:
            msg = f"network.model: {self.model!r} has no SegFormer configuration: {error}"
            raise ConfigurationError(msg) from error
