"""Panoptic segments of query-based models, with their soft masks, and panoptic quality."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from g4seg_pl.core.resize import resize_maps

OWN_PIXEL = 0.5


@dataclass(frozen=True)
class PanopticSegments:
    """The segments of one image.

    Attributes:
        segments: int64 ``(H, W)``, 0 where there is none, n for the n-th segment.
        class_ids: the model's class of each segment, from 0.
        scores: mask probabilities of each segment, float32 ``(n, H, W)``.
    """

    segments: Int[Tensor, "H W"]
    class_ids: tuple[int, ...]
    scores: Float[Tensor, "n H W"]


def panoptic_segments(
    classes: Float[Tensor, "q c1"],
    masks: Float[Tensor, "q h w"],
    size: tuple[int, int],
    threshold: float = 0.8,
    overlap: float = 0.8,
    fused: Collection[int] = (),
) -> PanopticSegments:
    """Return segments as Mask2Former's inference finds them, soft masks kept.

    Every pixel goes to the query whose class probability times mask probability is highest; a
    query becomes a segment if it wins enough of the pixels where that product is at least 0.5.

    Args:
        classes: logits of each query, "no object" last.
        masks: mask logits of each query.
        size: height and width wanted.
        threshold: a query whose best class is no likelier is left out.
        overlap: share of its own mask a segment must keep.
        fused: classes of which all queries make one segment (stuff).
    """
    best, labels = classes.softmax(-1).max(-1)
    kept = labels.ne(classes.shape[1] - 1) & (best > threshold)
    probabilities = resize_maps(masks[kept].sigmoid(), size)
    segments = torch.zeros(size, dtype=torch.int64, device=masks.device)
    class_ids: list[int] = []
    scores: list[Tensor] = []
    weighted = probabilities * best[kept][:, None, None]
    winners = weighted.argmax(0) if kept.any() else segments
    for index, label in enumerate(labels[kept].tolist()):
        area = winners == index
        own = weighted[index] >= OWN_PIXEL
        if not (area.any() and own.any() and area.sum() / own.sum() > overlap):
            continue
        if label in fused and label in class_ids:
            place = class_ids.index(label)
            scores[place] = torch.maximum(scores[place], probabilities[index])
        else:
            place = len(class_ids)
            class_ids.append(label)
            scores.append(probabilities[index])
        segments[area] = place + 1
    soft = torch.stack(scores) if scores else masks.new_zeros(0, *size)
    return PanopticSegments(segments, tuple(class_ids), soft)


def panoptic_quality(
    pairs: Iterable[tuple[Int[Tensor, "H W 2"], Int[Tensor, "H W 2"]]],
    things: Collection[int],
    stuffs: Collection[int],
) -> float:
    """Return PQ over a data set, by torchmetrics.

    Args:
        pairs: prediction and truth of each image, class and instance of every pixel; a class
            that is in neither list counts as void.
        things: classes with instances.
        stuffs: classes without.
    """
    from torchmetrics.detection import PanopticQuality

    metric = PanopticQuality(set(things), set(stuffs), allow_unknown_preds_category=True)
    for predicted, truth in pairs:
        metric.update(predicted[None], truth[None])
    return float(metric.compute())
