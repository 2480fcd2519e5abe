"""The match of all locations with all, against the bare matrix product."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.bench.allocation import peak_allocated
from g4seg_pl.bench.rows import Bar, Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.timing import describe_pairs, interleaved, ratio
from g4seg_pl.core.correspondence import nearest_neighbours

CHANNELS = 512
SIDES = {"tiny": 48, "sd21": 128}
PRODUCT_ROWS = 256


def match(setting: Setting) -> Iterator[Row]:
    """Yield time and memory of ``nearest_neighbours``; 128×128 locations at full size, else 48×48.

    Args:
        setting: size, place and rounds.
    """
    side = SIDES[setting.size.name]
    generator = torch.Generator().manual_seed(0)
    shape = (1, CHANNELS, side, side)
    queries, references = (
        torch.randn(shape, generator=generator).to(setting.device) for _ in range(2)
    )
    what = f"{side}×{side} against {side}×{side} locations, {CHANNELS} channels, float32"

    def matched() -> Tensor:
        return nearest_neighbours(queries, references)

    def product() -> None:
        bare_product(queries, references)

    spent = interleaved({"match": matched, "product": product}, setting.rounds, setting.device)
    detail = f"{describe_pairs(spent['match'], spent['product'])}; {what}"
    value = ratio(spent["match"], spent["product"])
    yield Row("match: time / bare matrix product", value, "×", setting.bar(1.5), detail)
    extra = peak_allocated(matched, setting.device) / 2**20
    detail = f"most allocated at once beyond the features themselves; {what}"
    yield Row("match: extra memory", extra, "MiB", Bar(64), detail)


def bare_product(queries: Tensor, references: Tensor) -> None:
    """QᵀR in strips of rows into one buffer: the fastest that forms every similarity once."""
    wanted, offered = queries[0].flatten(1).T.contiguous(), references[0].flatten(1)
    strip = offered.new_empty(PRODUCT_ROWS, offered.shape[1])
    for rows in wanted.split(PRODUCT_ROWS):
        torch.mm(rows, offered, out=strip[: len(rows)])


def dense_match(queries: Tensor, references: Tensor) -> Tensor:
    """The n × n matrix and its largest entries, as first implementations have it."""
    wanted = functional.normalize(queries.flatten(2), dim=1)
    offered = functional.normalize(references.flatten(2), dim=1)
    return (wanted.mT @ offered).argmax(-1)
