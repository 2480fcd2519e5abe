"""The demo's settings are the ones that were chosen on validation scenes, and no others."""

import json

import pytest

from g4seg_pl.callbacks.run_record import describe
from g4seg_pl.lab.laboratory import CHOSEN
from g4seg_pl.lab.stages import at_threshold
from g4seg_pl.lab.written import build_stages
from g4seg_pl.world.settings import BACKGROUNDS, RECIPES, chosen_features

EVERYTHING = json.loads(CHOSEN.read_text(encoding="utf-8"))
FOUND = EVERYTHING["kinds"]["gradcam"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_the_chosen_way(name: str) -> None:
    way = FOUND["ways"]["best" if name == "g4seg-best" else name]
    threshold = FOUND["seed"]["background"]
    expected = tuple(at_threshold(stage, threshold) for stage in build_stages(way["stages"]))
    assert RECIPES[name] == expected
    assert BACKGROUNDS[name].value == way["background"]


def test_features_are_the_chosen_ones() -> None:
    chosen = {name: EVERYTHING["features"][name] for name in ("class_path", "init_args")}
    assert describe(chosen_features()) == chosen


def test_seed_has_its_own_threshold() -> None:
    assert BACKGROUNDS["seed"].value == FOUND["seed"]["background"]
