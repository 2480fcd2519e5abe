"""Does the better mask explain the image better? The claim p(S|x) ∝ p(x|S)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from g4seg_pl.callbacks.run_record import Json
from g4seg_pl.core.loss import DenoisingLoss
from g4seg_pl.core.paired_losses import paired_losses
from g4seg_pl.core.resize import masks_to_working
from g4seg_pl.lab.chain import ChainRunner, labels_of, make_batch
from g4seg_pl.lab.controls import true_masks
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.runner import BATCH
from g4seg_pl.lab.sources import SeedKind, mask_iou
from g4seg_pl.lab.stages import Batch, Masks, Way
from g4seg_pl.lab.table import Cell, Table
from g4seg_pl.lab.tables.groups import clustered_mean
from g4seg_pl.lab.tables.refinement import TIMESTEPS
from g4seg_pl.types import ConfigurationError
from g4seg_pl.world.degrade import Fault, degrade

Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]
SPOILT: tuple[Fault, ...] = ("dilate", "erode", "shift", "low_resolution")
# Hard masks of a batch by name, each (m, H, W) at native size.
Candidates = Callable[[Batch, ChainRunner], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Explained:
    """Denoising losses and IoUs of candidate masks.

    Attributes:
        names: of the candidates.
        losses: ``(k, m, t, d)``: candidate, mask, timestep, draw of noise.
        ious: ``(k, m)``, with the true mask of the class.
        image: ``(m,)``, index of each mask's image.
    """

    names: tuple[str, ...]
    losses: Floats
    ious: Floats
    image: NDArray[np.int64]

    def logarithms(self) -> Floats:
        """Mean over timesteps and draws of log L, ``(k, m)``."""
        found: Floats = np.log(self.losses).mean(axis=(2, 3))
        return found


@dataclass(frozen=True)
class Measurement:
    """How losses are measured.

    Attributes:
        timesteps: each met by every draw.
        draws: of noise.
        injection_weight: w of Eq. 5.
    """

    timesteps: tuple[int, ...] = TIMESTEPS
    draws: int = 2
    injection_weight: float = 20.0

    def describe(self) -> Json:
        """In terms JSON can hold."""
        return [list(self.timesteps), self.draws, self.injection_weight]


def kept_by_batch(
    lab: Lab,
    kind: SeedKind,
    area: str,
    what: Mapping[str, Json],
    measure: Callable[[Batch, Masks], Arrays],
) -> Iterator[Arrays]:
    """Yield what is measured on each batch of the lab's test scenes, kept on disk.

    Args:
        lab: models and store.
        kind: of seeds.
        area: of the store.
        what: that determines the results besides scenes, seeds and models.
        measure: makes them from a batch and its coarse masks.
    """
    source, rule = lab.source(kind), lab.background(kind)
    models = lab.models.identity(lab.features)
    for start in range(0, len(source.ids), BATCH):
        ids = source.ids[start : start + BATCH]
        described = {
            **what,
            "source": source.describe(),
            "background": rule.value,
            "models": models,
            "ids": list(ids),
        }
        saved = lab.store.load(area, described)
        if saved is None:
            samples = source.samples(ids)
            with torch.no_grad():
                batch = make_batch(lab.refiner(), samples)
                seeds = Masks(tuple(each.seed.scores for each in samples), rule)
                saved = measure(batch, seeds)
            lab.store.save(area, described, saved)
        yield saved


def explain(
    lab: Lab, kind: SeedKind, name: Json, candidates: Candidates, how: Measurement
) -> Explained:
    """Measure candidates on the lab's test scenes, a batch at a time, kept on disk.

    Args:
        lab: models and store.
        kind: of seeds.
        name: what the candidates are, for the store.
        candidates: makes them for a batch.
        how: timesteps, draws and weight.
    """

    def measure(batch: Batch, seeds: Masks) -> Arrays:
        return _measure(batch, candidates(batch, ChainRunner(batch, seeds)), how)

    what = {"candidates": name, "how": how.describe()}
    parts = [
        Explained(
            tuple(str(each) for each in saved["names"]),
            saved["losses"].astype(np.float64),
            saved["ious"].astype(np.float64),
            saved["image"].astype(np.int64) + index * BATCH,
        )
        for index, saved in enumerate(kept_by_batch(lab, kind, "explained", what, measure))
    ]
    return Explained(
        parts[0].names,
        np.concatenate([part.losses for part in parts], axis=1),
        np.concatenate([part.ious for part in parts], axis=1),
        np.concatenate([part.image for part in parts]),
    )


def _measure(batch: Batch, found: Mapping[str, Tensor], how: Measurement) -> Arrays:
    context = batch.context
    size = (context.images.shape[2], context.images.shape[3])
    working = [masks_to_working(each, size).to(context.images.device) for each in found.values()]
    loss = DenoisingLoss(how.injection_weight)
    losses = paired_losses(working, context, how.timesteps, how.draws, loss=loss).losses
    shape = (len(found), len(context.owner), len(how.timesteps), how.draws)
    exact = torch.cat(true_masks(batch)).numpy() > 0.5
    ious = [
        [mask_iou(mask > 0.5, true) for mask, true in zip(each.numpy(), exact, strict=True)]
        for each in found.values()
    ]
    return {
        "names": np.asarray(list(found), dtype=np.str_),
        "losses": losses.reshape(shape).cpu().numpy(),
        "ious": np.asarray(ious),
        "image": context.owner.cpu().numpy(),
    }


def hard_masks(batch: Batch, masks: Masks) -> Tensor:
    """Return, for every class, where the label map says so, ``(m, H, W)``."""
    labels = labels_of(masks, batch.samples)
    pairs = zip(labels, batch.samples, strict=True)
    parts = [
        torch.stack([(label == each).float() for each in sample.seed.class_ids])
        for label, sample in pairs
    ]
    return torch.cat(parts)


def true_and_spoilt(batch: Batch, _chains: ChainRunner) -> dict[str, Tensor]:
    """The truth, and the truth spoilt in four ways."""
    exact = torch.cat(true_masks(batch))
    found = {"truth": exact}
    for fault in SPOILT:
        spoilt = [degrade(mask.numpy() > 0.5, fault, row) for row, mask in enumerate(exact)]
        found[f"truth, {fault}"] = (torch.from_numpy(np.stack(spoilt)) > 0.5).float()
    return found


def _seed(batch: Batch, chains: ChainRunner) -> dict[str, Tensor]:
    return {"seed": hard_masks(batch, chains.run(Way("seed")).masks)}


def _with_all_others(batch: Batch, chains: ChainRunner) -> dict[str, Tensor]:
    """The truth and the seed, the truth spoilt, nothing, and other masks' shapes."""
    exact = torch.cat(true_masks(batch))
    found = {"truth": exact} | _seed(batch, chains) | true_and_spoilt(batch, chains)
    found["empty"] = torch.zeros_like(exact)
    found["shuffled"] = exact.roll(1, 0) if len(exact) > 1 else exact.flip(1, 2)
    return found


