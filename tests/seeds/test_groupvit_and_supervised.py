"""GroupViT and supervised segmenters against the library's own inference on tiny models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cut_weights import drop_weights
from torch import Tensor
from torch.nn import functional
from transformers import (
    GroupViTConfig,
    GroupViTModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    SwinConfig,
)
from transformers.models.groupvit.modeling_groupvit import get_grouping_from_attentions

from datamodules.seed_files import read_seed
from g4seg_pl.callbacks.output_folder import OutputFolder
from g4seg_pl.features.base import normalise
from g4seg_pl.seeds.groupvit import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    GroupVit,
    group_scores,
    grouped,
    groupvit_scores,
)
from g4seg_pl.seeds.panoptic import panoptic_quality, panoptic_segments
from g4seg_pl.seeds.supervised import Supervised, query_scores
from g4seg_pl.types import ConfigurationError, RefinedMask, Sample


@pytest.fixture(scope="module")
def groupvit_folder(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "groupvit"
    shutil.copytree(sd1_folder / "tokenizer", folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = sizes | {
        "image_size": 32,
        "patch_size": 4,
        "depths": [1, 1, 1],
        "num_group_tokens": [8, 4, 0],
        "num_output_groups": [8, 4, 0],
        "num_hidden_layers": 3,
    }
    text = sizes | {"num_hidden_layers": 1, "vocab_size": 600, "max_position_embeddings": 77}
    config = GroupViTConfig(
        text_config=text, vision_config=vision, projection_dim=12, projection_intermediate_dim=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GroupViTModel(config)
        for weight in model.vision_model.parameters():
            weight.data += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def groupvit(groupvit_folder: Path) -> Any:
    return GroupViTModel.from_pretrained(groupvit_folder).eval().requires_grad_(False)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_groups_agree_with_the_ports_own(groupvit: Any, image: Tensor) -> None:
    soft, groups, pooled = grouped(groupvit, image)
    pixels = normalise(image, IMAGENET_MEAN, IMAGENET_STD)
    outputs = groupvit.vision_model(pixels, output_attentions=True)
    expected = get_grouping_from_attentions(
        [part for part in outputs.attentions if part is not None], (32, 32)
    )
    assert soft.shape == (1, 4, 32, 32)
    assert torch.allclose(soft, expected, atol=1e-5)
    vector = groupvit.get_image_features(pixels).pooler_output
    assert torch.allclose(pooled, functional.normalize(vector, dim=-1), atol=1e-5)
    tokens = groupvit.visual_projection(outputs.last_hidden_state[0])
    assert torch.allclose(groups[0], functional.normalize(tokens, dim=-1), atol=1e-5)


def test_group_scores_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    groups, texts = torch.randn(3, 4, generator=generator), torch.randn(7, 4, generator=generator)
    image = torch.randn(4, generator=generator)
    found = group_scores(groups, image, texts, 2.0, likeliest=5)
    likely = sorted(range(7), key=lambda index: -float(image @ texts[index]))[:5]
    for group in range(3):
        logits = [2 * float(groups[group] @ text) for text in texts]
        every = torch.tensor(logits).softmax(0)
        few = torch.tensor([logits[index] for index in likely]).softmax(0)
        for index in range(7):
            expected = few[likely.index(index)] * every[index] if index in likely else 0.0
            assert float(found[group, index]) == pytest.approx(float(expected), abs=1e-6)


def test_pixels_below_the_threshold_are_background(groupvit: Any, image: Tensor) -> None:
    texts = functional.normalize(torch.randn(3, 12), dim=-1)
    low = groupvit_scores(groupvit, image, texts, background_threshold=0.0)[0]
    assert not low[0].any()
    capped = groupvit_scores(groupvit, image, texts, background_threshold=2.0)[0]
    best = capped[1:].amax(0)
    assert torch.equal(capped[0], (best < capped[1:].max()).float()) or best.max() < 1
    assert torch.equal(capped[1:], low[1:])


def test_groupvit_predicts_over_windows(groupvit_folder: Path, sample: Sample) -> None:
    maker = GroupVit(
        str(groupvit_folder),
        class_names=[["dog"], ["cat", "zebra"]],
        short_side=40,
        crop=32,
        stride=16,
    )
    maker.configure_model()
    (made,) = maker.predict_step([sample])
    assert isinstance(made, RefinedMask)
    assert made.label.shape == (40, 53)
    assert set(made.label.unique().tolist()) - {0} == set(made.class_ids) <= {1, 2}


def test_a_groupvit_that_lacks_weights_is_refused(groupvit_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "groupvit"
    shutil.copytree(groupvit_folder, folder)
    drop_weights(folder, "text_projection.")
    with pytest.raises(ConfigurationError, match=r"as GroupViT: .*shape: text_projection\."):
        GroupVit(str(folder), class_names=[["dog"]]).configure_model()


@pytest.fixture(scope="module")
def segformer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_segformer(tmp_path_factory.mktemp("models") / "segformer", 5)


def write_segformer(folder: Path, num_labels: int) -> Path:
    config = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
        num_labels=num_labels,
    )
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("first_label", [0, 1])
def test_semantic_labels_are_the_librarys_own(
    segformer_folder: Path, sample: Sample, first_label: Any
) -> None:
    maker = Supervised(str(segformer_folder), first_label=first_label)
    maker.configure_model()
    (made,) = maker.predict_step([sample])
    assert isinstance(made, RefinedMask)
    processor = SegformerImageProcessor.from_pretrained(segformer_folder)
    inputs = processor(sample.image.permute(1, 2, 0).numpy(), return_tensors="pt")
    with torch.no_grad():
        outputs = maker.network(**inputs)
    (expected,) = processor.post_process_semantic_segmentation(outputs, [(40, 53)])
    assert torch.equal(made.label.long(), expected.long() + first_label)
    scores = functional.interpolate(outputs.logits, (40, 53), mode="bilinear")[0].softmax(0)
    assert torch.allclose(made.foreground[0], scores[made.class_ids[0] - first_label], atol=1e-5)
    with pytest.raises(ConfigurationError, match="panoptic needs a universal one"):
        Supervised(str(segformer_folder), task="panoptic").configure_model()


@pytest.mark.parametrize(("first_label", "classes"), [(1, 5), (0, 4)])
def test_a_segmenter_of_other_classes_than_the_datas_is_refused(
    segformer_folder: Path,
    new_trainer: Callable[[], pl.Trainer],
    data_of: Callable[..., pl.LightningDataModule],
    first_label: Any,
    classes: int,
) -> None:
    def predict(class_list: str) -> None:
        maker = Supervised(str(segformer_folder), first_label=first_label)
        new_trainer().predict(maker, datamodule=data_of(class_list), return_predictions=False)

    for other in ("abc", "abcdef"):
        said = f"model: the network has {classes} classes, the data's class list {len(other)}"
        with pytest.raises(ConfigurationError, match=f"{said}; with first_label {first_label}"):
            predict(other)
    predict("abcdef"[:classes])


def test_a_segmenter_of_more_classes_than_masks_can_number_is_refused(tmp_path: Path) -> None:
    folder = write_segformer(tmp_path / "segformer", 255)
    with pytest.raises(ConfigurationError, match="model: 255 classes"):
        Supervised(str(folder)).configure_model()
    Supervised(str(folder), first_label=0).configure_model()


def test_a_segmenter_that_lacks_weights_is_refused(segformer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "segformer"
    shutil.copytree(segformer_folder, folder)
    drop_weights(folder, "decode_head.batch_norm.num_batches_tracked")
    Supervised(str(folder)).configure_model()
    drop_weights(folder, "decode_head.classifier.")
    with pytest.raises(ConfigurationError, match=r"segmenter: .*shape: decode_head\.classifier\."):
        Supervised(str(folder)).configure_model()


def test_weights_that_only_training_uses_may_be_missing(
    mask2former_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mask2former"
    shutil.copytree(mask2former_folder, folder)
    drop_weights(folder, "criterion.")
    Supervised(str(folder)).configure_model()


@pytest.fixture(scope="module")
def mask2former_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mask2former"
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        num_labels=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Mask2FormerForUniversalSegmentation(config)
        # Untrained queries all look alike; these differ, and some are sure of a class.
        model.class_predictor.weight.data *= 40
        model.model.transformer_module.queries_features.weight.data *= 20
    model.save_pretrained(folder)
    from transformers import Mask2FormerImageProcessor

    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_universal_scores_are_the_librarys_own(mask2former_folder: Path, sample: Sample) -> None:
    maker = Supervised(str(mask2former_folder))
    maker.configure_model()
    (made,) = maker.predict_step([sample])
    assert isinstance(made, RefinedMask)
    with torch.no_grad():
        outputs = maker.network(**maker._inputs(sample))
    processor = maker._processor
    (expected,) = processor.post_process_semantic_segmentation(outputs, [(40, 53)])
    assert torch.equal(made.label.long(), expected.long() + 1)


def queries(count: int = 8) -> tuple[Tensor, Tensor]:
    """Class and mask logits of queries, some sure and some not."""
    generator = torch.Generator().manual_seed(5)
    classes = torch.randn(count, 5, generator=generator) * 6
    return classes, discs(torch.rand(count, 2, generator=generator) * 16)


def discs(centres: Tensor) -> Tensor:
    """Mask logits of discs with a radius of 4 on 16x16 places."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    places = torch.stack([rows, columns], dim=-1)
    distances = (places[None] - centres[:, None, None]).norm(dim=-1)
    return 4 - distances


