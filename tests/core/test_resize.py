"""Sizes: unchanged masks come back exactly, changes come back where they were made."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g4seg_pl.core.resize import apply_change, image_to_working, masks_to_working

sides = st.integers(1, 40)


@settings(max_examples=30)
@given(height=sides, width=sides, seed=st.integers(0, 1000))
def test_an_unchanged_mask_comes_back_exactly(height: int, width: int, seed: int) -> None:
    native = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed))
    work = masks_to_working(native, (16, 16))
    assert torch.equal(apply_change(native, work, work), native)


@settings(max_examples=30)
@given(height=sides, width=sides, change=st.floats(-1, 1))
def test_a_uniform_change_is_added_and_clipped(height: int, width: int, change: float) -> None:
    native = torch.rand(1, height, width)
    work = torch.full((1, 16, 16), 0.5)
    found = apply_change(native, work, work + change)
    torch.testing.assert_close(found, (native + change).clamp(0, 1), atol=1e-6, rtol=0)


def test_images_map_to_minus_one_and_one() -> None:
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2).expand(3, 4, 2)
    working = image_to_working(image, (4, 2))
    assert torch.equal(working[..., 0], -torch.ones(3, 4))
    assert torch.equal(working[..., 1], torch.ones(3, 4))
    assert image_to_working(image, (7, 9)).shape == (3, 7, 9)


def test_detail_finer_than_the_working_size_is_averaged() -> None:
    board = (torch.arange(15)[:, None] + torch.arange(15)) % 2
    # A third: the centre of a cell is that of a pixel, which alone would be 0 or 1.
    grey = masks_to_working(board[None].float(), (5, 5))[:, 1:-1, 1:-1]
    torch.testing.assert_close(grey, torch.full((1, 3, 3), 0.5), rtol=0, atol=0.02)
    image = (255 * board).to(torch.uint8).expand(3, -1, -1)
    assert image_to_working(image, (5, 5))[:, 1:-1, 1:-1].abs().max() < 0.04