def _truth_of(first: Explained, other: Explained) -> Explained:
    """Return what was measured on the truth, beside other candidates for the same masks.

    Raises:
        ConfigurationError: they are not the same masks.
    """
    if not np.array_equal(first.image, other.image):
        message = "kinds of seeds differ in the classes of images; make a claim table of each alone"
        raise ConfigurationError(message)
    return Explained(
        (*first.names[:1], *other.names),
        np.concatenate([first.losses[:1], other.losses]),
        np.concatenate([first.ious[:1], other.ious]),
        first.image,
    )


def claim(lab: Lab, how: Measurement | None = None) -> Table:
    """Share of masks whose truth explains the image better than another mask, per t."""
    how = how or Measurement(draws=len(lab.noise_seeds))
    rows: list[dict[str, Cell]] = []
    first = explain(lab, lab.kinds[0], "claim", _with_all_others, how)
    for kind in lab.kinds:
        found = first
        if kind != lab.kinds[0]:
            # The truth does not depend on the seeds, nor does the noise it meets.
            found = _truth_of(first, explain(lab, kind, "seed", _seed, how))
        for other in range(1, len(found.names)):
            differ = found.ious[other] < 1.0
            for index, timestep in enumerate(how.timesteps):
                logs = np.log(found.losses[:, :, index]).mean(axis=2)
                change = (logs[other] - logs[0])[differ]
                rows.append(_claim_row(lab, kind, found, other, timestep, change, differ))
    note = (
        "`share` is how often the true mask has the lower loss of ε under the same noise; "
        "`loss saved` is the mean of log L(other) - log L(truth), in percent."
    )
    title = "The core claim: the better mask reconstructs better"
    protocol = dict(lab.protocol(*lab.kinds)) | {
        "noise seeds": how.draws,
        "injection weight": how.injection_weight,
    }
    return Table("claim", title, tuple(rows), protocol, (note,), ("loss saved",))


def _claim_row(
    lab: Lab,
    kind: SeedKind,
    found: Explained,
    other: int,
    timestep: int,
    change: Floats,
    differ: NDArray[np.bool_],
) -> dict[str, Cell]:
    image, total = found.image[differ], lab.images
    share, share_se = clustered_mean(np.where(change > 0, 100.0, 0.0), image, total, lab.resamples)
    saved, saved_se = clustered_mean(100 * change, image, total, lab.resamples)
    return {
        "truth against": f"{found.names[other]} ({kind})" if other == 1 else found.names[other],
        "t": timestep,
        "masks": len(change),
        "share %": share,
        "share %_se": share_se,
        "loss saved %": saved,
        "loss saved %_se": saved_se,
    }
