"""One training of the loop: ``train_seg.py fit`` and ``test``, skipped where it is finished."""

import json
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from g4seg_pl.callbacks.run_record import write_text_atomically
from g4seg_pl.segmentation.cli import run
from g4seg_pl.segmentation.loop.plan import CONFIG, Places, Training
from g4seg_pl.types import ConfigurationError


@dataclass(frozen=True)
class Job:
    """A training and where it lies.

    Attributes:
        places: of the loop.
        training: what is trained on, and the seed.
    """

    places: Places
    training: Training


def load_result(job: Job) -> dict[str, Any] | None:
    """What a finished training scored; None if it is not finished."""
    path = job.places.training(job.training) / "result.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def train(job: Job) -> dict[str, Any]:
    """Train, go on where a killed training stopped, and score the best epoch on the test scenes.

    Returns:
        ``miou`` in percent on the test scenes, ``val_miou`` of the best epoch, ``iou`` by class,
        ``steps`` taken, row and seed; as in result.json.

    Raises:
        ConfigurationError: the training cannot work, such as where labels are missing.
    """
    if (result := load_result(job)) is not None:
        return result
    folder = job.places.training(job.training)
    fitted = run(["fit", *_words(job), *_fit_words(job)])
    val_miou = _best_score(fitted.trainer)
    if val_miou is None:
        message = f"{folder}: no epoch was validated; the steps must make up at least one epoch"
        raise ConfigurationError(message)
    tested = run(["test", *_words(job), "--trainer.logger", "false"])
    scores = {name: float(value) for name, value in tested.trainer.callback_metrics.items()}
    result = {
        "row": job.training.row,
        "seed": job.training.seed,
        "miou": scores["test/miou"],
        "val_miou": val_miou,
        "steps": fitted.trainer.global_step,
        "iou": {
            name.removeprefix("test/iou/"): value
            for name, value in scores.items()
            if name.startswith("test/iou/")
        },
    }
    write_text_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _best_score(trainer: pl.Trainer) -> float | None:
    """Validation mIoU of the best epoch."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            score = callback.best_model_score
            return None if score is None else float(score)
    return None


def _words(job: Job) -> list[str]:
    """Arguments of both commands."""
    scale, seed = job.places.scale, str(job.training.seed)
    folder = job.places.training(job.training)
    words = ["-c", str(CONFIG), "--run", str(folder), "--seed_everything", seed]
    words += ["--model.seed", seed, "--data.seed", seed, "--data.num_workers", "0"]
    words += ["--model.network.width", str(scale.width)]
    words += ["--data.images.root", str(job.places.tree)]
    if (labels := job.places.labels(job.training.row)) is not None:
        words += ["--data.labels", str(labels)]
    words += ["--trainer.max_steps", str(scale.steps), "--trainer.check_val_every_n_epoch", "1"]
    words += ["--trainer.enable_progress_bar", "false"]
    return [*words, "--trainer.enable_model_summary", "false"]


def _fit_words(job: Job) -> list[str]:
    """Arguments of fit alone: logs that can be read by eye, and where to go on."""
    folder = job.places.training(job.training)
    words = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(folder)]
    words += ["--pictures.every_n_epochs", "8"]
    last = folder / "last.ckpt"
    return [*words, "--ckpt_path", str(last)] if last.is_file() else words
