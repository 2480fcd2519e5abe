"""Networks: sizes, the four summed convolutions, and published checkpoints of both families."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
import transformers
from cut_weights import drop_weights
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import WeightsEnum

from g4seg_pl.segmentation.deeplab_v2 import (
    CAFFE_MEAN_BGR,
    DeepLabV2,
    SummedASPP,
    dilated_resnet,
)
from g4seg_pl.segmentation.deeplab_v3 import DeepLabV3, DeepLabV3Plus
from g4seg_pl.segmentation.normalisation import denormalise, normalise
from g4seg_pl.segmentation.outputs import logits_of, padded_logits, resize_logits
from g4seg_pl.segmentation.published import backbone_weights
from g4seg_pl.segmentation.segformer import SegFormer
from g4seg_pl.segmentation.small_deeplab import SmallDeepLab
from g4seg_pl.types import ConfigurationError

TINY_SEGFORMER = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}
BLOCKS = (3, 4, 6, 3)
WIDTHS = (64, 128, 256, 512)


@pytest.mark.parametrize(
    ("make", "stride"),
    [
        (lambda: DeepLabV2(5, "resnet50", "random"), 8),
        (lambda: DeepLabV3(5, weights="random"), 8),
        (lambda: DeepLabV3(5, weights="random", output_stride=16), 16),
        (lambda: DeepLabV3Plus(5, weights="random"), 4),
        (lambda: SegFormer(5, None, TINY_SEGFORMER), 4),
        (lambda: SmallDeepLab(5, width=4), 2),
    ],
    ids=["v2", "v3", "v3 at 16", "v3+", "segformer", "small"],
)
def test_logits_have_the_stated_stride(make: Callable[[], nn.Module], stride: int) -> None:
    network = make().eval()
    with torch.no_grad():
        logits = network(torch.randn(1, 3, 64, 96))
    assert logits.shape == (1, 5, 64 // stride, 96 // stride)
    assert {name for name, _ in network.named_children()} >= {"head"}


def test_summed_pyramid_is_the_sum_of_four_convolutions() -> None:
    head = SummedASPP(6, 3)
    features = torch.randn(2, 6, 9, 9)
    expected = torch.zeros(2, 3, 9, 9)
    for branch, rate in zip(head.branches, (6, 12, 18, 24), strict=True):
        weight, bias = branch.weight, branch.bias
        expected += functional.conv2d(features, weight, bias, padding=rate, dilation=rate)
    assert torch.allclose(head(features), expected, atol=1e-6)


def published_weights(generator: torch.Generator, labels: int | None) -> dict[str, Tensor]:
    """A ResNet-50 under kazuto1011's names, with random weights and statistics."""
    weights: dict[str, Tensor] = {}

    def unit(name: str, shape: tuple[int, int, int, int]) -> None:
        fan_in = shape[1] * shape[2] * shape[3]
        weights[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) / fan_in**0.5
        weights[f"{name}.bn.weight"] = torch.rand(shape[0], generator=generator) + 0.5
        weights[f"{name}.bn.bias"] = torch.randn(shape[0], generator=generator) / 10
        weights[f"{name}.bn.running_mean"] = torch.randn(shape[0], generator=generator) / 10
        weights[f"{name}.bn.running_var"] = torch.rand(shape[0], generator=generator) + 0.5
        weights[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)

    unit("layer1.conv1", (64, 3, 7, 7))
    before = 64
    for stage, (blocks, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True), start=2):
        for block in range(1, blocks + 1):
            place = f"layer{stage}.block{block}"
            unit(f"{place}.reduce", (width, before, 1, 1))
            unit(f"{place}.conv3x3", (width, width, 3, 3))
            unit(f"{place}.increase", (4 * width, width, 1, 1))
            if block == 1:
                unit(f"{place}.shortcut", (4 * width, before, 1, 1))
            before = 4 * width
    for branch in range(4 if labels else 0):
        shape = (labels or 0, 2048, 3, 3)
        weights[f"aspp.c{branch}.weight"] = torch.randn(shape, generator=generator) / 100
        weights[f"aspp.c{branch}.bias"] = torch.randn(shape[0], generator=generator)
    return weights


