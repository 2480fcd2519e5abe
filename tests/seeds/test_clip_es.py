"""CLIP-ES against hooks on open_clip's own forward pass, loops and OpenCV's contours."""

from pathlib import Path
from typing import Any

import cv2
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.features.base import CLIP_MEAN, CLIP_STD, normalise
from g4seg_pl.seeds.attention_affinity import attention_affinity, box_masks
from g4seg_pl.seeds.clip_es import (
    ClipES,
    _maps_and_attention,
    clip_es_maps,
    gradcam_maps,
)
from g4seg_pl.seeds.clip_model import encode_texts, grid_positions, load_clip
from g4seg_pl.types import ConfigurationError, FailedSample, RefinedMask, Sample


def unit(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, 24, generator=generator), dim=-1)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def hooked_cam(
    clip: Any, image: Tensor, texts: Tensor, index: int, pooling: str, weights: str
) -> Tensor:
    """Grad-CAM or HiResCAM of one class by hooks, through open_clip's own forward pass."""
    kept: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    block = clip.visual.transformer.resblocks[-1]
    handle = block.ln_1.register_forward_hook(keep)
    clip.visual.output_tokens = True
    with torch.enable_grad():
        pooled, tokens = clip.visual(normalise(image, CLIP_MEAN, CLIP_STD))
        if pooling == "patches":
            pooled = tokens.mean(1) @ clip.visual.proj
        logits = clip.logit_scale.exp() * functional.normalize(pooled, dim=-1) @ texts.T
        logits.softmax(-1)[0, index].backward()
    handle.remove()
    clip.visual.output_tokens = False
    assert kept[0].grad is not None
    gradient, activation = kept[0].grad[0, 1:], kept[0].detach()[0, 1:]
    channels = gradient.mean(0) if weights == "mean" else gradient
    cam = (activation * channels).sum(1).clamp(min=0).reshape(4, 4)
    for _ in range(2):
        cam = cam - cam.min()
        cam = cam / (cam.max() + 1e-7)
    return cam


@pytest.mark.parametrize("weights", ["mean", "elementwise"])
@pytest.mark.parametrize("pooling", ["patches", "class_token"])
def test_gradcam_agrees_with_hooks_on_the_models_own_pass(
    clip: Any, images: Tensor, pooling: Any, weights: Any
) -> None:
    classes, words = unit(4, 1), unit(3, 2)
    present = torch.tensor([[True, False, True, False], [False, True, True, True]])
    maps = gradcam_maps(clip, images, classes, present, words, pooling, channel_weights=weights)
    assert maps.owner.tolist() == [0, 0, 1, 1, 1]
    assert maps.class_index.tolist() == [0, 2, 1, 2, 3]
    for found, owner, index in zip(maps.maps, maps.owner, maps.class_index, strict=True):
        own = present[owner].nonzero()[:, 0].tolist()
        texts = torch.cat([classes[own], words])
        place = own.index(int(index))
        expected = hooked_cam(clip, images[owner : owner + 1], texts, place, pooling, weights)
        assert torch.allclose(found, expected, atol=1e-4)
        assert found.max() > 0.9


def explicit_attention(clip: Any, image: Tensor) -> list[Tensor]:
    """Attention between patches of every layer, from the weights alone."""
    found: list[Tensor] = []

    def keep(module: Any, inputs: tuple[Tensor, ...], _output: object) -> None:
        query, key, _ = functional.linear(
            inputs[0][0], module.in_proj_weight, module.in_proj_bias
        ).chunk(3, dim=-1)
        heads = []
        for head in range(module.num_heads):
            part = slice(16 * head, 16 * head + 16)
            heads.append((query[:, part] @ key[:, part].T / 4).softmax(-1))
        found.append(torch.stack(heads).mean(0)[1:, 1:])

    blocks = clip.visual.transformer.resblocks
    handles = [block.attn.register_forward_hook(keep) for block in blocks]
    clip.visual(normalise(image, CLIP_MEAN, CLIP_STD))
    for handle in handles:
        handle.remove()
    return found


