"""Every figure of the paper in miniature, and the single pictures it is made of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fake_voc import SIZES, write_voc
from PIL import Image

from g4seg_pl.core.background import Threshold
from g4seg_pl.lab import paper
from g4seg_pl.lab.figures import HOW_CHOSEN, largest, most_wrong, one_a_sample, spread
from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.panels import POINTS, RIGHT, WRONG, Row, Trace
from g4seg_pl.main import main
from g4seg_pl.report import pictures
from g4seg_pl.types import ConfigurationError, Sample, Seed

PLANS = {path.stem: yaml.safe_load(path.read_text()) for path in paper.CONFIGS.glob("fig-*.yaml")}
FIGURES = {name: plan for name, plan in PLANS.items() if "columns" in plan}


def draw(name: str, models: Models, folder: Path, **options: Any) -> tuple[Path, str]:
    """Run the command; return where its picture would be, and the caption."""
    places = {"clip": models.clip, "chosen": folder / "none.json", "store": folder / "store"}
    model = paper.Model(str(models.generator))
    assert paper.paper(name, model=model, out=folder, quiet=True, **(places | options)) == 0
    return folder / f"{name}.png", (folder / f"{name}.md").read_text()


def test_the_paper_has_nine_figures_of_pictures() -> None:
    assert set(FIGURES) == {"fig-3", *(f"fig-{number}" for number in range(5, 13))}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_in_the_world(name: str, models: Models, tmp_path: Path) -> None:
    path, caption = draw(name, models, tmp_path, world=True, images=2)
    plan = FIGURES[name]
    assert plan["shows"] in caption
    if all("not_here" in row for row in plan["rows"]):
        assert not path.exists()
        assert "No picture was drawn" in caption
        return
    assert "drawn in the embedded world" in caption
    assert f"({path.name})" in caption
    with Image.open(path) as opened:
        picture = np.asarray(opened)
    assert picture.shape[1] == len(plan["columns"]) * (plan.get("side", 160) + 4) - 4
    assert picture.std() > 10


@pytest.mark.parametrize("switch", [["--world"], ["--world", "true"], ["--world=true"]])
def test_the_switch_may_stand_alone(switch: list[str], tmp_path: Path) -> None:
    words = ["paper", "fig-12", *switch, "--out", str(tmp_path), "--quiet"]
    assert main(words) == 0
    assert "no counterpart" in (tmp_path / "fig-12.md").read_text()


def test_figure_on_data(models: Models, tmp_path: Path) -> None:
    write_voc(tmp_path)
    data = paper.Data(tmp_path, tmp_path / "cam_out")
    path, caption = draw("fig-3", models, tmp_path / "out", data=data)
    assert path.is_file()
    assert f"drawn on {tmp_path}" in caption
    # Rows keep the shapes of the images, which are no squares.
    heights = [18 + pictures.fitted_size(size, 160)[1] + 4 for size in SIZES]
    with Image.open(path) as picture:
        assert picture.height == 20 + sum(heights) - 4


def test_figure_at_chosen_settings(lab: Lab, tmp_path: Path) -> None:
    _, plain = draw("fig-3", lab.models, tmp_path, world=True, images=1)
    _, chosen = draw("fig-3", lab.models, tmp_path, world=True, images=1, chosen=lab.chosen_file)
    assert "ways.yaml" in plain
    assert "chosen on validation scenes" in chosen


def sample(masks: list[list[int]], truth: list[int]) -> Sample:
    """One row of pixels; each mask's label is its place."""
    scores = torch.tensor(masks, dtype=torch.float32)[:, None]
    labels = tuple(range(1, len(masks) + 1))
    label = torch.tensor([truth], dtype=torch.uint8)
    image = torch.zeros(3, 1, len(truth), dtype=torch.uint8)
    return Sample("a", image, Seed(labels, scores), tuple("abc"[: len(masks)]), label)


def test_masks_are_ranked_by_what_is_wrong_with_them() -> None:
    samples = [
        sample([[1, 1, 1, 1], [0, 0, 0, 1]], [1, 0, 2, 2]),
        sample([[1, 1, 0, 0]], [1, 1, 1, 255]),
    ]
    # Excess less what is missed, of the union: (2 + 1) / 4, -1 / 2 and -1 / 3.
    assert most_wrong(samples, Threshold(0.5), over=True) == [(0, 0), (1, 0), (0, 1)]
    assert most_wrong(samples, Threshold(0.5), over=False) == [(0, 1), (1, 0), (0, 0)]
    assert one_a_sample([(0, 1), (1, 0), (0, 0)]) == [(0, 1), (1, 0)]
    assert largest(samples[0]) == 0