def run_published(weights: dict[str, Tensor], picture: Tensor) -> Tensor:
    """The published network by its own names, one operation after the other."""

    def unit(name: str, hidden: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        kernel = weights[f"{name}.conv.weight"]
        padding = dilation * (kernel.shape[-1] // 2)
        hidden = functional.conv2d(hidden, kernel, None, stride, padding, dilation)
        parts = [
            weights[f"{name}.bn.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        ]
        return functional.batch_norm(hidden, *parts)

    bgr = picture.float()[:, [2, 1, 0]] - torch.tensor(CAFFE_MEAN_BGR).view(1, 3, 1, 1)
    hidden = unit("layer1.conv1", bgr, stride=2).relu()
    hidden = functional.max_pool2d(hidden, 3, 2, 1, ceil_mode=True)
    for stage, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4)), start=2):
        for block in range(1, BLOCKS[stage - 2] + 1):
            place, step = f"layer{stage}.block{block}", stride if block == 1 else 1
            inner = unit(f"{place}.reduce", hidden, step).relu()
            inner = unit(f"{place}.conv3x3", inner, dilation=dilation).relu()
            inner = unit(f"{place}.increase", inner)
            short = unit(f"{place}.shortcut", hidden, step) if block == 1 else hidden
            hidden = (inner + short).relu()
    return sum(  # type: ignore[return-value]
        functional.conv2d(
            hidden,
            weights[f"aspp.c{branch}.weight"],
            weights[f"aspp.c{branch}.bias"],
            padding=rate,
            dilation=rate,
        )
        for branch, rate in enumerate((6, 12, 18, 24))
    )


def test_published_caffe_checkpoint_gives_its_own_logits(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = published_weights(generator, labels=3)
    # Whole networks of that project are wrapped, so their names begin with "base.".
    torch.save({f"base.{name}": value for name, value in weights.items()}, tmp_path / "net.pth")
    network = DeepLabV2(3, "resnet50", str(tmp_path / "net.pth"), "caffe").eval()
    network.load_pretrained()
    picture = torch.randint(0, 256, (1, 3, 45, 61), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        ours, theirs = network(normalise(picture)), run_published(weights, picture)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-3 * float(theirs.abs().max()))


def test_backbone_under_torchvisions_names_behind_scale(tmp_path: Path) -> None:
    source = dilated_resnet("resnet50", 8).state_dict()
    content = {f"Scale.{name}": value for name, value in source.items()}
    content |= {"Scale.layer5.conv2d_list.0.weight": torch.zeros(2, 2048, 3, 3)}
    torch.save(content, tmp_path / "init.pth")
    network = DeepLabV2(5, "resnet50", str(tmp_path / "init.pth"), "caffe")
    network.load_pretrained()  # a classifier of another size is left out
    loaded = network.backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.items())


def test_checkpoint_names_are_a_bijection() -> None:
    weights = published_weights(torch.Generator().manual_seed(1), labels=None)
    renamed = backbone_weights(weights)
    assert len(renamed) == len(weights)
    assert set(renamed) == set(dilated_resnet("resnet50", 8).state_dict())


def test_torchvisions_coco_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=4, aux_loss=True
    ).eval()
    asked: list[str] = []

    def stored(weights: WeightsEnum, **_: object) -> dict[str, Tensor]:
        asked.append(str(weights))
        return theirs.state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", stored)
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    networks = [
        DeepLabV2(3, "resnet50", "coco"),
        DeepLabV2(3, "resnet50", str(tmp_path / "net.pth")),
        DeepLabV3(3, weights="coco"),
    ]
    picture = torch.randn(1, 3, 33, 41)
    with torch.no_grad():
        expected = theirs.backbone(picture)["out"]
        for network in networks:
            network.load_pretrained()
            assert torch.allclose(network.eval().backbone(picture)["4"], expected, atol=1e-5)
    assert asked == ["DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1"] * 2


