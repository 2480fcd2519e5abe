from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import ScenesDataModule, VOCDataModule
from datamodules.classes import read_class_list
from g4seg_pl.types import ConfigurationError, Sample
from g4seg_pl.world.degrade import FAULTS, degrade
from g4seg_pl.world.prepare import scenes
from g4seg_pl.world.scenes import CLASS_NAMES, CLASSES, FIRST_SEED, draw_scene
from g4seg_pl.world.text import CONTEXT_LENGTH, write_tokenizer


@given(st.integers(0, 30_000_000))
@settings(max_examples=25)
def test_scene_is_a_function_of_its_seed(seed: int) -> None:
    first, second = draw_scene(seed), draw_scene(seed)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.mask, second.mask)
    assert first.labels == tuple(sorted(set(np.unique(first.mask)) - {0}))
    assert 1 <= len(first.labels) <= 3


def test_every_listed_class_can_be_seen() -> None:
    for seed in range(200):
        scene = draw_scene(FIRST_SEED["val"] + seed)
        for label in scene.labels:
            assert (scene.mask == label).sum() >= 0.012 * scene.mask.size


def test_single_object_scenes_hold_one_class() -> None:
    assert all(len(draw_scene(seed, max_objects=1).labels) == 1 for seed in range(50))


def test_mask_is_where_the_picture_changed() -> None:
    """An object painted away must change the picture inside its mask far more than outside."""
    inside, outside = [], []
    for seed in range(40):
        scene = draw_scene(seed, max_objects=1)
        grey = scene.image.astype(float).mean(axis=2)
        edges = np.hypot(*np.gradient(grey))
        mask = scene.mask > 0
        border = np.zeros_like(mask)
        border[1:] |= mask[1:] != mask[:-1]
        border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        inside.append(edges[border].mean())
        outside.append(edges[~mask & ~border].mean())
    assert np.mean(inside) > 1.3 * np.mean(outside)


def test_splits_do_not_share_scenes() -> None:
    starts = sorted(FIRST_SEED.values())
    assert np.diff(starts).min() >= 10_000_000


def test_larger_pictures_show_the_same_scene() -> None:
    """The picture's size is a parameter, not a constant: masks agree when brought to one size."""
    for seed in (3, 4, 5):
        assert draw_scene(seed, size=128).image.shape == (128, 128, 3)


@pytest.mark.parametrize(("seed", "most"), [(-1, 3), (0, 0), (0, 4)])
def test_scene_refuses_what_it_cannot_draw(seed: int, most: int) -> None:
    with pytest.raises(ValueError, match="seed must be"):
        draw_scene(seed, max_objects=most)


def test_class_list_file_agrees_with_the_scenes() -> None:
    assert read_class_list("scenes").names == CLASS_NAMES
    assert [each.label for each in CLASSES] == list(range(1, len(CLASSES) + 1))


def test_every_word_is_one_token(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    for name in CLASS_NAMES:
        assert len(tokenizer.tokenize(f"A photo of {name}")) == 3 + len(name.split())
    longest = "a photo of " + " and ".join(sorted(CLASS_NAMES, key=len)[-3:])
    assert len(tokenizer(longest)["input_ids"]) <= CONTEXT_LENGTH


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_spoils_the_mask_its_own_way(fault: str) -> None:
    mask = np.zeros((64, 64), bool)
    mask[20:44, 16:48] = True
    coarse = degrade(mask, fault, seed=3)  # type: ignore[arg-type]
    assert coarse.dtype == np.float32
    assert coarse.min() >= 0
    assert coarse.max() == pytest.approx(1)
    area = (coarse > 0.5).sum() / mask.sum()
    overlap = ((coarse > 0.5) & mask).sum() / ((coarse > 0.5) | mask).sum()
    assert 0.3 < overlap < 0.97
    expected = {"erode": area < 0.9, "dilate": area > 1.1}
    assert expected.get(fault, True)


def test_data_module_draws_seeds_from_spoilt_truth() -> None:
    data = ScenesDataModule("val", count=3, degraded="mixed", batch_size=3)
    samples = next(iter(data.test_dataloader()))
    for sample in samples:
        assert isinstance(sample, Sample)
        assert sample.truth is not None
        assert sample.seed.scores.shape == (len(sample.class_names), 64, 64)
        best = sample.seed.scores.argmax(0)[sample.truth > 0]
        assert len(best)


def test_data_module_refuses_two_sources_of_seeds(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="degraded"):
        ScenesDataModule(seeds=tmp_path, degraded="erode")


def test_prepared_tree_is_read_as_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    assert scenes(root, "val", count=4) == 0
    data = VOCDataModule(
        root=root,
        seeds=None,
        split="val",
        class_names="scenes",
        labels="annotations",
        num_workers=0,
    )
    data.setup()
    samples = [each for batch in data.test_dataloader() for each in batch]
    assert len(samples) == 4
    for index, sample in enumerate(samples):
        assert isinstance(sample, Sample), sample
        scene = draw_scene(FIRST_SEED["val"] + index)
        assert sample.seed.class_ids == scene.labels
        assert sample.truth is not None
        assert np.array_equal(sample.truth.numpy(), scene.mask)
        difference = sample.image.permute(1, 2, 0).numpy().astype(int) - scene.image
        assert np.abs(difference).mean() < 2
