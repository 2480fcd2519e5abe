"""The classifier behind the world's class activation maps, trained when it is first asked for.

No file of it is in the repository: a ResNet-18 is 45 MB. It learns from image-level labels of
training scenes alone, as CAM's does, and begins with random weights.
"""

import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.scenes import ScenesDataModule
from g4seg_pl.callbacks.run_record import Json
from g4seg_pl.checkpoint_files import keep_checkpoints_whole
from g4seg_pl.lab.cache import Store, key_of
from g4seg_pl.seeds.cam import Cam
from g4seg_pl.seeds.classifier import Architecture
from g4seg_pl.seeds.fit import EpochLoss
from g4seg_pl.world.classifier import one_cycle, training_precision

CHECKPOINT = "training.ckpt"


@dataclass(frozen=True)
class CamRecipe:
    """How the classifier is trained; about half an hour of one core, less with bfloat16.

    Attributes:
        architecture: of torchvision's ResNets.
        parts: of the training scenes, each with a checkpoint behind it.
        easy_parts: how many of them, the first, show single objects: where all weights begin at
            random, three at once are learnt from only much later.
        scenes: in a part; no scene is seen twice.
        batch_size: scenes a step.
        learning_rate: the highest of a one-cycle schedule of AdamW.
        crop: side of training pictures, in pixels.
        longer_side: the range the longer side is drawn from, in pixels: features at 1/16 of a
            scene's own 64 would be 4×4.
        seed: of weights and pictures.
    """

    architecture: Architecture = "resnet18"
    parts: int = 6
    easy_parts: int = 3
    scenes: int = 5000
    batch_size: int = 32
    learning_rate: float = 1e-3
    crop: int = 80
    longer_side: tuple[int, int] = (64, 96)
    seed: int = 0

    def describe(self) -> Json:
        """In terms JSON can hold."""
        return asdict(self) | {"longer_side": list(self.longer_side)}


class FreshScenes(ScenesDataModule):
    """Training scenes, other ones in every epoch.

    Args:
        recipe: how many, and how many of them with single objects.
    """

    def __init__(self, recipe: CamRecipe) -> None:
        super().__init__("train", recipe.scenes, batch_size=recipe.batch_size)
        self.recipe = recipe

    def train_dataloader(self) -> Any:
        """The epoch's own scenes."""
        assert self.trainer is not None
        epoch = self.trainer.current_epoch
        part = ScenesDataModule(
            "train",
            self.count,
            epoch * self.count,
            max_objects=1 if epoch < self.recipe.easy_parts else 3,
            batch_size=self.batch_size,
        )
        part.setup()
        return part.train_dataloader()


class ScenesCam(Cam):
    """CAM's classifier, trained as a network must be that begins with random weights."""

    def configure_optimizers(self) -> Any:
        """AdamW under a one-cycle schedule instead of IRN's decaying SGD."""
        steps = int(self.trainer.estimated_stepping_batches)
        return one_cycle(self, self.learning_rate, steps)


def cam_weights(store: Store, recipe: CamRecipe, *, quiet: bool = True) -> Path:
    """Return the file of the classifier's weights, trained now if it is not there.

    A training that was broken off goes on behind its last finished part, with other random crops
    than it would have had: it ends in another network, as good but not the same.

    Args:
        store: where it is kept.
        recipe: how it is trained.
        quiet: print no progress.
    """
    folder = store.root / "cam" / key_of(recipe.describe())
    weights = folder / "classifier.pt"
    if not weights.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        trained = _train(folder, recipe, quiet=quiet)
        temporary = weights.with_suffix(".tmp")
        torch.save(trained, temporary)
        temporary.replace(weights)
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return weights


def _train(folder: Path, recipe: CamRecipe, *, quiet: bool) -> dict[str, torch.Tensor]:
    maker = ScenesCam(
        recipe.architecture,
        learning_rate=recipe.learning_rate,
        train_all=True,
        crop=recipe.crop,
        longer_side=recipe.longer_side,
    )
    keep = ModelCheckpoint(
        folder, Path(CHECKPOINT).stem, save_on_train_epoch_end=True, enable_version_counter=False
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=training_precision(),
        max_epochs=recipe.parts,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[keep] if quiet else [keep, EpochLoss()],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    keep_checkpoints_whole(trainer)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    begun = folder / CHECKPOINT
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.")
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        torch.manual_seed(recipe.seed)
        trainer.fit(
            maker, datamodule=FreshScenes(recipe), ckpt_path=begun if begun.is_file() else None
        )
    assert maker.network is not None
    return maker.network.state_dict()