@pytest.mark.parametrize(
    ("content", "style", "said"),
    [
        ({"layer2.block1.reduce.conv.weight": torch.zeros(1)}, "torchvision", "style to caffe"),
        ({"conv1.weight": torch.zeros(1)}, "caffe", "style to torchvision"),
        ({"conv1.weight": torch.zeros(1)}, "torchvision", "weights are missing"),
        ({"epoch": 3}, "caffe", "no tensors"),
    ],
)
def test_unfit_checkpoints_are_refused(
    tmp_path: Path, content: dict[str, object], style: str, said: str
) -> None:
    torch.save(content, tmp_path / "net.pth")
    network = DeepLabV2(3, "resnet50", str(tmp_path / "net.pth"), style)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=said):
        network.load_pretrained()


def test_missing_checkpoint_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"no file nowhere\.pth"):
        DeepLabV2(3, "resnet50", "nowhere.pth").load_pretrained()


def test_segformer_starts_from_a_published_encoder(tmp_path: Path) -> None:
    config = transformers.SegformerConfig(**TINY_SEGFORMER)
    encoder = transformers.SegformerModel(config)
    encoder.save_pretrained(tmp_path)
    network = SegFormer(7, str(tmp_path))
    network.load_pretrained()
    loaded = network.backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in encoder.state_dict().items())
    assert network.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 7, 16, 16)


def test_segformer_names_what_it_cannot_load(tmp_path: Path) -> None:
    published = tmp_path / "encoder"
    transformers.SegformerModel(transformers.SegformerConfig(**TINY_SEGFORMER)).save_pretrained(
        published
    )
    with pytest.raises(ConfigurationError, match="nowhere"):
        SegFormer(7, "./nowhere")
    drop_weights(published, "encoder.block.0.")
    with pytest.raises(ConfigurationError, match=r"cannot be loaded: .* not in its"):
        SegFormer(7, str(published)).load_pretrained()
    with pytest.raises(ConfigurationError, match="one of them"):
        SegFormer(7, "nvidia/mit-b1", TINY_SEGFORMER)


def test_logits_are_found_in_what_networks_return() -> None:
    logits = torch.randn(1, 2, 4, 4)
    output = transformers.modeling_outputs.SemanticSegmenterOutput(logits=logits)
    for returned in (logits, {"out": logits, "aux": None}, output):
        assert logits_of(returned) is logits
    with pytest.raises(TypeError, match="tuple"):
        logits_of((logits,))
    assert resize_logits(logits.bfloat16(), (8, 8)).dtype == torch.float32


@pytest.mark.parametrize(("size", "padded"), [((40, 52), (48, 64)), ((48, 33), (48, 48))])
def test_pictures_are_padded_for_networks_that_ask_for_it(
    size: tuple[int, int], padded: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3, stride=4, padding=1)
    seen: list[Tensor] = []

    def network(images: Tensor) -> Tensor:
        seen.append(images)
        return convolution(images)

    images = torch.randn(2, 3, *size)
    by_hand = torch.zeros(2, 3, *padded)
    by_hand[..., : size[0], : size[1]] = images
    with torch.no_grad():
        found = padded_logits(network, images, 16)
        expected = functional.interpolate(convolution(by_hand), padded, mode="bilinear")
        assert torch.equal(seen[0], by_hand)
        assert torch.allclose(found, expected[..., : size[0], : size[1]], atol=1e-6)
        assert torch.equal(padded_logits(network, images, 1), convolution(images))


def test_normalisation_can_be_undone() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(denormalise(normalise(values)), values)
    # torchvision's own statistics.
    from torchvision.transforms import v2

    theirs = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(values.float() / 255)
    assert torch.allclose(normalise(values), theirs, atol=1e-6)
