"""The LightningModule that trains and tests a segmentation network."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from g4seg_pl.callbacks.crf import CRFSettings, require_crf
from g4seg_pl.segmentation.inference import (
    predict_probabilities,
    present_classes,
    sharpen_probabilities,
)
from g4seg_pl.segmentation.losses import CrossEntropy, SegmentationLoss, soft_maps
from g4seg_pl.segmentation.optimisation import (
    HEADS,
    freeze_batch_norm,
    parameter_groups,
    poly_factor,
)
from g4seg_pl.segmentation.outputs import Pretrained, padded_logits, resize_logits
from g4seg_pl.segmentation.scores import ConfusionMatrix, summary
from g4seg_pl.types import ConfigurationError, RefinedMask

OptimizerMaker = Callable[[Iterable[Any]], Optimizer]
Batch = dict[str, Any]


class SegmentationModule(pl.LightningModule):
    """Train a network on label maps; test it at the pictures' own size.

    Batches are dictionaries: ``image`` normalised float ``(B, 3, H, W)``, ``mask`` long
    ``(B, H, W)`` with 255 ignored and, for losses that use it, ``soft`` ``(B, C, H, W)``.

    Args:
        network: from images to logits at any size; see :mod:`g4seg_pl.segmentation.outputs`.
        loss: what is minimised, see :mod:`g4seg_pl.segmentation.losses`; cross entropy if None.
        optimizer: makes one for parameter groups; SGD with the field's settings if None.
        head_lr_factor: on the learning rate of the head.
        heads: names of the network's children that are the head.
        power: of the polynomial by which the learning rate falls to 0 over the run.
        warmup_steps: over which it first rises.
        frozen_batch_norm: fix batch norm outside the head, as DeepLabV2 is trained.
        scales: of the pictures in test and predict; validation looks once.
        flip: whether test and predict also look at the mirror image.
        size_multiple: pictures are padded so that their sides are a multiple of it, which networks
            of segmentation_models_pytorch need (16 or 32); masks keep the pictures' size.
        crf: run a dense CRF with these settings in test and predict; None does not.
        seed: of what is random within the network, together with the epoch.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[..., Any] | None = None,
        optimizer: OptimizerMaker | None = None,
        head_lr_factor: float = 10.0,
        heads: Sequence[str] = HEADS,
        power: float = 0.9,
        warmup_steps: int = 0,
        frozen_batch_norm: bool = False,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        size_multiple: int = 1,
        crf: CRFSettings | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss: SegmentationLoss = CrossEntropy() if loss is None else loss
        self.make_optimizer: OptimizerMaker = _field_sgd if optimizer is None else optimizer
        self.head_lr_factor = head_lr_factor
        self.heads = tuple(heads)
        self.power, self.warmup_steps = power, warmup_steps
        self.frozen_batch_norm = frozen_batch_norm
        self.scales, self.flip, self.crf = tuple(scales), flip, crf
        self.size_multiple = size_multiple
        self.seed = seed
        self.confusion: ConfusionMatrix | None = None
        self._label_names: tuple[str, ...] = ()
        self._loaded = False
        self.restored_from: str | None = None

    def configuration(self) -> dict[str, object]:
        """What decides a prediction, for the run record of a folder of predictions."""
        path = self.restored_from
        modified = Path(path).stat().st_mtime if path and Path(path).exists() else None
        return {
            "network": self.network,
            "checkpoint": path,
            "checkpoint_modified": modified,
            "scales": self.scales,
            "flip": self.flip,
            "size_multiple": self.size_multiple,
            "crf": self.crf,
            # Soft maps are a softmax's: read by datamodules.PseudoLabelDataModule.
            "marginals": True,
        }

    def setup(self, stage: str) -> None:
        """Prepare the counts; refuse what cannot work.

        Raises:
            ConfigurationError: a scale or multiple is not positive, the dense CRF is not installed,
                or the data does not say what its labels are.
        """
        if self.size_multiple < 1:
            msg = f"size_multiple is {self.size_multiple}: give 1 for no padding, or more"
            raise ConfigurationError(msg)
        if not self.scales or min(self.scales) <= 0:
            msg = f"scales are {list(self.scales)}: give at least one positive factor"
            raise ConfigurationError(msg)
        if self.crf is not None:
            require_crf()
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._label_names = tuple(getattr(datamodule, "label_names", ()))
        if not self._label_names:
            msg = (
                f"data: {type(datamodule).__name__} has no `label_names` (background first); use "
                "datamodules.PseudoLabelDataModule"
            )
            raise ConfigurationError(msg)
        self.confusion = ConfusionMatrix(len(self._label_names))

    def configure_model(self) -> None:
        """Fetch published weights, once, unless a checkpoint will overwrite them."""
        resumed = self.restored_from is not None
        if not self._loaded and not resumed and isinstance(self.network, Pretrained):
            self.network.load_pretrained()
        self._loaded = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "SegmentationModule":
        """Set training mode; frozen batch norms stay as they are."""
        super().train(mode)
        if self.frozen_batch_norm:
            freeze_batch_norm(self.network, self.heads)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, C, H, W)`` of normalised images ``(B, 3, H, W)``, at their size."""
        size = (images.shape[-2], images.shape[-1])
        return resize_logits(self.logits(images), size)

    def logits(self, images: Tensor) -> Tensor:
        """Return logits ``(B, C, h, w)`` of normalised images ``(B, 3, H, W)`` at any size."""
        return padded_logits(self.network, images, self.size_multiple)

    def on_train_epoch_start(self) -> None:
        """Let the network's own randomness depend on seed, epoch and process only.

        So a run that was killed and resumed goes on as if nothing had happened.
        """
        epoch, rank = self.current_epoch, self.global_rank
        torch.manual_seed(hash((self.seed, epoch, rank)) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """Return the loss of a batch.

        Raises:
            ConfigurationError: the network's labels are not the data's, or the soft maps have not
                got their form.
        """
        logits = self._checked(self(batch["image"]))
        loss: Tensor = self.loss(logits, batch["mask"], soft_maps(batch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(logits))
        self._log_step()
        return loss

    def _checked(self, logits: Tensor) -> Tensor:
        """Return logits ``(B, C, ...)`` whose C is the data's number of labels."""
        if self._label_names and logits.shape[1] != len(self._label_names):
            msg = (
                f"the network gives {logits.shape[1]} labels, the data has "
                f"{len(self._label_names)} (background included): set the network's num_labels"
            )
            raise ConfigurationError(msg)
        return logits

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """Count the pixels of a batch; returns the predicted labels ``(B, H, W)``.

        Raises:
            ConfigurationError: the network's labels are not the data's.
        """
        labels = self._checked(self(batch["image"])).argmax(1)
        self._count(labels, batch["mask"])
        return labels

    def test_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """Count the pixels of a batch by all scales; returns the labels ``(B, H, W)``."""
        labels = self.probabilities(batch["image"]).argmax(1)
        self._count(labels, batch["mask"])
        return labels

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[RefinedMask]:
        """Return label and soft maps of the classes found, one a picture."""
        probabilities = self.probabilities(batch["image"]).cpu()
        return [
            to_mask(image_id, each)
            for image_id, each in zip(batch["image_id"], probabilities, strict=True)
        ]

    def probabilities(self, images: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` by all scales, mirrored and sharpened as configured."""
        result = predict_probabilities(self.logits, images, self.scales, flip=self.flip)
        return result if self.crf is None else sharpen_probabilities(images, result, self.crf)

    def on_validation_epoch_end(self) -> None:
        """Log mIoU, pixel accuracy and every class's IoU, in percent."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log mIoU, pixel accuracy and every class's IoU, in percent."""
        self._log_scores("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimiser, and the polynomial that leads to 0 at the run's last step.

        Raises:
            ConfigurationError: the run has no end.
        """
        optimizer = self.make_optimizer(parameter_groups(self.network, self.heads))
        for group in optimizer.param_groups:
            group["lr"] *= self.head_lr_factor if group["name"] == "head" else 1
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            msg = "trainer: max_epochs and max_steps are both unlimited; set one of them"
            raise ConfigurationError(msg)
        schedule = LambdaLR(
            optimizer, lambda step: poly_factor(step, int(total), self.power, self.warmup_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    def _count(self, labels: Tensor, truth: Tensor) -> None:
        """Add a batch to the counts."""
        if self.confusion is None:
            msg = "no run was started: use Trainer.validate or Trainer.test"
            raise ConfigurationError(msg)
        self.confusion.update(labels.to(truth.device), truth)

    def _log_step(self) -> None:
        """Tell the loggers the step themselves: Lightning's own count is one off after a resume."""
        self.log("step", float(self.trainer.global_step), batch_size=1)

    def _log_scores(self, stage: str) -> None:
        """Log the scores of all processes and start again."""
        if self.confusion is None:
            return
        counts = self.confusion.compute().cpu().numpy()
        self.confusion.reset()
        scores = summary(counts, self._label_names)
        if stage == "val":
            self._log_step()
        # Each process has all counts by now: logging needs no further exchange.
        self.log(f"{stage}/miou", scores.pop("miou"), prog_bar=True, rank_zero_only=False)
        self.log_dict({f"{stage}/{name}": value for name, value in scores.items()})


def to_mask(
    image_id: str, probabilities: Tensor, allowed: Sequence[int] | None = None
) -> RefinedMask:
    """Return the most probable labels of one picture with their classes' maps.

    Args:
        image_id: of the picture.
        probabilities: ``(C, H, W)``, background first.
        allowed: label values that may be present, None for all.
    """
    seed = present_classes(probabilities, allowed)
    background = 1 - seed.scores.sum(0, keepdim=True)
    values = torch.tensor([0, *seed.class_ids], dtype=torch.uint8)
    label = values[torch.cat([background, seed.scores]).argmax(0)]
    return RefinedMask(image_id, seed.class_ids, seed.scores, label)


def _field_sgd(groups: Iterable[Any]) -> Optimizer:
    """SGD as DeepLabV2 is trained on VOC."""
    return SGD(groups, lr=2.5e-4, momentum=0.9, weight_decay=5e-4)
