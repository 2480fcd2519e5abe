"""What the method asks of a text-to-image model and of a feature extractor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from g4seg_pl.core.injection import Injection

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class AttentionRecord:
    """Queries and keys of one attention layer; A = softmax(scale · query keyᵀ).

    A·S needs no stored matrix: it is fused attention with the masks as the value, and logits
    sharpened by p are the same with ``scale · p``.

    Attributes:
        layer: the layer's dotted name in the U-Net.
        query: ``(b, heads, n, d)``, as they enter the attention.
        key: ``(b, heads, m, d)``; m is n in self-attention, the prompt's tokens in cross-attention.
        scale: what the layer multiplies the logits with, 1/√d.
        grid: height and width of the layer's token grid; their product is n, rows first.
    """

    layer: str
    query: Float[Tensor, "b heads n d"]
    key: Float[Tensor, "b heads m d"]
    scale: float
    grid: tuple[int, int]


@runtime_checkable
class Generator(Protocol):
    """A latent text-to-image diffusion model with frozen weights.

    No method fixes a gradient mode: the caller chooses one, and an injection that needs a
    gradient gets it through ``denoise``.
    """

    @property
    def image_size(self) -> int:
        """Side of the square the model was made for, in pixels."""

    @property
    def prediction_type(self) -> PredictionType:
        """What ``denoise`` returns: the noise, the velocity or the clean latent."""

    @property
    def alphas_cumprod(self) -> Float[Tensor, " t"]:
        """The schedule's ᾱ_t, float32, one value for every training timestep."""

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return the scaled mode of the latent posterior, float32, of images in [-1, 1]."""

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Return float32 images clamped to [-1, 1] of scaled latents."""

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Return the text encoder's last hidden states, one row a prompt."""

    def token_mask(self, prompt: str, name: str, start: int = 0) -> Bool[Tensor, " l"]:
        """Mark the tokens of the first ``name`` in ``prompt`` at or after character ``start``."""

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

        With checkpointing, a gradient taken through it later recomputes activations, which saves
        memory.
        """

    def self_attention(
        self, noisy: Float[Tensor, "b c h w"], timestep: int, embeddings: Float[Tensor, "b l d"]
    ) -> list[AttentionRecord]:
        """Return the queries and keys of every self-attention layer of one U-Net pass."""

    def attention(
        self, noisy: Float[Tensor, "b c h w"], timestep: int, embeddings: Float[Tensor, "b l d"]
    ) -> tuple[list[AttentionRecord], list[AttentionRecord]]:
        """Return those of every self-attention and of every cross-attention layer of one pass."""


@runtime_checkable
class FeatureExtractor(Protocol):
    """F of Eq. 8: a frozen encoder of dense features."""

    def __call__(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return dense float32 features of images in [-1, 1] of any size."""


@runtime_checkable
class ImageCache(Protocol):
    """Keeps what depends on an image alone from one run to the next."""

    def fetch(
        self,
        name: str,
        images: Float[Tensor, "b 3 H W"],
        compute: Callable[[Float[Tensor, "m 3 H W"]], Float[Tensor, "m c h w"]],
    ) -> Float[Tensor, "b c h w"]:
        """Return what ``compute`` makes of images, float32, computing only what is not kept."""
