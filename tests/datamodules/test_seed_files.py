"""Every dialect, read as its project writes it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from seed_dialects import (
    CLASSES,
    IDS,
    SIZE,
    Maps,
    all_classes,
    clip_es,
    diffsegmenter,
    irn,
    named_npz,
    save,
    seam,
    seam_crf,
    toco,
    weaktr,
    with_background,
)

from datamodules.classes import read_class_list
from datamodules.seed_files import (
    ReadOptions,
    detect,
    read_maps,
    read_seed,
)
from g4seg_pl.types import BadItemError

DIALECTS: list[tuple[Callable[[Path, Maps], Path], str, float]] = [
    (clip_es, "clip_es", 1e-3),
    (irn, "irn", 0),
    (toco, "irn", 0),
    (seam, "seam", 0),
    (diffsegmenter, "mat", 1e-6),
    (named_npz, "npz", 0),
    (all_classes, "npy", 0),
    (with_background, "npy", 0),
]


@pytest.mark.parametrize(("make", "dialect", "tolerance"), DIALECTS)
def test_reads_what_the_projects_write(
    make: Callable[[Path, Maps], Path], dialect: str, tolerance: float, maps: Maps, tmp_path: Path
) -> None:
    path = make(tmp_path, maps)
    assert detect(path) == dialect
    seed = read_seed(path, SIZE, CLASSES)
    assert seed.class_ids == IDS
    assert seed.scores.dtype == torch.float32
    np.testing.assert_allclose(seed.scores.numpy(), maps, atol=tolerance)


@pytest.mark.parametrize(("make", "dialect"), [(seam_crf, "seam_crf"), (weaktr, "weaktr")])
def test_the_background_in_the_file_is_left_out(
    make: Callable[[Path, Maps], Path], dialect: str, maps: Maps, tmp_path: Path
) -> None:
    path = make(tmp_path, maps)
    assert detect(path) == dialect
    seed = read_seed(path, SIZE, CLASSES)
    assert seed.class_ids == IDS
    np.testing.assert_allclose(seed.scores.numpy(), maps / (1 + maps.sum(axis=0)), atol=1e-6)


def test_class_zero_of_seam_is_the_first_class_when_maps_reach_one(
    maps: Maps, tmp_path: Path
) -> None:
    assert read_seed(save(tmp_path / "a.npy", {0: maps[0]}), SIZE, CLASSES).class_ids == (1,)


def test_seam_leaves_the_lowest_places_below_zero(maps: Maps, tmp_path: Path) -> None:
    # As its infer_SEAM.py normalises a map whose minimum is well above 0.
    activation = (0.05 + 5.95 * maps[0]).astype(np.float32)
    low, high = activation.min(), activation.max()
    cut = np.where(activation < low + 1e-5, 0, activation)
    written = (cut - low - 1e-5) / (high - low + 1e-5)
    assert written.min() < -0.005
    seed = read_seed(save(tmp_path / "a.npy", {2: written}), SIZE, CLASSES)
    expected = (activation - low) / (high - low)
    np.testing.assert_allclose(seed.scores[0].numpy(), expected, atol=1e-4)
    # What does not reach 1 is no such map, but logits, say.
    with pytest.raises(BadItemError, match="scores range from"):
        read_seed(save(tmp_path / "b.npy", {2: written * 0.9}), SIZE, CLASSES)


def test_weaktrs_two_decoders_are_taken_apart_from_their_weight(maps: Maps, tmp_path: Path) -> None:
    full = np.concatenate([np.ones((1, *SIZE), np.float32), maps])
    full = full / full.sum(axis=0)
    content = {"prob": 1.8 * full, "keys": np.array([0, 3, 15])}
    seed = read_seed(save(tmp_path / "a.npy", content), SIZE, CLASSES)
    np.testing.assert_allclose(seed.scores.numpy(), full[1:], atol=1e-6)


def test_class_zero_that_may_be_the_background_is_ambiguous(maps: Maps, tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", {0: maps[0] * 0.5, 3: maps[1]})
    with pytest.raises(BadItemError, match=r"a\.npy.*dialect=seam_crf or dialect=seam"):
        detect(path)
    assert read_seed(path, SIZE, CLASSES, "seam").class_ids == (1, 4)
    assert read_seed(path, SIZE, CLASSES, "seam_crf").class_ids == (3,)


def test_two_dialects_in_one_file_are_ambiguous(maps: Maps, tmp_path: Path) -> None:
    content = {"keys": np.array([2, 14]), "attn_highres": maps, "high_res": maps * 0.5}
    path = save(tmp_path / "a.npy", content)
    with pytest.raises(BadItemError, match="clip_es and irn"):
        read_seed(path, SIZE, CLASSES)
    forced = read_seed(path, SIZE, CLASSES, "irn")
    np.testing.assert_allclose(forced.scores.numpy(), maps * 0.5)


def test_clip_es_gives_its_refined_map_where_both_are_there(maps: Maps, tmp_path: Path) -> None:
    both = {"keys": np.array([2, 14]), "highres": maps * 0.5, "attn_highres": maps}
    refined = read_seed(save(tmp_path / "a.npy", both), SIZE, CLASSES)
    np.testing.assert_allclose(refined.scores.numpy(), maps)
    before = {name: value for name, value in both.items() if name != "attn_highres"}
    np.testing.assert_allclose(
        read_seed(save(tmp_path / "b.npy", before), SIZE, CLASSES).scores.numpy(), maps * 0.5
    )


def test_forcing_another_dialect_fails(maps: Maps, tmp_path: Path) -> None:
    for dialect in ("irn", "png", "coco", "seam"):
        with pytest.raises(BadItemError, match=f"(?s)a.npy.*{dialect}"):
            read_seed(clip_es(tmp_path, maps), SIZE, CLASSES, dialect)  # type: ignore[arg-type]


def test_small_cam_is_used_only_without_a_full_map(maps: Maps, tmp_path: Path) -> None:
    small = torch.from_numpy(maps)[:, ::4, ::4]
    path = save(tmp_path / "a.npy", {"keys": torch.tensor([2, 14]), "cam": small})
    seed = read_seed(path, SIZE, CLASSES)
    # Bilinear with half-pixel centres, as a plain loop.
    height, width = small.shape[1:]
    for row, column in [(0, 0), (5, 7), (12, 17)]:
        y = min(max((row + 0.5) * height / SIZE[0] - 0.5, 0), height - 1)
        x = min(max((column + 0.5) * width / SIZE[1] - 0.5, 0), width - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        expected = (
            small[0, top, left] * (top + 1 - y) * (left + 1 - x)
            + small[0, top, right] * (top + 1 - y) * (x - left)
            + small[0, bottom, left] * (y - top) * (left + 1 - x)
            + small[0, bottom, right] * (y - top) * (x - left)
        )
        assert seed.scores[0, row, column].item() == pytest.approx(expected.item(), abs=1e-5)


def test_present_classes_need_labels(maps: Maps, tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", maps)
    with pytest.raises(BadItemError, match="fits no reading"):
        read_seed(path, SIZE, CLASSES)
    assert read_seed(path, SIZE, CLASSES, labels=(15, 3)).class_ids == IDS
    assert read_seed(path, SIZE, CLASSES, labels=(3,)).class_ids == (3,)
    np.savez(tmp_path / "b.npz", maps)
    assert detect(tmp_path / "b.npz") == "npz"
    assert read_seed(tmp_path / "b.npz", SIZE, CLASSES, labels=IDS).class_ids == IDS


def test_ambiguous_channels_are_an_error_until_said(maps: Maps, tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", maps)
    with pytest.raises(BadItemError, match="fits several readings"):
        read_seed(path, SIZE, 2, labels=(2,))
    said = read_seed(path, SIZE, 2, labels=(2,), options=ReadOptions(channels="all"))
    np.testing.assert_array_equal(said.scores[0].numpy(), maps[1])
    background = ReadOptions(channels="background+present")
    assert read_seed(path, SIZE, 2, labels=(1,), options=background).class_ids == (1,)


def test_classes_that_win_somewhere_are_kept_where_there_is_a_background(tmp_path: Path) -> None:
    scores = np.full((4, *SIZE), 0.1, np.float32)
    scores[0], scores[2, :3], scores[3] = 0.4, 0.45, 0.3
    path = save(tmp_path / "a.npy", scores)
    assert read_maps(path, 3, options=ReadOptions(channels="background+all")).class_ids == (2,)
    every = ReadOptions(channels="background+all", present_at=0.3)
    assert read_maps(path, 3, options=every).class_ids == (2, 3)
    # Without a background every pixel has a winner, which says nothing.
    alone = save(tmp_path / "b.npy", scores[1:])
    assert read_maps(alone, 3, options=ReadOptions(channels="all", empty="keep")).class_ids == ()


def test_weaktrs_keys_of_coco_are_not_guessed(tmp_path: Path) -> None:
    prob = np.full((3, *SIZE), 1 / 3, np.float32)
    path = tmp_path / "a.npy"
    np.save(path, {"prob": prob, "keys": np.array([0, 17, 62])}, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(BadItemError, match="category_ids=coco91"):
        read_seed(path, SIZE, 80)
    names = read_class_list("coco").names
    said = read_seed(path, SIZE, 80, options=ReadOptions(category_ids="coco91"))
    assert [names[each - 1] for each in said.class_ids] == ["cat", "chair"]
    ours = read_seed(path, SIZE, 80, options=ReadOptions(category_ids="contiguous"))
    assert ours.class_ids == (17, 62)


@given(
    logits=hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-50, 50, width=32)),
)
def test_logits(logits: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save(tmp_path_factory.mktemp("logits") / "a.npy", logits)
    tensor = torch.from_numpy(logits)
    for activation, expected in (("softmax", tensor.softmax(0)), ("sigmoid", tensor.sigmoid())):
        options = ReadOptions(activation=activation, present_at=0)  # type: ignore[arg-type]
        maps = read_maps(path, 3, options=options)
        np.testing.assert_allclose(maps.maps, expected.numpy(), atol=1e-6)


def test_logits_are_not_guessed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", np.full((CLASSES, *SIZE), 4.0))
    with pytest.raises(BadItemError, match="activation"):
        read_seed(path, SIZE, CLASSES)
    bytes_ = save(tmp_path / "b.npy", np.full((CLASSES, *SIZE), 255, np.uint8))
    seed = read_seed(bytes_, SIZE, CLASSES, options=ReadOptions(activation="byte"))
    assert (seed.scores == 1).all()
