"""`g4seg train` and train_seg.py: LightningCLI around the network, its data and its callbacks."""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from g4seg_pl.callbacks.writer import MaskWriter
from g4seg_pl.checkpoint_files import keep_checkpoints_whole
from g4seg_pl.cli_errors import one_sentence
from g4seg_pl.segmentation.module import SegmentationModule
from g4seg_pl.segmentation.pictures import PictureLogger, batch_picture
from g4seg_pl.termination import BEGINS_ANEW, how_to_go_on, told_by_status
from g4seg_pl.types import ConfigurationError, G4SegError, UsageError

COMMANDS = ("fit", "validate", "test", "predict")
USAGE = """usage: train_seg.py {fit,validate,test,predict,show} [-c FILE ...] [arguments]

  fit       train into --run; --ckpt_path last goes on where a run was killed
  validate  score the validation split by the best checkpoint of --run
  test      score the test split by the module's scales, mirroring and dense CRF
  predict   write label files to --out
  show      draw a training batch to --picture and stop

COMMAND --help lists a command's arguments."""


class SaveConfigOnce(SaveConfigCallback):
    """Write config.yaml into the folder of a training run; a resumed run writes it again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"overwrite": True}))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Only where something is trained, and kept."""
        if stage == "fit" and trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class SegmentationCLI(LightningCLI):
    """``SegmentationModule`` and ``PseudoLabelDataModule`` unless other classes are named."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer methods offered, with their arguments that are not options."""
        offered = {name: LightningCLI.subcommands()[name] for name in COMMANDS}
        return offered | {"predict": offered["predict"] | {"return_predictions"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add checkpoints by validation mIoU, pictures, and the folder of predictions."""
        parser.set_defaults(
            {
                "model": {"class_path": "g4seg_pl.segmentation.module.SegmentationModule"},
                "data": {"class_path": "datamodules.PseudoLabelDataModule"},
            }
        )
        _add_checkpoints(parser)
        parser.add_lightning_class_args(PictureLogger, "pictures")
        parser.add_argument("--run", type=str, default="outputs/train", help="checkpoints and logs")
        parser.link_arguments("run", "best.dirpath")
        parser.link_arguments("run", "last.dirpath")
        parser.link_arguments("run", "trainer.default_root_dir")
        parser.add_argument("--out", type=str, default="outputs/predictions", help="of predict")
        parser.add_argument("--picture", type=str, default="batch.png", help="of show")
        parser.add_lightning_class_args(MaskWriter, "writer")
        parser.link_arguments("out", "writer.out")

    def before_instantiate_classes(self) -> None:
        """Take the run's best checkpoint where none is named: random weights are never scored.

        Raises:
            ConfigurationError: there is none.
        """
        config = self.config.get(str(self.subcommand))
        if self.subcommand not in ("validate", "test", "predict") or config.ckpt_path:
            return
        best = Path(config.run) / "best.ckpt"
        if not best.is_file():
            msg = f"no checkpoint {best}: give --run, the folder of a fit, or --ckpt_path"
            raise ConfigurationError(msg)
        config.ckpt_path = str(best)

    def instantiate_classes(self) -> None:
        """Make everything; a value that a class refuses is an error of the configuration."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            raise ConfigurationError(one_sentence(str(error))) from error
        if isinstance(self.model, SegmentationModule):
            self.model.restored_from = self._checkpoint()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer, which replaces checkpoints whole or not at all."""
        trainer = super().instantiate_trainer(**kwargs)
        keep_checkpoints_whole(trainer)
        return trainer

    def _checkpoint(self) -> str | None:
        """The checkpoint that the run begins with; the trainer looks for it after the setup."""
        config = self.config.get(str(self.subcommand)) if self.subcommand else None
        if config is None or not config.ckpt_path:
            return None
        if config.ckpt_path != "last":
            return str(config.ckpt_path)
        last = Path(config.run) / "last.ckpt"
        return str(last) if last.is_file() else None

    def fit(self, **kwargs: Any) -> None:
        """Train; a run that SIGTERM ends says so."""
        kept = Path(self.config.fit.run) / "last.ckpt"
        with told_by_status(self.trainer, lambda: how_to_go_on(kept)):
            self.trainer.fit(**kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Score; a run that SIGTERM ends says so."""
        with told_by_status(self.trainer, lambda: BEGINS_ANEW):
            self.trainer.validate(**kwargs)

    def test(self, **kwargs: Any) -> None:
        """Score; a run that SIGTERM ends says so."""
        with told_by_status(self.trainer, lambda: BEGINS_ANEW):
            self.trainer.test(**kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Predict without keeping the predictions in memory."""
        self.trainer.predict(return_predictions=False, **kwargs)


def _add_checkpoints(parser: LightningArgumentParser) -> None:
    """Keep the best by validation mIoU, and the last epoch's for resuming.

    Two of them, because Lightning's ``save_last`` follows the best: it would lose the epochs since.
    """
    for name in ("best", "last"):
        parser.add_lightning_class_args(ModelCheckpoint, name)
        parser.set_defaults({f"{name}.filename": name, f"{name}.enable_version_counter": False})
    parser.set_defaults({"best.monitor": "val/miou", "best.mode": "max"})
    parser.set_defaults({"last.save_on_train_epoch_end": True})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of training; also ``g4seg train``.

    Args:
        argv: the subcommand and its arguments; those of the process if None.

    Returns:
        0; 1 if something asked for cannot be done; 2 if there is no such subcommand, or its
        arguments cannot be parsed.

    Raises:
        SystemExit: the process was asked to end (SIGTERM).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in (*COMMANDS, "show"):
        print(USAGE)
        return 0 if words and words[0] in ("-h", "--help") else 2
    try:
        run(words)
    except G4SegError as error:
        print(f"train {words[0]}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def run(words: Sequence[str]) -> SegmentationCLI:
    """Run a command and return what ran, its trainer, model and data.

    Args:
        words: the subcommand and its arguments.

    Raises:
        G4SegError: something asked for cannot be done.
    """
    _import_names()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        _ignore_known_warnings()
        try:
            if words[0] == "show":
                return show(words[1:])
            return make_cli(words)
        except argparse.ArgumentError as error:
            raise UsageError(one_sentence(str(error))) from error


def show(words: Sequence[str]) -> SegmentationCLI:
    """Draw a training batch, pictures beside masks, to ``--picture``; nothing is trained."""
    cli = make_cli(words, run=False)
    cli.datamodule.setup("fit")
    batch = next(iter(cli.datamodule.train_dataloader()))
    path = Path(cli.config.picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    batch_picture(batch["image"], batch["mask"]).save(path)
    print(f"{path}: {len(batch['image'])} pictures with masks")
    return cli


def make_cli(words: Sequence[str], *, run: bool = True) -> SegmentationCLI:
    """Parse the arguments, make everything and, if asked, run the subcommand."""
    parser_options: dict[str, Any] = {"exit_on_error": False}
    by_command = dict.fromkeys(COMMANDS, parser_options) if run else {}
    return SegmentationCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfigOnce,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs=parser_options | by_command,
        args=list(words),
        run=run,
    )


def _import_names() -> None:
    """Import the bundled classes, so that bare names such as VOCDataModule are known."""
    from importlib import import_module

    import datamodules

    for name in datamodules.__all__:
        getattr(datamodules, name)
    for name in ("deeplab_v2", "deeplab_v3", "segformer", "small_deeplab", "module", "losses"):
        import_module(f"g4seg_pl.segmentation.{name}")


def _ignore_known_warnings() -> None:
    """Keep quiet about what is known and harmless."""
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    # LightningCLI 2.6 calls what jsonargparse 4.53 has deprecated.
    warnings.filterwarnings("ignore", "(?s).*JsonargparseDeprecationWarning")
    warnings.filterwarnings("ignore", "(?s).*was deprecated in v4")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    # Lightning 2.6 calls a part of torch that torch 2.15 deprecates.
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.")
    # A training set of a few batches, as in a dry run.
    warnings.filterwarnings("ignore", ".*smaller than the logging interval")
    # A resumed run writes where it wrote before.
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    # It ends the epoch it stopped after once more, before anything was validated.
    no_metrics = r".*could not find the monitored key in the returned metrics: \['epoch', 'step'\]"
    warnings.filterwarnings("ignore", no_metrics)
    # Frozen batch norms are in eval mode on purpose.
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training")
    # Early stopping and the like have no say in a test.
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be")
    # The mean of weights is taken of a network that is there whole.
    warnings.filterwarnings("ignore", ".*WeightAveraging callback with a model that overrides")