def test_panoptic_segments_are_the_librarys_own(mask2former_folder: Path) -> None:
    from transformers import Mask2FormerImageProcessor
    from transformers.models.mask2former.modeling_mask2former import (
        Mask2FormerForUniversalSegmentationOutput as Output,
    )

    classes, masks = queries()
    big = functional.interpolate(masks[None], (384, 384), mode="bilinear")[0]
    found = panoptic_segments(classes, big, (30, 40), 0.5, 0.5)
    outputs = Output(class_queries_logits=classes[None], masks_queries_logits=masks[None])
    processor = Mask2FormerImageProcessor.from_pretrained(mask2former_folder)
    (expected,) = processor.post_process_panoptic_segmentation(
        outputs, 0.5, 0.5, 0.5, label_ids_to_fuse=set(), target_sizes=[(30, 40)]
    )
    assert len(found.class_ids) >= 2
    assert torch.equal(found.segments, expected["segmentation"].long())
    assert found.class_ids == tuple(part["label_id"] for part in expected["segments_info"])
    assert found.scores.shape == (len(found.class_ids), 30, 40)


def test_fused_classes_make_one_segment_and_nothing_is_a_result() -> None:
    classes, masks = queries()
    classes[:, :] = 0
    classes[:4, 1], classes[4:, 4] = 20, 20
    apart = panoptic_segments(classes, masks, (16, 16), overlap=0.1)
    fused = panoptic_segments(classes, masks, (16, 16), overlap=0.1, fused={1})
    assert len(apart.class_ids) > len(fused.class_ids) == 1
    assert torch.equal(apart.segments > 0, fused.segments > 0)
    empty = panoptic_segments(classes[4:], masks[4:], (16, 16))
    assert empty.class_ids == ()
    assert not empty.segments.any()


