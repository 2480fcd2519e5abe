"""What all makers of coarse masks share: batches in, masks out, failures named."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.background import BackgroundRule, Threshold, compose_label
from g4seg_pl.types import (
    BadItemError,
    ConfigurationError,
    FailedSample,
    G4SegError,
    RefinedMask,
    Sample,
    check_class_count,
)

# What may be wrong with one image while the others are fine.
ITEM_ERRORS = (G4SegError, FloatingPointError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class ClassMaps:
    """One map for each class that is present in each image of a batch.

    Attributes:
        owner: int64 ``(m,)``, the image each map belongs to, ascending.
        class_index: int64 ``(m,)``, column of the class in ``present``, ascending in an image.
        maps: ``(m, h, w)`` in [0, 1].
    """

    owner: Int[Tensor, " m"]
    class_index: Int[Tensor, " m"]
    maps: Float[Tensor, "m h w"]


class SeedMaker(pl.LightningModule, ABC):
    """A frozen model that makes the coarse masks of one image at a time.

    Subclasses load their weights in ``configure_model`` and make maps in ``make``. Weights are
    never put into a checkpoint.

    Args:
        background: how the background is scored when label maps are made.

    Attributes:
        class_names: names of each class, of makers that look for classes of their own; None where
            the data set's are drawn.
    """

    def __init__(self, background: BackgroundRule | None = None) -> None:
        super().__init__()
        self.background: BackgroundRule = background or Threshold()
        self.class_names: list[list[str]] | None = None
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        """Refuse more classes than masks can number, before any weights are loaded.

        A subclass with a ``setup`` of its own calls this one.

        Raises:
            ConfigurationError: the maker's own class names, or else the data's, are too many.
        """
        if stage == "fit":  # no mask is written
            return
        classes = self.data_classes()
        if self.class_names is not None:
            check_class_count("class_names", len(self.class_names))
        elif classes is not None:
            check_class_count("data.class_names", len(classes))

    def data_classes(self) -> Any:
        """Return the class list of the run's data module; None where there is neither."""
        datamodule = getattr(self._trainer, "datamodule", None)
        return getattr(datamodule, "class_list", None)

    @abstractmethod
    def make(self, sample: Sample) -> RefinedMask:
        """Make the masks of one image, on the CPU, at the image's own size.

        Called without inference mode and without gradients; gradients may be enabled inside.
        """

    def composed(self, sample: Sample, maps: Float[Tensor, "k H W"]) -> RefinedMask:
        """Return maps of the image's own classes with the label map of the background rule."""
        scores = maps.float().cpu()
        label = compose_label(scores, sample.seed.class_ids, self.background)
        return RefinedMask(sample.image_id, sample.seed.class_ids, scores, label)

    def predict_step(
        self, batch: list[Sample | FailedSample], batch_idx: int = 0
    ) -> list[RefinedMask | FailedSample]:
        """Make the masks of a batch of images of any sizes.

        Returns:
            one an item, in order; an image that cannot be used becomes a ``FailedSample``.
        """
        # Lightning predicts in inference mode, whose tensors could never get a gradient.
        with torch.inference_mode(mode=False), torch.no_grad():
            return [self._outcome(item) for item in batch]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen weights out: the arguments say where they are found."""
        checkpoint["state_dict"] = {}

    def _outcome(self, item: Sample | FailedSample) -> RefinedMask | FailedSample:
        if isinstance(item, FailedSample):
            return item
        try:
            return self.make(item)
        except ITEM_ERRORS as error:
            return FailedSample(item.image_id, _remedy(error))

    def _check_data_classes(self, argument: str, count: int, remedy: str) -> None:
        """Refuse a network of other classes than the data's; without a class list all will do.

        Args:
            argument: what named the network, for errors.
            count: how many classes it has, the background aside.
            remedy: what to give instead, for errors.

        Raises:
            ConfigurationError: label values would go by wrong names, or by none.
        """
        classes = self.data_classes()
        if classes is not None and count != len(classes):
            message = (
                f"{argument}: the network has {count} classes, the data's class list "
                f"{len(classes)}; {remedy}"
            )
            raise ConfigurationError(message)

    def _needs_loading(self, network: object) -> bool:
        """Whether weights are wanted and not there; none are for a run that is finished."""
        trainer = self._trainer
        idle = trainer is not None and trainer.predicting and trainer.limit_predict_batches == 0
        return network is None and not idle


def _remedy(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory: make the images smaller, or run on the CPU"
    return str(error)


def require_classes(sample: Sample) -> None:
    """Refuse an image without image-level classes.

    Raises:
        BadItemError: this maker draws only classes it is told of, and was told none.
    """
    if not sample.class_names:
        message = f"{sample.image_id} has no image-level classes; set data.labels"
        raise BadItemError(message)


def resize_picture(
    image: UInt8[Tensor, "3 H W"],
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Float[Tensor, "1 3 h w"]:
    """Return a picture resized by Pillow, as the public implementations do, in [-1, 1].

    Args:
        image: RGB, on any device.
        size: height and width wanted.
        resample: Pillow's filter.
    """
    pixels = image.permute(1, 2, 0).cpu().numpy()
    if pixels.shape[:2] != size:
        pixels = np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), resample))
    return torch.tensor(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def resize_bilinear(
    image: UInt8[Tensor, "3 H W"], size: tuple[int, int]
) -> Float[Tensor, "1 3 h w"]:
    """Return a picture resized without smoothing to whole steps, as OpenCV does, in [-1, 1].

    Args:
        image: RGB.
        size: height and width wanted.
    """
    pixels = image[None].float()
    if tuple(image.shape[1:]) != size:
        pixels = functional.interpolate(pixels, size, mode="bilinear", align_corners=False).round()
    return pixels / 127.5 - 1


def keep_ratio(size: tuple[int, int], shorter: int, longer: int = 2048) -> tuple[int, int]:
    """Return the size with its shorter side scaled, or the longer one where that reaches its bound.

    Args:
        size: height and width.
        shorter: side wanted, in pixels.
        longer: bound of the other side.
    """
    scale = min(shorter / min(size), longer / max(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)