def row(before: list[int], after: list[int], truth: list[int]) -> Row:
    """A row whose way turned one label map into another."""
    made = [
        Trace(torch.tensor([each], dtype=torch.uint8), torch.zeros(1, 1, 4))
        for each in (before, after)
    ]
    return Row(sample([[1, 1, 1, 1]], truth), made[0], {"way": made[1]}, 0.5, None, 40)


def test_both_gains_and_losses_are_shown() -> None:
    truth = [1, 1, 0, 0]
    rows = [
        row([1, 0, 0, 0], [1, 1, 0, 0], truth),
        row([1, 1, 0, 0], [1, 0, 0, 0], truth),
        row([1, 1, 0, 0], [1, 1, 0, 0], truth),
        row([1, 1, 0, 0], [0, 0, 0, 0], truth),
    ]
    assert spread(rows, 2) == [rows[0], rows[3]]
    assert spread(rows, 3) == [rows[0], rows[2], rows[3]]
    assert spread(rows[:1], 4) == rows[:1]


def matched(places: torch.Tensor) -> Row:
    """A mask that covers the left half where truth covers the right, with given partners."""
    side = len(places)
    left = torch.zeros(side, side)
    left[:, : side // 2] = 1
    truth = (1 - left).byte()
    image = torch.zeros(3, side, side, dtype=torch.uint8)
    held = Sample("b", image, Seed((1,), left[None]), ("dog",), truth)
    artifacts = {"neighbours": places[None], "generated": torch.zeros(1, 3, side, side)}
    way = Trace(truth, left[None], artifacts)
    return Row(held, Trace(left.byte(), left[None]), {"way": way}, 0.5, 0, 8 * side)


def test_stars_lie_where_the_partners_are() -> None:
    side = 8
    cells = torch.arange(side * side).view(side, side)
    found = matched(cells.flip(0, 1))
    places, rings = found._points("way")
    assert len(places) == POINTS
    assert set(rings) == {WRONG}  # the seed is wrong everywhere
    turned = [(1 - y, 1 - x) for y, x in places]
    np.testing.assert_allclose(found._stars("way", places), turned)
    np.testing.assert_allclose(matched(cells)._stars("way", places), places)
    # S[δ] of partners turned about the middle is S turned about the middle.
    assert torch.equal(found._partner("way"), found.seed.foreground[0].flip(0, 1))
    for column in ("points way", "stars way", "generated way", "partner way", "soft way", "image"):
        assert found.panel(column).size == (64, 64)
    assert RIGHT != WRONG


def test_columns_that_cannot_be_drawn_are_named() -> None:
    found = matched(torch.zeros(4, 4, dtype=torch.long))
    with pytest.raises(ConfigurationError, match="'colour'"):
        found.panel("colour")
    with pytest.raises(ConfigurationError, match="'none' leaves no 'generated'"):
        found.panel("generated none")


def test_no_label_vanishes_in_its_picture() -> None:
    labels = np.arange(256, dtype=np.uint8)[None].repeat(2, 0)
    shown = np.asarray(pictures.overlay(np.full((2, 256, 3), 77, np.uint8), labels)).astype(int)
    assert np.ptp(shown[0, 1:], axis=1).min() > 10


def test_marks_change_the_picture_where_they_are() -> None:
    plain = Image.new("RGB", (100, 50), "white")
    marked = pictures.marks(plain, [(0.5, 0.25)], [WRONG], "circle")
    changed = np.argwhere(np.asarray(marked) != 255)
    assert np.abs(changed[:, :2].mean(0) - (25, 25)).max() < 1
    assert np.asarray(plain).min() == 255


def test_long_titles_stay_in_their_column() -> None:
    picture = Image.new("RGB", (60, 30), "blue")
    sheet = np.asarray(pictures.grid([[picture] * 2], ["i" * 60, "short"], 60, ["row"]))
    assert sheet.shape == (20 + 18 + 30, 124, 3)
    assert (sheet[:20, 60:64] == 255).all()


@pytest.mark.parametrize("plan", FIGURES.values(), ids=FIGURES)
def test_plans_choose_in_known_ways(plan: dict[str, Any]) -> None:
    for each in plan["rows"]:
        assert each["choose"] in HOW_CHOSEN
