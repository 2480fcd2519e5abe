"""The denoising loss of candidate masks, all under the same noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.generation import (
    Groups,
    Rows,
    groups_per_class,
    groups_per_image,
    rows_per_class,
    rows_per_image,
)
from g4seg_pl.core.loss import DenoisingLoss
from g4seg_pl.core.paired import Paired


@dataclass(frozen=True)
class PairedLosses(Paired):
    """Denoising losses of candidate masks, all under the same noise.

    Attributes:
        losses: ``(k, m, n)``: of every candidate, mask and draw (timesteps times draws).
        maps: ``(k, m, n, h, w)``, the same at every place; None if not asked for.
    """

    losses: Float[Tensor, "k m n"]
    maps: Float[Tensor, "k m n h w"] | None = None

    def without_last(self) -> "PairedLosses":
        """Return all candidates but the last."""
        return PairedLosses(self.losses[:-1], None if self.maps is None else self.maps[:-1])

    def paired(self, reference: int) -> Float[Tensor, "k m n"]:
        """Return log L - log L_reference."""
        logarithms = torch.log(self.losses)
        return logarithms - logarithms[reference]


@torch.no_grad()
def paired_losses(
    candidates: Sequence[Float[Tensor, "m H W"]],
    context: RefinementContext,
    timesteps: Sequence[int] = (400,),
    draws: int = 2,
    *,
    loss: DenoisingLoss | None = None,
    all_classes_at_once: bool = False,
    keep_maps: bool = False,
    noise_per_timestep: bool = False,
) -> PairedLosses:
    """Return the denoising loss of every candidate for every mask, under common noise.

    Args:
        candidates: each all masks of the context, in [0, 1]; all zeros is the empty mask.
        context: the images.
        timesteps: each is met by every draw.
        draws: draws of noise at each timestep.
        loss: how masks are injected; None binarises at 0.5 and injects with weight 20.
        all_classes_at_once: one row an image, with one loss for all of its masks.
        keep_maps: return the losses of every place too.
        noise_per_timestep: no two timesteps share a draw, so that a mean over them averages more
            of the noise out; shared draws let losses be compared from timestep to timestep.
    """
    loss = DenoisingLoss(injection_weight=20.0) if loss is None else loss
    pairs = list(product(timesteps, range(draws)))
    if noise_per_timestep:
        pairs = [(timestep, number) for number, (timestep, _) in enumerate(pairs)]
    losses, maps = [], []
    for candidate in candidates:
        groups, rows = _rows(candidate, context, all_classes_at_once=all_classes_at_once)
        found = torch.stack([_maps(rows, context, loss, t, draw) for t, draw in pairs], dim=1)
        per_mask = _for_each_mask(found, groups)
        losses.append(per_mask.flatten(2).mean(2))
        if keep_maps:
            maps.append(per_mask)
    return PairedLosses(torch.stack(losses), torch.stack(maps) if keep_maps else None)


def _rows(
    foreground: Tensor, context: RefinementContext, *, all_classes_at_once: bool
) -> tuple[Groups, Rows]:
    if all_classes_at_once:
        return groups_per_image(context), rows_per_image(foreground, context)
    return groups_per_class(context), rows_per_class(foreground, context)


def _maps(
    rows: Rows, context: RefinementContext, loss: DenoisingLoss, timestep: int, draw: int
) -> Float[Tensor, "r h w"]:
    parts = context.parts(len(rows))
    return torch.cat([loss.maps(rows.part(part), context, timestep, draw) for part in parts])


def _for_each_mask(per_row: Float[Tensor, "r n h w"], groups: Groups) -> Float[Tensor, "m n h w"]:
    most = max(len(group) for group in groups.members)
    return groups.scatter(per_row[:, None].expand(-1, most, -1, -1, -1))
