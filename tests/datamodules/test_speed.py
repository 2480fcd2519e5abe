"""The reading benchmark, and that a prediction does not wait for its data."""

import os

import numpy as np
import pytest

from datamodules.seed_files.writing import WRITABLE
from datamodules.speed import example, reading_speed, seeds, wait

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


@pytest.mark.slow
@pytest.mark.skipif(CORES < 3, reason="two workers and the model need a core each")
def test_a_prediction_hardly_waits_for_data() -> None:
    assert wait(count=10, num_workers=2) < 0.05
