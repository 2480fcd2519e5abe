"""Mean-field inference of a dense CRF on one image, and the settings the field uses.

Needs the extra ``g4seg-pl[crf]`` (``pydensecrf2``), which is imported when it is used. torch is not
imported here: the processes of a pool would each have to.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SMALLEST_PROBABILITY = 1e-5

Preset = Literal[
    "clip_es",
    "more",
    "irn",
    "seam",
    "mctformer",
    "weaktr",
    "weaktr_online",
    "toco",
    "toco_seg",
    "afa",
]


@dataclass(frozen=True)
class CRFSettings:
    """Parameters of the fully connected CRF; widths are standard deviations.

    Attributes:
        gaussian_width: of the smoothness kernel, pixels.
        gaussian_weight: of the smoothness kernel (compat).
        bilateral_width: of the appearance kernel in space, pixels.
        bilateral_colour: of the appearance kernel in colour, 0-255.
        bilateral_weight: of the appearance kernel (compat).
        iterations: of mean-field inference.
        unary: ``softmax`` takes -log of the probabilities; ``scores`` takes -log of a softmax over
            them, as if they were logits, which makes for a far weaker unary; ``labels`` takes the
            most probable label as right with probability ``label_confidence``.
        label_confidence: see ``unary``; in (0, 1).
    """

    gaussian_width: float = 1.0
    gaussian_weight: float = 3.0
    bilateral_width: float = 67.0
    bilateral_colour: float = 3.0
    bilateral_weight: float = 4.0
    iterations: int = 10
    unary: Literal["softmax", "scores", "labels"] = "softmax"
    label_confidence: float = 0.7

    def scaled(self, factor: float) -> "CRFSettings":
        """The same settings for pictures ``factor`` times as large: pixel widths grow with it."""
        return replace(
            self,
            gaussian_width=self.gaussian_width * factor,
            bilateral_width=self.bilateral_width * factor,
        )


def preset(name: Preset) -> CRFSettings:
    """The settings of a public project, as its code has them (10 iterations each).

    Args:
        name: ``clip_es`` (also WeakTr's online COCO run), ``more`` (MoRe's pseudo-labels: the
            same numbers), ``irn``, ``seam`` (also PSA and the usual pydensecrf default),
            ``mctformer``, ``weaktr`` (the same numbers on labels), ``weaktr_online``, ``toco``
            (on scores), ``toco_seg`` (its segmentation evaluation), ``afa``.

    Returns:
        settings made for VOC-sized pictures; see :meth:`CRFSettings.scaled`.
    """
    match name:
        case "clip_es" | "more":
            return CRFSettings(1, 3, 67, 3, 4)
        case "irn":
            return CRFSettings(3, 3, 50, 5, 10, unary="labels", label_confidence=0.7)
        case "seam":
            return CRFSettings(3, 3, 80, 13, 10)
        case "mctformer":
            return CRFSettings(4, 3, 83, 5, 3)
        case "weaktr":
            return CRFSettings(4, 3, 83, 5, 3, unary="labels", label_confidence=0.7)
        case "weaktr_online":
            return CRFSettings(3, 3, 83, 5, 3)
        case "toco":
            return CRFSettings(3, 3, 36, 3, 4, unary="scores")
        case "toco_seg":
            return CRFSettings(1, 1, 121, 5, 4)
        case "afa":
            return CRFSettings(3, 3, 64, 5, 4)


def require_crf() -> Any:
    """The ``pydensecrf`` package.

    Raises:
        ConfigurationError: if it is not installed; names the extra that brings it.
    """
    try:
        import pydensecrf.densecrf
        import pydensecrf.utils
    except ImportError as error:
        from g4seg_pl.types import ConfigurationError

        msg = "dense CRF needs pydensecrf2: pip install 'g4seg-pl[crf]'"
        raise ConfigurationError(msg) from error
    return pydensecrf


def dense_crf(
    image: NDArray[np.uint8], probabilities: NDArray[Any], settings: CRFSettings
) -> NDArray[np.float32]:
    """Run mean-field inference on one image.

    Args:
        image: uint8 ``(H, W, 3)``, RGB.
        probabilities: ``(L, H, W)``, background first. They need not sum to 1: a factor common to
            all labels of a pixel changes nothing.
        settings: see :class:`CRFSettings`.

    Returns:
        float32 ``(L, H, W)``, summing to 1 over the labels.

    Raises:
        ValueError: if image and probabilities differ in size, or the image is not uint8.
        ConfigurationError: if pydensecrf is not installed.
    """
    crf = require_crf()
    labels, height, width = probabilities.shape
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        msg = f"image must be uint8 ({height}, {width}, 3), got {image.dtype} {image.shape}"
        raise ValueError(msg)
    if labels == 1:
        return np.ones((1, height, width), np.float32)
    field = crf.densecrf.DenseCRF2D(width, height, labels)
    field.setUnaryEnergy(_unary(crf, probabilities, settings))
    field.addPairwiseGaussian(sxy=settings.gaussian_width, compat=settings.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_width,
        srgb=settings.bilateral_colour,
        rgbim=np.ascontiguousarray(image),
        compat=settings.bilateral_weight,
    )
    marginals = np.asarray(field.inference(settings.iterations), np.float32)
    return marginals.reshape(labels, height, width)


def _unary(crf: Any, probabilities: NDArray[Any], settings: CRFSettings) -> NDArray[np.float32]:
    """Energies ``(L, H * W)``, float32 and contiguous as the C++ code wants them."""
    labels = len(probabilities)
    if settings.unary == "labels":
        winners = probabilities.argmax(axis=0)
        energies = crf.utils.unary_from_labels(
            winners, labels, gt_prob=settings.label_confidence, zero_unsure=False
        )
        return np.ascontiguousarray(energies, np.float32)
    flat = probabilities.reshape(labels, -1).astype(np.float32)
    if settings.unary == "scores":
        flat = np.exp(flat) / np.exp(flat).sum(axis=0)
    return np.ascontiguousarray(-np.log(np.clip(flat, SMALLEST_PROBABILITY, 1.0)))
