"""`g4seg predict` and `g4seg test`: LightningCLI around the module, the data and the writer."""

import argparse
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from g4seg_pl.callbacks.crf import DenseCRF
from g4seg_pl.callbacks.progress import ImageProgress
from g4seg_pl.callbacks.run_record import describe, write_text_atomically
from g4seg_pl.callbacks.writer import MaskWriter, background_rule, json_text
from g4seg_pl.cli_errors import one_sentence
from g4seg_pl.run_scores import score_rows
from g4seg_pl.termination import BEGINS_ANEW, told_by_status
from g4seg_pl.types import ConfigurationError, UsageError

TRAINER_DEFAULTS = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}
COMMANDS = ("predict", "test")
# jsonargparse 4.49 renamed it.
RENAMED = tuple(int(part) for part in version("jsonargparse").split(".")[:2]) >= (4, 49)
KEEP_NULLS = "skip_unset" if RENAMED else "skip_none"


class SaveConfigBesideMasks(SaveConfigCallback):
    """Write the resolved command line as config.yaml into the output folder, on every run."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """On rank 0, after the writer has accepted the folder."""
        if stage != "predict":
            return
        # Who goes on from this file wants the same masks, not the finished ones removed again.
        config = self.config.clone()
        config["override"] = False
        text = self.parser.dump(config, **{KEEP_NULLS: False})
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
            raise ConfigurationError(one_sentence(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer, with our progress bar unless it is to have none or another one."""
        given = self.config_init[str(self.subcommand)].trainer
        callbacks = given.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        another = any(isinstance(each, ProgressBar) for each in callbacks)
        if given.enable_progress_bar is not False and not another:
            kwargs["callbacks"] = [*callbacks, ImageProgress()]
        return super().instantiate_trainer(**kwargs)

    def before_test(self) -> None:
        """Make the folder that scores are written into at the end, while nothing is lost yet.

        Raises:
            ConfigurationError: it cannot be made.
        """
        out = writer_of(self.trainer).out
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"out: {out} cannot be made: {error}"
            raise ConfigurationError(message) from error

    def test(self, **kwargs: Any) -> None:
        """Score; a run that SIGTERM ends says so."""
        with told_by_status(self.trainer, lambda: BEGINS_ANEW):
            self.trainer.test(**kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Predict without keeping the predictions in memory."""
        self.trainer.predict(return_predictions=False, **kwargs)


def run_trainer(args: Sequence[str]) -> int:
    """Run ``predict`` or ``test``.

    Args:
        args: the subcommand and its arguments.

    Returns:
        0, or 1 if an item failed.

    Raises:
        UsageError: the arguments cannot be parsed.
    """
    _import_named_classes()
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
            raise UsageError(one_sentence(str(error))) from error
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
        trainer_defaults=TRAINER_DEFAULTS,
        auto_configure_optimizers=False,
        parser_kwargs=parser_options | {"prog": "g4seg"} | dict.fromkeys(COMMANDS, parser_options),
        args=list(args),
    )


def _import_named_classes() -> None:
    """Import data sets and feature extractors: bare names are sought in what is imported."""
    import datamodules

    for name in datamodules.__all__:
        getattr(datamodules, name)
    for module in ("open_clip", "transformers_clip"):
        import_module(f"g4seg_pl.features.{module}")


def _exit_status(cli: G4SegCLI) -> int:
    """1 if an item or a process failed; only rank 0 knows, launchers stop all if another says."""
    summary = writer_of(cli.trainer).summary
    return 1 if summary is not None and (summary.failed or summary.lost_processes) else 0


def _report_test(cli: G4SegCLI) -> int:
    """Write the scores with their protocol to OUT/test.json and print both."""
    failed = getattr(cli.model, "failed", {})
    if cli.trainer.is_global_zero:
        protocol = {
            "unit": "percent",
            "split": describe(getattr(cli.datamodule, "split", None)),
            "background_rule": background_rule(cli.model),
            "truth_255": "ignored",
            "crf": _crf(cli.trainer),
        }
        logged = cli.trainer.callback_metrics.items()
        scores = {name.removeprefix("test/"): float(value) for name, value in logged}
        rows = score_rows(scores)
        named = {f"test/{name}": value for name, value in scores.items()}
        content = protocol | {"rows": rows} | named | {"failed": failed}
        # Printed first: a disk that is full by now should not take the scores with it.
        print("\n".join([*map(_row_text, rows), *map(": ".join, _texts(protocol))]))
        write_text_atomically(Path(writer_of(cli.trainer).out) / "test.json", json_text(content))
    for image_id, error in failed.items() if cli.trainer.is_global_zero else ():
        print(f"failed {image_id}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _crf(trainer: pl.Trainer) -> str:
    """The settings of the run's dense CRF in a few words."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    settings = [item.effective_settings for item in callbacks if isinstance(item, DenseCRF)]
    return ", then ".join(map(str, settings)) if settings else "off"


def _row_text(row: Mapping[str, Any]) -> str:
    """A row of the table, as text."""
    text = f"{row['name']:<12} mIoU {row['miou']:6.2f} ± {row['miou_se']:.2f}"
    return text + (f"  gain {row['gain']:+.2f} ± {row['gain_se']:.2f}" if "gain" in row else "")


def _texts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text."""
    return [(name, str(value)) for name, value in values.items()]
