"""Prediction at the picture's size by several scales, mirrored, with a dense CRF."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from g4seg_pl.callbacks.crf import CRFSettings, dense_crf
from g4seg_pl.segmentation.inference import (
    predict_probabilities,
    present_classes,
    sharpen_probabilities,
)
from g4seg_pl.segmentation.module import to_mask
from g4seg_pl.segmentation.normalisation import normalise


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 5, 1))


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, by pixel centres."""
    return functional.interpolate(images, size, mode="bilinear", align_corners=False)


def test_scales_and_mirror_images_are_averaged(network: nn.Module) -> None:
    images = torch.randn(2, 3, 40, 60)
    found = predict_probabilities(network, images, (1.0, 1.5), flip=True)
    views = []
    for size in ((40, 60), (60, 90)):
        scaled = resized(images, size)
        straight = resized(network(scaled), (40, 60)).softmax(1)
        mirrored = resized(network(torch.flip(scaled, [3])), (40, 60)).softmax(1)
        views += [straight, torch.flip(mirrored, [3])]
    assert torch.allclose(found, torch.stack(views).mean(0), atol=1e-5)
    assert torch.allclose(found.sum(1), torch.ones(2, 40, 60), atol=1e-5)


def test_one_scale_is_the_networks_own_answer(network: nn.Module) -> None:
    images = torch.randn(1, 3, 33, 47)
    found = predict_probabilities(network, images)
    assert torch.allclose(found, resized(network(images), (33, 47)).softmax(1))


def test_no_side_becomes_shorter_than_networks_can_take(network: nn.Module) -> None:
    sizes: list[tuple[int, ...]] = []

    def noted(images: Tensor) -> Tensor:
        sizes.append(tuple(images.shape[2:]))
        return network(images)

    predict_probabilities(noted, torch.randn(1, 3, 40, 100), (0.5, 0.25, 1.5))
    assert sizes == [(32, 50), (32, 32), (60, 150)]


def test_classes_come_in_order_and_once_however_they_are_allowed() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1).repeat(1, 1, 2)
    probabilities[2, 0, 1] = 0.5
    found = present_classes(probabilities, allowed=[3, 2, 3])
    assert found.class_ids == (2, 3)
    expected = torch.tensor([[0.3 / 0.8, 0.5 / 1.0], [0.4 / 0.8, 0.4 / 1.0]])
    torch.testing.assert_close(found.scores[:, 0], expected)


def test_flip_makes_the_answer_to_a_mirror_image_its_mirror_image(network: nn.Module) -> None:
    images = torch.randn(1, 3, 32, 48)
    one = predict_probabilities(network, images, flip=True)
    other = predict_probabilities(network, images.flip(-1), flip=True)
    assert torch.allclose(one.flip(-1), other, atol=1e-5)


def test_dense_crf_sees_the_picture_as_it_was() -> None:
    picture = torch.randint(0, 256, (1, 3, 20, 24), dtype=torch.uint8)
    probabilities = torch.randn(1, 3, 20, 24).softmax(1)
    settings = CRFSettings(iterations=2)
    found = sharpen_probabilities(normalise(picture), probabilities, settings)
    pixels = np.ascontiguousarray(picture[0].permute(1, 2, 0).numpy())
    expected = dense_crf(pixels, probabilities[0].numpy(), settings)
    assert np.allclose(found[0].numpy(), expected)


def test_only_winning_and_allowed_classes_are_kept() -> None:
    probabilities = torch.full((4, 2, 2), 0.1)
    probabilities[2, 0] = probabilities[0, 1, 0] = probabilities[3, 1, 1] = 0.7
    everything = present_classes(probabilities)
    assert everything.class_ids == (2, 3)
    assert torch.allclose(everything.scores[0, 0, 0], torch.tensor(0.7 / 0.9))
    mask = to_mask("a", probabilities, allowed=[1, 2])
    assert mask.class_ids == (2,)
    assert mask.label.tolist() == [[2, 2], [0, 0]]
    assert torch.equal(to_mask("a", probabilities).label.long(), probabilities.argmax(0))
