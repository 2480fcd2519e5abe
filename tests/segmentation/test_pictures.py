"""Pictures of batches, by hand and through loggers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from segmentation.test_module import small, trainer
from segmentation.trees import data_module, write_tree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from g4seg_pl.segmentation.normalisation import normalise
from g4seg_pl.segmentation.pictures import MARGIN, PictureLogger, batch_picture, colours


def test_pictures_stand_beside_their_masks() -> None:
    pictures = torch.randint(0, 256, (3, 3, 6, 5), dtype=torch.uint8)
    masks = torch.randint(0, 21, (3, 6, 5))
    drawn = np.array(batch_picture(normalise(pictures), masks, columns=2))
    assert drawn.shape == (2 * 6 + MARGIN, 2 * 10 + MARGIN, 3)
    third = drawn[6 + MARGIN :, :10]
    assert np.array_equal(third[:, :5], pictures[2].permute(1, 2, 0).numpy())
    assert np.array_equal(third[:, 5:], colours(masks[2].numpy()))
    assert np.all(drawn[6 + MARGIN :, 10 + MARGIN :] == 255)


def test_colours_are_vocs() -> None:
    # Background, aeroplane, person and ignored, as the data set's own description has them.
    expected = [[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]
    assert colours(np.array([0, 1, 15, 255])).tolist() == expected


def fit(root: Path, logger: Logger) -> None:
    """Two epochs with pictures."""
    write_tree(root)
    callback = PictureLogger(count=2)
    run = trainer(root, callback, logger=logger, max_epochs=2, log_every_n_steps=1)
    run.fit(small(), data_module(root))


def test_csv_logger_gets_files(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    fit(tmp_path, logger)
    folder = Path(logger.log_dir) / "pictures"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert names == {
        "train/batch_000000.png",
        *(f"val/{picture}_{step:06d}.png" for picture in (0, 1) for step in (1, 2)),
    }
    # Picture, truth and prediction of the first validation picture, 40 by 52.
    with Image.open(folder / "val/0_000001.png") as picture:
        assert picture.size == (3 * 52, 40)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_pictures_and_scores(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "logs")
    fit(tmp_path, logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = events.Tags()
    assert {"train/batch", "val/0", "val/1"} <= set(tags["images"])
    assert {"val/miou", "val/iou/background", "train/loss"} <= set(tags["scalars"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_gets_pictures_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    logged: dict[str, list[object]] = {}

    class Recorder(WandbLogger):
        """What reaches the run, which nobody may be asked to log in for."""

        def log_metrics(self, metrics: Mapping[str, object], step: int | None = None) -> None:
            for name, value in metrics.items():
                logged.setdefault(name, []).append(value)
            super().log_metrics(metrics, step)  # type: ignore[arg-type]

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = Recorder(save_dir=str(tmp_path), offline=True)
    fit(tmp_path, logger)
    logger.experiment.finish()
    assert {"train/batch", "val/0", "val/1"} <= set(logged)
    assert {"val/miou", "val/iou/background", "train/loss"} <= set(logged)
    assert len(logged["val/miou"]) == len(logged["val/0"]) == 2
    pictures = {path.name.split("_")[0] for path in tmp_path.rglob("wandb/**/*.png")}
    assert {"batch", "0", "1"} <= pictures
