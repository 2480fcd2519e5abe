"""``g4seg fit``: train the classifier behind class activation maps on image-level labels."""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from g4seg_pl.callbacks.run_record import write_text_atomically
from g4seg_pl.checkpoint_files import keep_checkpoints_whole
from g4seg_pl.cli_errors import one_sentence
from g4seg_pl.termination import how_to_go_on, told_by_status
from g4seg_pl.types import ConfigurationError, UsageError

CHECKPOINT = "classifier"


class SaveConfig(SaveConfigCallback):
    """Write the resolved command line as config.yaml beside the checkpoint."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """On rank 0."""
        out = Path(self.config.out)
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out / "config.yaml", self.parser.dump(self.config))


class EpochLoss(Callback):
    """Print the mean loss of each epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On rank 0."""
        loss = trainer.callback_metrics.get("train/loss_epoch")
        if loss is not None and trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: loss {loss:.4f}")


class FitCLI(LightningCLI):
    """``Cam`` on any DataModule with image-level labels."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only ``fit``."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the folder of the checkpoint, which each epoch replaces."""
        parser.set_defaults({"model": {"class_path": "g4seg_pl.seeds.cam.Cam"}})
        parser.add_argument("--out", type=str, default="outputs/seeds/cam_fit", help="its folder")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.link_arguments("out", "checkpoint.dirpath")
        parser.link_arguments("out", "trainer.default_root_dir")
        parser.set_defaults(
            {
                "checkpoint.filename": CHECKPOINT,
                "checkpoint.enable_version_counter": False,
                "checkpoint.save_on_train_epoch_end": True,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Let ``last`` be the checkpoint of this folder: Lightning looks for other names."""
        config = self.config.fit
        if config.ckpt_path == "last":
            kept = Path(config.out) / f"{CHECKPOINT}.ckpt"
            config.ckpt_path = str(kept) if kept.is_file() else None

    def instantiate_classes(self) -> None:
        """Make everything; a value that a class refuses is an error of the configuration."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            raise ConfigurationError(one_sentence(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer, which replaces checkpoints whole or not at all."""
        trainer = super().instantiate_trainer(**kwargs)
        keep_checkpoints_whole(trainer)
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train; a run that SIGTERM ends says so."""
        kept = Path(self.config.fit.out) / f"{CHECKPOINT}.ckpt"
        with told_by_status(self.trainer, lambda: how_to_go_on(kept)):
            self.trainer.fit(**kwargs)


def main(args: Sequence[str]) -> int:
    """Train, and say where the checkpoint lies.

    Args:
        args: the arguments after ``fit``.

    Returns:
        0, or 1 if an image could not be read.

    Raises:
        UsageError: the arguments cannot be parsed.
        ConfigurationError: the run cannot begin.
        SystemExit: the process was asked to end (SIGTERM).
    """
    import datamodules

    for name in datamodules.__all__:  # so that a bare name such as VOCDataModule is known
        getattr(datamodules, name)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.")
        # A batch of images that cannot be read: they are named at the end.
        warnings.filterwarnings("ignore", "`training_step` returned `None`")
        # Nothing is lost: a resumed run goes on from the checkpoint that is replaced.
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        try:
            cli = _make_cli(args)
        except argparse.ArgumentError as error:
            raise UsageError(one_sentence(str(error))) from error
    if not cli.trainer.is_global_zero:
        return 0
    failed: dict[str, str] = getattr(cli.model, "failed", {})
    for image_id, problem in failed.items():
        print(f"failed {image_id}: {problem}", file=sys.stderr)
    print(f"weights: {Path(cli.trainer.default_root_dir) / CHECKPOINT}.ckpt")
    return 1 if failed else 0


def _make_cli(args: Sequence[str]) -> FitCLI:
    """Parse the arguments and train."""
    options: dict[str, Any] = {"exit_on_error": False}
    return FitCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults={
            "logger": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "callbacks": [EpochLoss()],
        },
        auto_configure_optimizers=False,
        parser_kwargs=options | {"prog": "g4seg", "fit": options},
        args=["fit", *args],
    )