def opencv_boxes(cam: np.ndarray, threshold: float) -> np.ndarray:
    """The boxes of CLIP-ES by OpenCV."""
    steps = (cam * 255).astype(np.uint8)
    _, bright = cv2.threshold(steps, int(threshold * steps.max()), 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(bright, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    mask = np.zeros(cam.shape, np.float32)
    for contour in contours:
        x, y, width, height = cv2.boundingRect(contour)
        mask[y : min(y + height, len(cam) - 1), x : min(x + width, cam.shape[1] - 1)] = 1
    return mask


@pytest.mark.parametrize("threshold", [0.4, 0.7])
def test_boxes_agree_with_opencv(threshold: float) -> None:
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand(20, 9, 12, generator=generator) ** 3
    maps[0] = 0
    found = box_masks(maps, threshold)
    for mask, cam in zip(found.numpy(), maps.numpy(), strict=True):
        np.testing.assert_array_equal(mask, opencv_boxes(cam, threshold))


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_propagated_maps_agree_with_a_plain_loop(clip: Any, images: Tensor, layers: int) -> None:
    classes, words = unit(2, 1), unit(3, 2)
    present = torch.ones(1, 2, dtype=torch.bool)
    moved, plain = clip_es_maps(clip, images[:1], classes, present, words, affinity_layers=layers)
    matrix = torch.stack(explicit_attention(clip, images[:1])[-layers:]).mean(0)
    for _ in range(3):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    matrix = (matrix + matrix.T) / 2
    matrix = matrix @ matrix
    for found, cam in zip(moved.maps, plain.maps, strict=True):
        inside = torch.from_numpy(opencv_boxes(cam.numpy(), 0.4)).flatten()
        expected = ((matrix * inside[None]) @ cam.flatten()).reshape(4, 4)
        expected = expected - expected.min()
        assert torch.allclose(found, expected / (expected.max() + 1e-7), atol=1e-4)


@pytest.mark.parametrize(("layers", "kept"), [(1, 1), (2, 2), (3, 3), (8, 3)])
def test_only_the_attention_that_is_averaged_is_kept(
    clip: Any, images: Tensor, layers: int, kept: int
) -> None:
    present = torch.ones(2, 1, dtype=torch.bool)
    how: Any = ("patches", "bilinear", "mean", layers)
    _, attention = _maps_and_attention(clip, images, unit(1, 1), present, unit(2, 2), *how)
    assert len(attention) == kept
    expected = explicit_attention(clip, images[:1])[-layers:]
    for found, matrix in zip(attention, expected, strict=True):
        assert torch.allclose(found[0], matrix, atol=1e-5)


def test_affinity_of_uniform_attention_spreads_evenly() -> None:
    matrix = attention_affinity([torch.full((1, 6, 6), 0.2)])
    assert torch.allclose(matrix, torch.full((1, 6, 6), 1 / 6))


def test_maps_do_not_depend_on_the_batch(clip: Any) -> None:
    images = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(4)) * 2 - 1
    present = torch.ones(2, 3, dtype=torch.bool)
    together, _ = clip_es_maps(clip, images, unit(3, 1), present, unit(2, 2))
    alone, _ = clip_es_maps(clip, images[1:], unit(3, 1), present[1:], unit(2, 2))
    assert together.maps.shape == (6, 5, 3)
    assert torch.allclose(together.maps[3:], alone.maps, atol=1e-4)


def test_a_class_that_is_absent_changes_nothing(clip: Any, images: Tensor) -> None:
    present = torch.tensor([[True, False]])
    both = gradcam_maps(clip, images[:1], unit(2, 1), present, unit(2, 2))
    alone = gradcam_maps(clip, images[:1], unit(2, 1)[:1], present[:, :1], unit(2, 2))
    assert torch.allclose(both.maps, alone.maps, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "bicubic_offset"])