def test_query_scores_by_hand() -> None:
    classes, masks = queries(3)
    found = query_scores(classes, masks, (16, 16))
    weights = classes.softmax(1)[:, :4]
    expected = sum(weights[q, 2] * masks[q].sigmoid() for q in range(3))
    assert torch.allclose(found[2], torch.as_tensor(expected), atol=1e-6)


def test_panoptic_quality_of_the_truth_is_one() -> None:
    classes = torch.zeros(8, 8, dtype=torch.int64)
    classes[:4] = 1
    instances = torch.zeros(8, 8, dtype=torch.int64)
    instances[:4, 4:] = 1
    truth = torch.stack([classes, instances], dim=-1)
    assert panoptic_quality([(truth, truth)], things=[1], stuffs=[0]) == pytest.approx(1.0)
    merged = torch.stack([classes, torch.zeros_like(instances)], dim=-1)
    assert panoptic_quality([(merged, truth)], things=[1], stuffs=[0]) < 0.8


@pytest.mark.parametrize(("first_label", "class_ids"), [(1, (2, 1)), (0, (1,))])
def test_segments_of_one_class_make_one_map_that_can_be_read_again(
    mask2former_folder: Path, tmp_path: Path, first_label: Any, class_ids: tuple[int, ...]
) -> None:
    from transformers.models.mask2former.modeling_mask2former import (
        Mask2FormerForUniversalSegmentationOutput as Output,
    )

    classes, masks = torch.zeros(3, 5), discs(torch.tensor([[4.0, 4], [12, 12], [4, 12]]))
    classes[:2, 1], classes[2, 0] = 20, 20
    maker = Supervised(str(mask2former_folder), task="panoptic", first_label=first_label)
    maker.configure_model()
    outputs = Output(class_queries_logits=classes[None], masks_queries_logits=masks[None])
    made = maker._panoptic("one", outputs, (16, 16))
    apart = panoptic_segments(classes, maker._masks(outputs), (16, 16))
    assert apart.class_ids == (1, 1, 0)
    assert made.class_ids == class_ids
    assert torch.equal(made.foreground[0], apart.scores[:2].amax(0))
    labels = torch.tensor([0, first_label + 1, first_label + 1, first_label])
    assert torch.equal(made.label.long(), labels[apart.segments])
    folder = OutputFolder(tmp_path, "npz")
    folder.make()
    folder.save(made)
    seed = read_seed(folder.soft_path("one"), (16, 16), 4)
    assert sorted(seed.class_ids) == sorted(class_ids)


def test_panoptic_maps_come_one_a_class(mask2former_folder: Path, sample: Sample) -> None:
    maker = Supervised(
        str(mask2former_folder), task="panoptic", panoptic_threshold=0.1, panoptic_overlap=0.0
    )
    maker.configure_model()
    (made,) = maker.predict_step([sample])
    assert isinstance(made, RefinedMask)
    assert len(made.foreground) == len(made.class_ids) == len(set(made.class_ids))
    assert set(made.label.unique().tolist()) <= {0, *made.class_ids}
