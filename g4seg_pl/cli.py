"""`g4seg predict` and `g4seg test`: LightningCLI around the module, the data and the writer."""

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from g4seg_pl.callbacks.progress import ImageProgress
from g4seg_pl.callbacks.run_record import describe, write_text_atomically
from g4seg_pl.callbacks.writer import MaskWriter, background_rule, json_text
from g4seg_pl.types import ConfigurationError

TRAINER_DEFAULTS = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}
COMMANDS = ("predict", "test")


class SaveConfigBesideMasks(SaveConfigCallback):
    """Write the resolved command line as config.yaml into the output folder, on every run."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """On rank 0, after the writer has accepted the folder."""
        if stage != "predict":
            return
        text = self.parser.dump(self.config, skip_none=False)
        write_text_atomically(writer_of(trainer).out / "config.yaml", text)


class G4SegCLI(LightningCLI):
    """Any module and DataModule by class path; ``G4SegModule`` where none is named."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer methods offered, with their arguments that are not options."""
        arguments = {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only"}
        return {
            "predict": arguments | {"return_predictions"},
            "test": arguments | {"verbose"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the writer, with short names for what is changed most."""
        parser.set_defaults({"model": {"class_path": "g4seg_pl.module.G4SegModule"}})
        parser.add_argument("--out", type=str, default="outputs/masks", help="output folder")
        parser.add_argument(
            "--override", action="store_true", help="redo what is finished, whatever made it"
        )
        parser.add_lightning_class_args(MaskWriter, "writer")
        parser.link_arguments("out", "writer.out")
        parser.link_arguments("override", "writer.override")

    def instantiate_classes(self) -> None:
        """Make everything; a value that a class refuses is an error of the configuration."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            raise ConfigurationError(str(error)) from error

    def predict(self, **kwargs: Any) -> None:
        """Predict without keeping the predictions in memory."""
        self.trainer.predict(return_predictions=False, **kwargs)


def run_trainer(args: Sequence[str]) -> int:
    """Run ``predict`` or ``test``.

    Args:
        args: the subcommand and its arguments.

    Returns:
        0, or 1 if an item failed, or 2 if the arguments cannot be understood.
    """
    _import_data_modules()
    # What Lightning tells about itself would bury what the run says.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        warnings.filterwarnings("ignore", ".*does not have many workers")
        # Lightning 2.6 calls a part of torch that torch 2.15 deprecates.
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.")
        try:
            cli = _make_cli(args)
        except argparse.ArgumentError as error:
            raise ConfigurationError(str(error)) from error
    return _report_test(cli) if args[0] == "test" else _exit_status(cli)


def writer_of(trainer: pl.Trainer) -> MaskWriter:
    """The writer that the command line put into the trainer."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, MaskWriter))


def _make_cli(args: Sequence[str]) -> G4SegCLI:
    """Parse the arguments and run the subcommand."""
    parser_options: dict[str, Any] = {"exit_on_error": False}
    return G4SegCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfigBesideMasks,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=False,
        trainer_defaults=TRAINER_DEFAULTS | {"callbacks": [ImageProgress()]},
        auto_configure_optimizers=False,
        parser_kwargs=parser_options | dict.fromkeys(COMMANDS, parser_options),
        args=list(args),
    )


def _import_data_modules() -> None:
    """Import the bundled data sets, so that a bare name such as VOCDataModule is known."""
    import datamodules

    for name in datamodules.__all__:
        getattr(datamodules, name)


def _exit_status(cli: G4SegCLI) -> int:
    """1 if an item failed; only rank 0 knows, the others' launchers would stop all at once."""
    summary = writer_of(cli.trainer).summary
    return 1 if summary is not None and summary.failed else 0


def _report_test(cli: G4SegCLI) -> int:
    """Write the scores with their protocol to OUT/test.json and print the protocol."""
    failed = getattr(cli.model, "failed", {})
    if cli.trainer.is_global_zero:
        protocol = {
            "unit": "percent",
            "split": describe(getattr(cli.datamodule, "split", None)),
            "background_rule": background_rule(cli.model),
            "truth_255": "ignored",
            "crf": "off",
        }
        scores = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
        out = Path(writer_of(cli.trainer).out)
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out / "test.json", json_text(protocol | scores | {"failed": failed}))
        print("\n".join(f"{name}: {value}" for name, value in protocol.items()))
    return 1 if failed else 0
