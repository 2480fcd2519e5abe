"""The reading benchmark, and that a prediction does not wait for its data."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest

from datamodules import scenes
from datamodules.seed_files.writing import WRITABLE
from datamodules.speed import example, reading_speed, seeds, share_of_waiting, wait
from g4seg_pl.types import Sample

COUNT = 8


def test_every_dialect_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocotools", reason="extra: coco")
    seeds(count=2, height=30, width=40)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [*WRITABLE, "coco"]
    assert all(float(row[1]) > 0 for row in rows)


def test_bytes_per_image_are_those_of_half_precision() -> None:
    size = (30, 40)
    assert example(0, size).shape == (2, *size)
    assert np.ptp(example(3, (375, 500))) > 0.9
    found = reading_speed("clip_es", count=2, size=size).bytes_per_image
    assert 0 < found - 2 * 30 * 40 * 2 < 1000


class Refining(pl.LightningModule):
    """Takes as long with each scene as the next one takes to be drawn."""

    def __init__(self, drawn: Path) -> None:
        super().__init__()
        self.drawn, self.refined = drawn, 0

    def predict_step(self, batch: list[Sample]) -> list[Sample]:
        """Wait for the scene after this one; one that is only drawn when asked for never comes."""
        self.refined += 1
        following, deadline = self.drawn / str(self.refined), time.monotonic() + 60
        while self.refined < COUNT and not following.exists():
            assert time.monotonic() < deadline, f"scene {self.refined} is not drawn meanwhile"
            time.sleep(0.005)
        return batch


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="spies on the workers")
def test_scenes_are_drawn_while_others_are_refined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a prediction waits only where drawing takes longer than refining."""
    draw = scenes.draw_scene

    def noted(seed: int, **options: Any) -> Any:
        found = draw(seed, **options)
        (tmp_path / str(seed % 1000)).touch()
        return found

    monkeypatch.setattr(scenes, "draw_scene", noted)
    data = scenes.ScenesDataModule(count=COUNT, batch_size=1, num_workers=2)
    model = Refining(tmp_path)
    assert 0 <= share_of_waiting(model, data) <= 1
    assert model.refined == COUNT


@pytest.mark.slow
def test_waiting_of_a_real_refinement_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    share = wait(count=3, num_workers=0)
    assert 0 < share < 1
    assert f"waited for data: {100 * share:.2f} % of the time" in capsys.readouterr().out
