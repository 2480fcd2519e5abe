"""CAM against a loop over scales, the grad-cam library, and a fit on image-level labels."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.seeds.base import resize_picture
from g4seg_pl.seeds.cam import Cam, gradient_maps, multi_scale_cam
from g4seg_pl.seeds.cam_training import training_picture
from g4seg_pl.seeds.classifier import ResNetClassifier, activation_maps, read_weights
from g4seg_pl.types import ConfigurationError, FailedSample, RefinedMask, Sample, Seed


@pytest.fixture(scope="module")
def network() -> ResNetClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResNetClassifier("resnet18", 6).eval().requires_grad_(False)


@pytest.fixture
def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, *size, generator=generator) for size in ((40, 53), (20, 26))]


def test_features_lie_on_a_sixteenth_without_dilation() -> None:
    network = ResNetClassifier("resnet50", 3)
    stage = network.resnet.layer4
    strides = {m.stride for m in stage.modules() if isinstance(m, torch.nn.Conv2d)}
    dilations = {m.dilation for m in stage.modules() if isinstance(m, torch.nn.Conv2d)}
    assert strides == dilations == {(1, 1)}
    assert network.head.weight.shape == (3, 2048, 1, 1)


@pytest.mark.parametrize("train_all", [False, True])
def test_every_weight_that_asks_for_a_gradient_gets_one(train_all: bool) -> None:
    # Processes that exchange gradients would wait for the others.
    network = ResNetClassifier("resnet18", 3, train_all=train_all).train()
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    weights = list(network.parameters())
    assert all((each.grad is not None) == each.requires_grad for each in weights)
    assert all(each.requires_grad for each in weights) == train_all


def test_the_mean_of_the_response_is_the_logit(
    network: ResNetClassifier, pictures: list[Tensor]
) -> None:
    response = functional.conv2d(network.features(pictures[0]), network.head.weight)
    assert torch.allclose(response.mean((2, 3)), network(pictures[0]), atol=1e-5)
    assert response.shape[2:] == (3, 4)


def test_scales_and_mirror_images_are_summed_and_divided_by_the_maximum(
    network: ResNetClassifier, pictures: list[Tensor]
) -> None:
    found = multi_scale_cam(network, pictures, [4, 1], (40, 53))
    total = torch.zeros(2, 48, 64)
    for picture in pictures:
        for mirrored in (False, True):
            view = picture.flip(3) if mirrored else picture
            maps = functional.conv2d(network.features(view), network.head.weight[[4, 1]]).relu()
            maps = maps.flip(3) if mirrored else maps
            total += functional.interpolate(maps, (48, 64), mode="bilinear")[0]
    total = total[:, :40, :53]
    for row, expected in zip(found, total, strict=True):
        assert torch.allclose(row, expected / (expected.max() + 1e-5), atol=1e-4)


def test_gradcam_on_the_last_stage_is_cam(
    network: ResNetClassifier, pictures: list[Tensor]
) -> None:
    # The head is linear on the mean, so that the gradient is the head's weight over the places.
    found = gradient_maps(network, pictures[0], [2], "gradcam")
    expected = torch.zeros(40, 53)
    for mirrored in (False, True):
        view = pictures[0].flip(3) if mirrored else pictures[0]
        cam = functional.conv2d(network.features(view), network.head.weight[[2]]).relu()
        cam = cam - cam.min()
        cam = functional.interpolate(cam / cam.max(), (40, 53), mode="bilinear")[0, 0]
        cam = (cam - cam.min()) / (cam.max() - cam.min())
        expected += cam.flip(1) if mirrored else cam
    assert torch.allclose(found[0], expected, atol=1e-3)


@pytest.mark.parametrize("method", ["gradcam++", "layercam"])
def test_variants_give_maps_in_range(
    network: ResNetClassifier, pictures: list[Tensor], method: Any
) -> None:
    found = multi_scale_cam(network, pictures[1:], [0, 3], (20, 26), method)
    assert found.shape == (2, 20, 26)
    assert found.min() >= 0
    assert torch.allclose(found.amax((1, 2)), torch.ones(2), atol=1e-3)


def test_irns_names_are_understood(network: ResNetClassifier, tmp_path: Path) -> None:
    renamed = {}
    for name, weight in network.state_dict().items():
        theirs = name.replace("resnet.", "resnet50.").replace("head.", "classifier.")
        renamed[theirs] = weight
        renamed["backbone.0." + name] = weight
    torch.save(renamed, tmp_path / "res.pth")
    found = read_weights(tmp_path / "res.pth")
    assert found.keys() == network.state_dict().keys()


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for index in range(4):
        pixels = torch.randint(0, 80, (3, 36, 48), generator=generator)
        pixels[index % 2] += 150
        seed = Seed((index % 2 + 1,), torch.zeros(1, 36, 48))
        made.append(Sample(f"{index}", pixels.to(torch.uint8), seed, ("dog",)))
    return made


class Scenes(pl.LightningDataModule):
    """Two classes of noise."""

    class_list = ("red", "green")

    def train_dataloader(self) -> Any:
        failed = FailedSample("bad", "bad.jpg: truncated")
        items: Any = [*samples(), failed]
        return torch.utils.data.DataLoader(items, batch_size=2, collate_fn=list)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch


# Lightning warns of a batch without a loss; a batch of nothing but unreadable items has none.
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_fit_then_predict_from_its_checkpoint(
    tmp_path: Path, new_trainer: Callable[[], pl.Trainer]
) -> None:
    options: dict[str, Any] = {"architecture": "resnet18"}
    maker = Cam(crop=48, longer_side=(40, 56), learning_rate=0.05, **options)
    trainer = new_trainer()
    trainer.fit(maker, datamodule=Scenes())
    assert maker.network is not None
    assert maker.network.head.out_channels == 2
    assert not maker.network.resnet.bn1.training
    assert maker.failed == {"bad": "bad.jpg: truncated"}
    assert trainer.callback_metrics["train/loss"] > 0
    trainer.save_checkpoint(tmp_path / "cam.ckpt")

    read = Cam(weights=str(tmp_path / "cam.ckpt"), scales=[1.0, 0.5], **options)
    read.configure_model()
    assert read.network is not None
    assert torch.equal(read.network.head.weight, maker.network.head.weight)
    made, failed = read.predict_step([samples()[0], Sample("x", *_unlabelled())])
    assert isinstance(made, RefinedMask)
    assert made.foreground.shape == (1, 36, 48)
    assert isinstance(failed, FailedSample)


def _unlabelled() -> tuple[Tensor, Seed, tuple[str, ...]]:
    return torch.zeros(3, 8, 8, dtype=torch.uint8), Seed((), torch.zeros(0, 8, 8)), ()


def test_training_pictures_have_one_size_whatever_the_image(sample: Sample) -> None:
    for crop in (24, 80):
        picture = training_picture(sample, crop, (30, 60))
        assert picture.shape == (1, 3, crop, crop)
    assert (training_picture(sample, 200, (30, 60)) == 0).float().mean() > 0.8


def test_activation_maps_of_a_symmetric_image_are_symmetric(network: ResNetClassifier) -> None:
    half = torch.randn(1, 3, 32, 24, generator=torch.Generator().manual_seed(3))
    maps = activation_maps(network, torch.cat([half, half.flip(3)], dim=3), [0, 5])
    assert torch.allclose(maps, maps.flip(2), atol=1e-4)


def test_pictures_are_resized_as_pillow_does(sample: Sample) -> None:
    picture = resize_picture(sample.image, (20, 26))
    steps = (picture + 1) * 127.5
    assert picture.shape == (1, 3, 20, 26)
    assert torch.allclose(steps, steps.round(), atol=1e-4)


def test_a_class_without_response_keeps_its_map_and_is_named(
    network: ResNetClassifier, sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    maker = Cam("resnet18", scales=[1.0])
    maker.network = copy.deepcopy(network)
    # The features are never negative, so that neither is this class's response positive.
    maker.network.head.weight.data[1] = -1.0
    maker.network.head.weight.data[4] = 1.0
    made = maker.make(sample)
    assert made.class_ids == (2, 5)
    assert made.foreground.amax((1, 2)).tolist() == [0.0, pytest.approx(1.0, abs=1e-3)]
    said = capsys.readouterr().err
    assert said == "warning: one: the map of dog is zero everywhere\n"


def test_training_from_nothing_reaches_every_weight() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    found = {}
    for train_all in (False, True):
        network = ResNetClassifier("resnet18", 3, train_all=train_all).train()
        before = network.resnet.bn1.running_mean.clone()
        network(images).square().sum().backward()
        moved = not torch.equal(before, network.resnet.bn1.running_mean)
        found[train_all] = (network.resnet.conv1.weight.grad is not None, moved)
    assert found == {False: (False, False), True: (True, True)}


@pytest.mark.parametrize(("weights", "said"), [(None, "weights: None"), ("no.pth", "no file")])
def test_weights_that_are_not_there_are_named(weights: str | None, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Cam("resnet18", weights=weights).configure_model()


def test_weights_of_another_network_are_refused(network: ResNetClassifier, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "18.pth")
    with pytest.raises(ConfigurationError, match="is no resnet50"):
        Cam("resnet50", weights=str(tmp_path / "18.pth")).configure_model()
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigurationError, match="no classifier"):
        Cam("resnet18", weights=str(tmp_path / "other.pth")).configure_model()


@pytest.fixture
def of_six(network: ResNetClassifier, tmp_path: Path) -> Cam:
    """A maker with weights of six classes."""
    torch.save(network.state_dict(), tmp_path / "six.pth")
    return Cam("resnet18", weights=str(tmp_path / "six.pth"), scales=[1.0])


@pytest.mark.parametrize("run", ["predict", "fit"])
def test_weights_of_other_classes_than_the_datas_are_refused(
    run: str,
    of_six: Cam,
    new_trainer: Callable[[], pl.Trainer],
    data_of: Callable[..., pl.LightningDataModule],
) -> None:
    said = r"weights: the network has 6 classes, the data's class list 2; .*data\.class_names"
    for _ in range(2):  # read from the file, and there already
        with pytest.raises(ConfigurationError, match=said):
            getattr(new_trainer(), run)(of_six, datamodule=data_of(("red", "green")))


def test_weights_of_the_datas_classes_are_taken(
    of_six: Cam,
    new_trainer: Callable[[], pl.Trainer],
    data_of: Callable[..., pl.LightningDataModule],
) -> None:
    new_trainer().predict(of_six, datamodule=data_of("abcdef"), return_predictions=False)
    assert of_six.network is not None
