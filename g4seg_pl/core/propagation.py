"""Products of attention matrices with masks, none of the matrices ever stored whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.protocols import AttentionRecord

# Fused attention kernels want head sizes that are multiples of this.
_HEAD_MULTIPLE = 8
# Numbers formed at once where rows of the matrix are explicit: 128 MB in float32.
_BUDGET = 2**25


@dataclass(frozen=True)
class AffinityMatrix:
    """A, row-stochastic, of self-attention layers that share one token grid.

    Attributes:
        records: the layers; more draws of noise count as more heads.
        weights: of each layer, positive; only their proportions matter.
        form: ``heads``: the mean over heads and layers of softmax(p · logits), by the fused
            kernels. ``average``: the mean of the plain softmax over heads and layers, to the
            power p entry by entry, rows normalised again, in chunks of rows.
        power: p, positive; 1 leaves the attention as it is.
        sinkhorn_iterations: how often columns are normalised before the rows; 0 for rows alone.
    """

    records: tuple[AttentionRecord, ...]
    weights: tuple[float, ...]
    form: Literal["heads", "average"] = "average"
    power: float = 1.0
    sinkhorn_iterations: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the token grid."""
        return self.records[0].grid

    def propagate(
        self, values: Float[Tensor, "b c n"], products: int = 1
    ) -> Float[Tensor, "b c n"]:
        """Return A·values, all classes at once.

        Args:
            values: masks on the token grid, rows first.
            products: how often A is applied.
        """
        values = values.to(precise(self.records[0].query).dtype)
        match self.form:
            case "heads":
                biases = [self._head_biases(record) for record in self.records]
                for _ in range(products):
                    values = self._mean_over_heads(values, biases)
            case "average":
                columns = self._column_weights(values)
                for _ in range(products):
                    chunks = [rows @ values.mT for rows in self._rows(columns)]
                    values = torch.cat(chunks, dim=1).mT
        return values

    def _mean_over_heads(self, values: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
        total = torch.zeros_like(values)
        for record, weight, bias in zip(self.records, self.weights, biases, strict=True):
            total = total + weight * fused_product(values, record, self.power, bias)
        return total / sum(self.weights)

    def _head_biases(self, record: AttentionRecord) -> Float[Tensor, "b heads n"] | None:
        """Return what Sinkhorn adds to each column's logits, the logarithm of its weight."""
        if not self.sinkhorn_iterations:
            return None
        bias = precise(record.key).new_zeros(record.key.shape[:3])
        for _ in range(self.sinkhorn_iterations):
            columns = torch.zeros_like(bias)
            for begin, end in _chunks(record.query.shape):
                logits = self.power * _logits(record, begin, end) + bias[:, :, None]
                columns = columns + logits.softmax(-1).sum(2)
            bias = bias - columns.clamp_min(torch.finfo(bias.dtype).tiny).log()
        return bias

    def _column_weights(self, like: Tensor) -> Float[Tensor, "b n"]:
        weights = torch.ones_like(like[:, 0])
        for _ in range(self.sinkhorn_iterations):
            sums = torch.zeros_like(weights)
            for rows in self._rows(weights):
                sums = sums + rows.sum(1)
            weights = weights / sums.clamp_min(torch.finfo(sums.dtype).tiny)
        return weights

    def _rows(self, columns: Float[Tensor, "b n"]) -> Iterator[Float[Tensor, "b r n"]]:
        """Yield rows of the averaged, sharpened and normalised matrix."""
        shapes = [record.query.shape for record in self.records]
        for begin, end in _chunks(max(shapes, key=lambda shape: shape[1])):
            rows = torch.zeros((), dtype=columns.dtype, device=columns.device)
            for record, weight in zip(self.records, self.weights, strict=True):
                rows = rows + weight * _logits(record, begin, end).softmax(-1).mean(1)
            # The largest of a row is 1 before the power, so that no sharp row underflows.
            sharpened = (rows / rows.amax(-1, keepdim=True)).pow(self.power) * columns[:, None]
            yield sharpened / sharpened.sum(-1, keepdim=True)


def fused_product(
    values: Float[Tensor, "b c n"],
    record: AttentionRecord,
    power: float = 1.0,
    bias: Float[Tensor, "b heads n"] | None = None,
) -> Float[Tensor, "b c n"]:
    """Return the mean over heads of softmax(power · scale · QKᵀ + bias) · values.

    The masks of all classes are the channels of the attention's value, and a bias of the columns
    is one more channel of queries and keys: the fused kernels serve, and no n x n matrix exists.

    Args:
        values: masks on the token grid.
        record: the layer.
        power: multiplies the logits, positive.
        bias: added to the logits of each column.
    """
    query, key = precise(record.query), precise(record.key)
    scale = record.scale * power
    if bias is not None:
        query = torch.cat([query, torch.ones_like(query[..., :1])], dim=-1)
        key = torch.cat([key, (bias / scale)[..., None]], dim=-1)
    size = -(-query.shape[-1] // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
    query, key = (functional.pad(x, (0, size - x.shape[-1])) for x in (query, key))
    # Kernels on the CPU want values as wide as the keys: classes go in groups of that width.
    found = []
    for group in values.to(query.dtype).split(size, dim=1):
        channels = functional.pad(group.mT, (0, size - group.shape[1]))[:, None].contiguous()
        mixed = functional.scaled_dot_product_attention(
            query, key, channels.expand(-1, query.shape[1], -1, -1), scale=scale
        )
        found.append(mixed.mean(1)[..., : group.shape[1]].mT)
    return torch.cat(found, dim=1)


def gaussian_record(
    points: Float[Tensor, "b d h w"], sigma: float, name: str = "gaussian"
) -> AttentionRecord:
    """Return an attention whose matrix is the row-normalised Gaussian of distances.

    exp(-|x - y|²/2σ²) is, but for a factor of its row, exp((x·y - |y|²/2)/σ²): attention with one
    more channel.

    Args:
        points: what distances are taken of.
        sigma: σ, positive.
        name: of the record.
    """
    # Distances do not see where the origin lies; near it the products keep their digits.
    flat = points.flatten(2).mT
    flat = flat - flat.mean(1, keepdim=True)
    ones, lengths = torch.ones_like(flat[..., :1]), flat.square().sum(-1, keepdim=True)
    query = torch.cat([flat, ones], dim=-1)[:, None]
    key = torch.cat([flat, -lengths / 2], dim=-1)[:, None]
    grid = (points.shape[2], points.shape[3])
    return AttentionRecord(name, query, key, sigma**-2, grid)


def more_heads(draws: Sequence[AttentionRecord]) -> AttentionRecord:
    """Return one layer's records under several draws of noise as one, the draws as heads."""
    first = draws[0]
    query = torch.cat([record.query for record in draws], dim=1)
    key = torch.cat([record.key for record in draws], dim=1)
    return AttentionRecord(first.layer, query, key, first.scale, first.grid)


def precise(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least: masks are finer than 16-bit numbers."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _logits(record: AttentionRecord, begin: int, end: int) -> Float[Tensor, "b heads r n"]:
    return precise(record.query[:, :, begin:end]) @ precise(record.key).mT * record.scale


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    batch, heads, count = shape[:3]
    step = max(1, _BUDGET // (batch * heads * count))
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)
