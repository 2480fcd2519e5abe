"""Prediction at the picture's own size: several scales, mirror images, dense CRF."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.callbacks.crf import CRFSettings, dense_crf
from g4seg_pl.segmentation.normalisation import denormalise
from g4seg_pl.segmentation.outputs import logits_of, resize_logits
from g4seg_pl.types import Seed

Network = Callable[[Tensor], object]
SHORTEST_SIDE = 32


def predict_probabilities(
    network: Network, images: Tensor, scales: Sequence[float] = (1.0,), *, flip: bool = False
) -> Tensor:
    """Average the class probabilities over scales and mirror images.

    Args:
        network: from normalised images to logits at any size.
        images: normalised ``(B, 3, H, W)``.
        scales: factors on both sides; the probabilities are brought back to ``(H, W)``.
        flip: also look at the mirror image.

    Returns:
        float32 ``(B, C, H, W)``, summing to 1 over C.
    """
    size = (images.shape[-2], images.shape[-1])
    total = torch.zeros(())
    for scale in scales:
        scaled = _scaled(images, scale)
        views = [(scaled, False), (scaled.flip(-1), True)] if flip else [(scaled, False)]
        for view, mirrored in views:
            logits = resize_logits(logits_of(network(view)), size)
            probabilities = logits.softmax(dim=1)
            total = total.to(logits) + (probabilities.flip(-1) if mirrored else probabilities)
    return total / (len(scales) * (2 if flip else 1))


def sharpen_probabilities(images: Tensor, probabilities: Tensor, settings: CRFSettings) -> Tensor:
    """Run the dense CRF on every picture, on the CPU.

    Args:
        images: normalised ``(B, 3, H, W)``.
        probabilities: ``(B, C, H, W)``.
        settings: of the CRF.

    Returns:
        marginals, float32 ``(B, C, H, W)`` on the CPU.
    """
    pictures = denormalise(images).permute(0, 2, 3, 1).cpu().numpy()
    pairs = zip(pictures, probabilities.cpu().numpy(), strict=True)
    marginals = [
        dense_crf(np.ascontiguousarray(picture), scores, settings) for picture, scores in pairs
    ]
    return torch.from_numpy(np.stack(marginals))


def present_classes(probabilities: Tensor, allowed: Sequence[int] | None = None) -> Seed:
    """Keep the classes that win somewhere, and share out the others' probability.

    Args:
        probabilities: ``(C, H, W)`` of one picture, background first.
        allowed: label values that may be present; None allows all.

    Returns:
        the classes' maps; with the background's they sum to 1, so the background is what is
        missing to 1, and the most probable label stays what it was among those kept.
    """
    candidates = [0, *(range(1, len(probabilities)) if allowed is None else sorted(set(allowed)))]
    best = probabilities[candidates].argmax(0).unique().tolist()
    kept = [candidates[index] for index in best if candidates[index] != 0]
    scores = probabilities[[0, *kept]].float().cpu()
    shares = scores / scores.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    return Seed(tuple(kept), shares[1:].contiguous())


def _scaled(images: Tensor, scale: float) -> Tensor:
    """Resize images by a factor; no side becomes shorter than what networks can take."""
    if scale == 1:
        return images
    size = [max(SHORTEST_SIDE, round(side * scale)) for side in images.shape[-2:]]
    return functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