def test_positions_keep_the_class_token_and_constants(interpolation: Any) -> None:
    positions = torch.ones(17, 5)
    positions[0] = 7
    found = grid_positions(positions, (4, 4), (6, 3), interpolation)
    assert torch.allclose(found[0], torch.full((5,), 7.0))
    assert torch.allclose(found[1:], torch.ones(18, 5), atol=1e-5)


def test_texts_are_means_of_unit_vectors(worded_clip_folder: Path) -> None:
    model, tokenizer = load_clip(str(worded_clip_folder))
    templates = ["a photo of a {}", "a {}"]
    (found,) = encode_texts(model, tokenizer, ["dog"], templates)
    rows = model.encode_text(tokenizer([text.format("dog") for text in templates]))  # type: ignore[operator]
    mean = (rows / rows.norm(dim=1, keepdim=True)).mean(0)
    assert torch.allclose(found, mean / mean.norm(), atol=1e-6)


def test_a_subfolder_with_the_tokenizer_will_do(worded_clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "clip" / "tokenizer").mkdir(parents=True)
    for file in worded_clip_folder.iterdir():
        place = "clip" if file.name.startswith("open_clip") else "clip/tokenizer"
        (tmp_path / place / file.name).write_bytes(file.read_bytes())
    _, moved = load_clip(str(tmp_path / "clip"))
    _, beside = load_clip(str(worded_clip_folder))
    assert torch.equal(moved(["a photo of a dog"]), beside(["a photo of a dog"]))


def test_predicts_native_maps_and_passes_failures_on(
    worded_clip_folder: Path, sample: Sample
) -> None:
    maker = ClipES(str(worded_clip_folder), background_words=["person", "car"])
    maker.configure_model()
    unlabelled = Sample("none", sample.image, sample.seed, ())
    failed = FailedSample("lost", "no file")
    made, nothing, passed = maker.predict_step([sample, unlabelled, failed])
    assert isinstance(made, RefinedMask)
    assert made.class_ids == (2, 5)
    assert made.foreground.shape == (2, 40, 53)
    assert 0 <= made.foreground.min() < made.foreground.max() <= 1
    assert set(made.label.unique().tolist()) <= {0, 2, 5}
    assert isinstance(nothing, FailedSample)
    assert "data.labels" in nothing.error
    assert passed == failed


class Twice(pl.LightningDataModule):
    """One batch with the same sample twice."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.batch = [sample, sample]

    def predict_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.batch, batch_size=2, collate_fn=list)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, *_: Any) -> Any:
        return batch


class Keep(pl.Callback):
    """Keeps what a prediction returned: Lightning itself refuses to move frozen dataclasses."""

    def __init__(self) -> None:
        self.made: list[RefinedMask] = []

    def on_predict_batch_end(self, *arguments: Any, **_: Any) -> None:
        self.made += arguments[2]


def test_runs_in_lightnings_inference_mode(worded_clip_folder: Path, sample: Sample) -> None:
    maker = ClipES(str(worded_clip_folder), background_words=[], affinity=False)
    kept = Keep()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[kept],
    )
    trainer.predict(maker, datamodule=Twice(sample), return_predictions=False)
    first, second = kept.made
    assert torch.equal(first.foreground, second.foreground)
    assert first.foreground.max() > 0.5


def test_texts_lie_where_the_model_does(worded_clip_folder: Path) -> None:
    maker = ClipES(str(worded_clip_folder), background_words=[])
    maker.configure_model()
    maker._texts(("dog",))
    moved = maker.to("meta")
    for names in ((), ("dog",)):
        assert moved._texts(names).device.type == "meta"


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model: folder .* has no open_clip_config.json"):
        load_clip(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"model: 'nowhere' is no folder"):
        load_clip("nowhere")
