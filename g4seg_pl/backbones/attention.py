"""Attention rules for U-Nets of diffusers, installed and removed by one context manager."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Protocol, TypeAlias, runtime_checkable

from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from g4seg_pl.core.injection import Injection, dense_diffusion_attention, injected_attention
from g4seg_pl.core.protocols import AttentionRecord
from g4seg_pl.types import ConfigurationError

# Ways to compute the same plain attention; anything else has a meaning that we would lose.
_PLAIN = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)

Grids = dict[int, tuple[int, int]]
Denoiser: TypeAlias = UNet2DConditionModel | ControlNetModel


@runtime_checkable
class Processor(Protocol):
    """What diffusers calls in place of an attention layer's own computation."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return the layer's output."""


def token_grids(height: int, width: int, levels: int) -> Grids:
    """Return the token grid of every U-Net level by its number of tokens.

    Args:
        height: of the latent.
        width: of the latent.
        levels: how many resolutions the U-Net has.
    """
    grids = {}
    for _ in range(levels):
        grids[height * width] = (height, width)
        height, width = -(-height // 2), -(-width // 2)
    return grids


@contextmanager
def installed(unet: Denoiser, processors: Mapping[str, Processor]) -> Iterator[None]:
    """Give the named attention layers other processors, and put the old ones back on leaving.

    Args:
        unet: the model; whatever happens inside, it is left exactly as it was found.
        processors: by the layer's dotted name.

    Raises:
        ConfigurationError: a layer does something else than plain attention (IP-Adapter, say).
    """
    layers = {name: layer for name, layer in attention_layers(unet) if name in processors}
    found = {name: layer.processor for name, layer in layers.items()}
    for name, processor in found.items():
        if not isinstance(processor, _PLAIN):
            message = (
                f"attention layer {name} has a {type(processor).__name__}, which injection would "
                "replace; unload adapters and give the plain U-Net"
            )
            raise ConfigurationError(message)
    try:
        for name, layer in layers.items():
            layer.set_processor(processors[name])
        yield
    finally:
        for name, layer in layers.items():
            layer.set_processor(found[name])


@contextmanager
def checkpointed(unet: Denoiser, processors: Mapping[str, Processor]) -> Iterator[None]:
    """Do as ``installed``, and recompute activations, block by block, for a later gradient.

    The gradient may be taken after leaving: each block puts the processors back for the time of
    its own recomputation.

    Args:
        unet: the model; it is left as it was found.
        processors: by the layer's dotted name.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), installed(unet, processors)

    before = unet.is_gradient_checkpointing
    # Evaluation has no dropout: there is no random state to keep.
    unet.enable_gradient_checkpointing(
        partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    )
    try:
        with installed(unet, processors):
            yield
    finally:
        unet.disable_gradient_checkpointing()
        if before:
            unet.enable_gradient_checkpointing()


def attention_layers(unet: Denoiser) -> list[tuple[str, Attention]]:
    """Return the U-Net's attention layers with their dotted names, in order."""
    return [(name, layer) for name, layer in unet.named_modules() if isinstance(layer, Attention)]


def record_attention(
    unet: Denoiser, grids: Grids, run: Callable[[], object], *, cross: bool
) -> tuple[list[AttentionRecord], list[AttentionRecord]]:
    """Return queries and keys of one pass, which ends as soon as the last of them are there.

    What follows the last layer (its own attention, the feed-forward network, the output
    convolution) is never computed.

    Args:
        unet: the model; it is left as it was found.
        grids: its token grids by their number of tokens.
        run: makes the pass.
        cross: record cross-attention too; otherwise the second list stays empty.

    Returns:
        the records of self-attention and of cross-attention, in the order of execution.
    """
    own: list[AttentionRecord] = []
    across: list[AttentionRecord] = []
    layers = attention_layers(unet)
    count = sum(cross or not layer.is_cross_attention for _, layer in layers)
    processors = {
        name: RecordingProcessor(name, grids, own, across if cross else None, count)
        for name, _ in layers
    }
    # Where a layer took another kind of attention than it was built for, the pass runs to its end.
    with installed(unet, processors), suppress(AllRecorded):
        run()
    return own, across


class AllRecorded(Exception):
    """How a pass whose records are complete ends; no error, and seen by no caller."""


