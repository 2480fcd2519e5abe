"""Matching and mixing against loops, and the invariants of Eq. 9."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g4seg_pl.core.correspondence import (
    aligned_target,
    discrepancy,
    matched_target,
    mix,
    nearest_neighbours,
)


def looped_neighbours(queries: np.ndarray, references: np.ndarray, radius: float) -> np.ndarray:
    """Eq. 8 for one image, a location at a time."""
    channels, _, width = queries.shape
    wanted, offered = queries.reshape(channels, -1).T, references.reshape(channels, -1).T
    found = []
    for j, query in enumerate(wanted):
        best, best_cosine = -1, -np.inf
        for k, reference in enumerate(offered):
            distance = np.hypot(j // width - k // width, j % width - k % width)
            cosine = query @ reference / np.linalg.norm(query) / np.linalg.norm(reference)
            if cosine > best_cosine and not (radius > 0 and distance <= radius):
                best, best_cosine = k, cosine
        found.append(best)
    return np.array(found)


@pytest.mark.parametrize("radius", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_neighbours_are_those_of_a_loop(radius: float, chunk: int) -> None:
    queries, references = np.random.default_rng(0).normal(size=(2, 2, 6, 5, 7))
    found = nearest_neighbours(
        torch.from_numpy(queries), torch.from_numpy(references), radius, chunk
    )
    for image in range(2):
        expected = looped_neighbours(queries[image], references[image], radius)
        np.testing.assert_array_equal(found[image].numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_the_neighbours_of_its_own_similarities(dtype: torch.dtype) -> None:
    references = torch.eye(12, dtype=dtype).view(1, 12, 3, 4).expand(2, -1, -1, -1)
    found = nearest_neighbours(references.flip(2), references)
    turned = torch.arange(12).view(3, 4).flip(0).flatten()
    assert torch.equal(found, turned.expand(2, -1))


def test_an_image_matches_itself_in_place_unless_that_is_excluded() -> None:
    features = torch.randn(1, 8, 6, 6)
    place = torch.arange(36)[None]
    assert torch.equal(nearest_neighbours(features, features), place)
    assert not (nearest_neighbours(features, features, exclude_radius=1.0) == place).any()


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (1, 6)])
def test_an_excluded_neighbourhood_that_leaves_nothing_is_refused(grid: tuple[int, int]) -> None:
    features = torch.randn(1, 8, *grid)
    limit = float(np.hypot(grid[0] // 2, grid[1] // 2))
    nearest_neighbours(features, features, exclude_radius=limit - 0.01)
    with pytest.raises(ValueError, match="exclude_radius"):
        nearest_neighbours(features, features, exclude_radius=limit)


def test_targets_take_the_partners_value() -> None:
    foreground = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]])
    neighbours = torch.tensor([[3, 3, 0, 1]])
    found = matched_target(foreground, neighbours)
    torch.testing.assert_close(found, torch.tensor([[[0.4, 0.4], [0.1, 0.2]]]))


def test_aligned_target_turns_over_where_features_differ() -> None:
    features = torch.randn(1, 8, 2, 2)
    other = features.clone()
    other[..., 0, 0] *= -1
    differing = discrepancy(features, other)
    torch.testing.assert_close(
        differing, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), atol=1e-6, rtol=0
    )
    target = aligned_target(torch.full((1, 2, 2), 0.9), differing)
    expected = torch.tensor([[[0.1, 0.9], [0.9, 0.9]]])
    torch.testing.assert_close(target, expected, atol=1e-6, rtol=0)


masks = st.integers(0, 10_000).map(
    lambda seed: torch.rand(2, 12, 16, generator=torch.Generator().manual_seed(seed))
)
grids = st.integers(0, 10_000).map(
    lambda seed: torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(seed)).unbind()
)
ranges = st.one_of(
    st.none(), st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: tuple(sorted(pair)))
)


@settings(max_examples=30)
@given(foreground=masks, coarse_and_target=grids, confidence=ranges)
@pytest.mark.parametrize("carry", ["difference", "values"])
def test_beta_one_returns_the_seed_exactly(
    carry: str, foreground: torch.Tensor, coarse_and_target: tuple, confidence: tuple | None
) -> None:
    found = mix(foreground, *coarse_and_target, 1.0, confidence, carry=carry)
    assert torch.equal(found, foreground)


@settings(max_examples=30)
@given(foreground=masks, coarse_and_target=grids, confidence=ranges, beta=st.floats(0, 1))
def test_mixing_stays_in_range_and_outside_the_confidence_range_exact(
    foreground: torch.Tensor, coarse_and_target: tuple, confidence: tuple | None, beta: float
) -> None:
    found = mix(foreground, *coarse_and_target, beta, confidence)
    assert found.min() >= 0
    assert found.max() <= 1
    if confidence is not None:
        outside = (foreground < confidence[0]) | (foreground > confidence[1])
        assert torch.equal(found[outside], foreground[outside])


@pytest.mark.parametrize("carry", ["difference", "values"])
def test_on_the_masks_own_grid_mixing_is_equation_9(carry: str) -> None:
    foreground, target = torch.rand(2, 3, 5, 5).unbind()
    found = mix(foreground, foreground, target, 0.8, None, carry=carry)
    torch.testing.assert_close(found, 0.8 * foreground + 0.2 * target)


def test_both_ends_of_the_confidence_range_may_change() -> None:
    foreground = torch.tensor([[[0.125, 0.25, 0.5, 0.625]]])
    target = 1 - foreground
    found = mix(foreground, foreground, target, 0.0, (0.25, 0.5), carry="values")
    torch.testing.assert_close(found, torch.tensor([[[0.125, 0.75, 0.5, 0.625]]]))
    upper = mix(foreground, foreground, torch.zeros(1, 1, 4), 0.0, (0.25, 0.5))
    assert upper.flatten().tolist() == [0.125, 0.0, 0.0, 0.625]


def test_only_the_difference_is_interpolated_so_edges_survive() -> None:
    foreground = torch.zeros(1, 8, 8)
    foreground[:, :, 3:] = 1
    coarse = foreground[:, ::4, ::4] * 0 + 0.5
    found = mix(foreground, coarse, coarse, 0.0, None)
    assert torch.equal(found, foreground)
