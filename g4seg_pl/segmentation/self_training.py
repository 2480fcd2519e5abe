"""Self-training: pseudo-labels made anew from the network's own predictions while it trains."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from datamodules.items import Item
from datamodules.pseudo_labels import PseudoLabelDataModule
from datamodules.training_items import MaskReader
from g4seg_pl.callbacks.output_folder import OutputFolder
from g4seg_pl.callbacks.run_record import describe, write_text_atomically
from g4seg_pl.callbacks.writer import json_text
from g4seg_pl.module import G4SegModule
from g4seg_pl.segmentation.inference import predict_probabilities
from g4seg_pl.segmentation.module import SegmentationModule, to_mask
from g4seg_pl.segmentation.normalisation import normalise
from g4seg_pl.types import ConfigurationError, FailedSample, RefinedMask, Sample, Seed


class RefreshPseudoLabels(Callback):
    """Every few epochs, predict the training images, refine the predictions, and train on those.

    Only classes that the image's present mask holds may be predicted: image-level labels stay.
    Each refresh gets a folder of its own, ``OUT/epoch<k>``, as ``g4seg predict`` would write it.

    Args:
        out: folder for the masks of all refreshes.
        refiner: refines the predictions; None trains on the predictions as they are.
        every_n_epochs: between refreshes.
        first_epoch: epochs to train before the first one.
        scales: at which the network looks at the pictures.
        flip: whether it also looks at their mirror images.
    """

    def __init__(
        self,
        out: str | Path,
        refiner: G4SegModule | None = None,
        every_n_epochs: int = 5,
        first_epoch: int = 0,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
    ) -> None:
        super().__init__()
        if every_n_epochs < 1:
            msg = f"every_n_epochs is {every_n_epochs}: give 1 or more"
            raise ConfigurationError(msg)
        self.out = Path(out)
        self.refiner = refiner
        self.every_n_epochs, self.first_epoch = every_n_epochs, first_epoch
        self.scales, self.flip = scales, flip
        self._labels: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        """The folder that is trained on, for a resumed run."""
        return {"labels": None if self._labels is None else str(self._labels)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the folder of the run that is resumed."""
        labels = state_dict["labels"]
        self._labels = None if labels is None else Path(labels)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the masks of the run that is resumed; refuse other modules and data."""
        if not isinstance(pl_module, SegmentationModule):
            msg = f"RefreshPseudoLabels needs a SegmentationModule, got {type(pl_module).__name__}"
            raise ConfigurationError(msg)
        if self._labels is not None:
            _data(trainer).use_labels(self._labels)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refresh, if it is time and another epoch follows."""
        done = trainer.current_epoch + 1
        due = done >= self.first_epoch and done % self.every_n_epochs == 0
        last = done == trainer.max_epochs or trainer.global_step >= trainer.max_steps > 0
        root = self.out / f"epoch{done:03d}"
        # A resumed run ends the epoch it stopped after once more.
        again = root == self._labels
        if due and not last and not again and isinstance(pl_module, SegmentationModule):
            self._refresh(trainer, pl_module, root)

    def _refresh(self, trainer: pl.Trainer, module: SegmentationModule, root: Path) -> None:
        """Write the masks of all training images, each process its share, and use them."""
        data = _data(trainer)
        images = data.training_images
        folder = OutputFolder(root, "npz" if data.soft else "none")
        folder.make()
        was_training = module.training
        module.eval()
        for item in images.items[trainer.global_rank :: trainer.world_size]:
            folder.save(self._relabel(module, images.reader, item, data))
        module.train(was_training)
        if trainer.is_global_zero:
            write_text_atomically(folder.run_json, json_text(self._record(data)))
        trainer.strategy.barrier()
        data.use_labels(root)
        self._labels = root

    def _relabel(
        self,
        module: SegmentationModule,
        reader: MaskReader,
        item: Item,
        data: PseudoLabelDataModule,
    ) -> RefinedMask:
        """Predict one image and refine the prediction.

        Raises:
            ConfigurationError: the refiner failed on it.
        """
        picture = reader.image(item)
        old = reader.mask(item, (picture.shape[0], picture.shape[1]))
        image = torch.from_numpy(picture).permute(2, 0, 1)
        predicted = to_mask(item.image_id, self._probabilities(module, image), _classes_in(old))
        if self.refiner is None:
            return predicted
        names = tuple(data.class_list.prompt(each) for each in predicted.class_ids)
        seed = Seed(predicted.class_ids, predicted.foreground)
        return self._refined(Sample(item.image_id, image, seed, names), module.device)

    def _probabilities(self, module: SegmentationModule, image: Tensor) -> Tensor:
        """The network's probabilities ``(C, H, W)`` of a uint8 picture."""
        with torch.no_grad():
            # Out of the trainer's hands, which would convert it for half-precision weights.
            batch = normalise(image)[None].to(next(module.parameters()))
            return predict_probabilities(module.logits, batch, self.scales, flip=self.flip)[0]

    def _refined(self, sample: Sample, device: torch.device) -> RefinedMask:
        """Let the refiner work on one prediction."""
        if self.refiner is None:
            msg = "RefreshPseudoLabels has no refiner"
            raise ConfigurationError(msg)
        self.refiner.to(device)  # first: it decides the number format by where it is
        self.refiner.configure_model()
        self.refiner.to(device)
        outcome = self.refiner.predict_step([sample])[0]
        if isinstance(outcome, FailedSample):
            msg = f"refreshing {outcome.image_id}: {outcome.error}"
            raise ConfigurationError(msg)
        return outcome

    def _record(self, data: PseudoLabelDataModule) -> dict[str, Any]:
        """The run record: how the masks and soft maps of the folder are to be read."""
        background = None if self.refiner is None else describe(self.refiner.background)
        model = {"marginals": self.refiner is None, "background": background}
        return {
            "config": {"model": {"init_args": model}, "changed_by": []},
            "split": describe(getattr(data.images, "split", None)),
        }


def _data(trainer: pl.Trainer) -> PseudoLabelDataModule:
    """The run's DataModule.

    Raises:
        ConfigurationError: its masks cannot be exchanged.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, PseudoLabelDataModule):
        msg = f"RefreshPseudoLabels needs PseudoLabelDataModule, got {type(datamodule).__name__}"
        raise ConfigurationError(msg)
    return datamodule


def _classes_in(mask: np.ndarray[Any, Any]) -> list[int]:
    """The foreground labels of a mask."""
    return [int(label) for label in np.unique(mask) if 0 < label < 255]