class InjectedProcessor:
    """Attention with the masks injected; holds no state of a layer, so one serves all."""

    def __init__(self, injection: Injection, grids: Grids) -> None:
        """Prepare the masks of one U-Net pass.

        Args:
            injection: what to inject.
            grids: the U-Net's token grids by their number of tokens.
        """
        self.injection = injection
        self.grids = grids
        # Now, not on first use: a recomputation must do just what the first pass did.
        self._masks = {grid: injection.on_grid(grid) for grid in grids.values()}

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b n c"],
        encoder_hidden_states: Float[Tensor, "b l d"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Return the layer's output under Eq. 5 or DenseDiffusion's rule."""
        query, key, value = project(attn, hidden_states, encoder_hidden_states, attention_mask)
        mixed = self._attend(query, key, value, cross=encoder_hidden_states is not None)
        return finish(attn, mixed, hidden_states)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, cross: bool) -> Tensor:
        injection = self.injection
        if not (injection.cross_attention if cross else injection.self_attention):
            return functional.scaled_dot_product_attention(query, key, value)
        rows = self._masks[self.grids[query.shape[2]]]
        columns = injection.tokens.to(rows) if cross else rows
        match injection.rule:
            case "eq5":
                return injected_attention(query, key, value, rows, columns, injection.weight)
            case "dense_diffusion":
                weight = injection.weight * injection.dense_strengths[0 if cross else 1]
                return dense_diffusion_attention(query, key, value, rows, columns, weight)


class RecordingProcessor:
    """Plain attention that keeps its queries and keys; one for each layer."""

    def __init__(
        self,
        layer: str,
        grids: Grids,
        records: list[AttentionRecord],
        cross_records: list[AttentionRecord] | None = None,
        wanted: int | None = None,
    ) -> None:
        """Prepare one layer.

        Args:
            layer: the layer's dotted name.
            grids: the U-Net's token grids by their number of tokens.
            records: the list self-attention is appended to, in the order of execution.
            cross_records: the list cross-attention is appended to; its keys are the prompt's
                tokens. None keeps none.
            wanted: the number of records, of both kinds, with which the pass ends; None lets it
                go on.
        """
        self.layer = layer
        self.grids = grids
        self.records = records
        self.cross_records = cross_records
        self.wanted = wanted

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b n c"],
        encoder_hidden_states: Float[Tensor, "b l d"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Return the layer's output unchanged.

        Raises:
            AllRecorded: all records that are wanted are there.
        """
        query, key, value = project(attn, hidden_states, encoder_hidden_states, attention_mask)
        kept = self.records if encoder_hidden_states is None else self.cross_records
        if kept is not None:
            grid = self.grids[query.shape[2]]
            scale = query.shape[-1] ** -0.5
            kept.append(AttentionRecord(self.layer, query, key, scale, grid))
            if len(self.records) + len(self.cross_records or ()) == self.wanted:
                raise AllRecorded
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return finish(attn, mixed, hidden_states)


def project(
    attn: Attention,
    hidden_states: Float[Tensor, "b n c"],
    encoder_hidden_states: Float[Tensor, "b l d"] | None,
    attention_mask: Tensor | None,
) -> tuple[
    Float[Tensor, "b heads n k"], Float[Tensor, "b heads m k"], Float[Tensor, "b heads m k"]
]:
    """Return a layer's queries, keys and values, heads apart.

    Raises:
        ConfigurationError: an attention mask is given; text-to-image U-Nets use none.
    """
    if attention_mask is not None:
        message = "the U-Net was called with an attention mask; call it without one"
        raise ConfigurationError(message)
    normed = hidden_states
    if attn.group_norm is not None:
        normed = attn.group_norm(normed.transpose(1, 2)).transpose(1, 2)
    source = normed if encoder_hidden_states is None else encoder_hidden_states
    if attn.norm_cross and encoder_hidden_states is not None:
        source = attn.norm_encoder_hidden_states(source)
    query, key = (_split(attn, x) for x in (attn.to_q(normed), attn.to_k(source)))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, _split(attn, attn.to_v(source))


def finish(
    attn: Attention, mixed: Float[Tensor, "b heads n k"], residual: Float[Tensor, "b n c"]
) -> Float[Tensor, "b n c"]:
    """Return a layer's output: heads together again, projected, residual added if it has one."""
    output: Tensor = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
    if attn.residual_connection:
        output = output + residual
    return output / float(attn.rescale_output_factor)


def _split(attn: Attention, tokens: Tensor) -> Tensor:
    batch, count, channels = tokens.shape
    return tokens.view(batch, count, attn.heads, channels // attn.heads).transpose(1, 2)
