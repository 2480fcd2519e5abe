"""Class activation maps of a classifier trained on image-level labels, and Grad-CAM variants.

Zhou et al., CVPR 2016; the facts are those of jiwoon-ahn/irn @a2ece00 (``step/make_cam.py``,
``step/train_cam.py``, ``run_sample.py``, ``misc/imutils.py``):

- layer: the last stage, at 1/16; the head's weights applied at every place, negatives dropped,
  the mirrored image added;
- size: the image at 1, 0.5, 1.5 and 2 times its size, bicubic; maps brought to the size rounded
  up to 16 bilinearly, summed and cropped (``high_res``);
- normalisation: each class by its maximum plus 1e-5;
- training: longer side drawn from 320 to 640, mirrored, cropped to 512, 5 epochs of 16 images,
  SGD without momentum at 0.1 (head 1.0), decay 1e-4, falling by (1 - step/steps)^0.9.

``g4seg fit`` (:mod:`g4seg_pl.seeds.fit`) trains it from the command line.
"""

import sys
from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.background import PowerBackground, Threshold
from g4seg_pl.core.resize import resize_maps
from g4seg_pl.features.base import normalise
from g4seg_pl.seeds.base import SeedMaker, require_classes, resize_picture
from g4seg_pl.seeds.cam_training import training_picture
from g4seg_pl.seeds.classifier import (
    Architecture,
    ResNetClassifier,
    activation_maps,
    read_weights,
)
from g4seg_pl.seeds.groupvit import IMAGENET_MEAN, IMAGENET_STD
from g4seg_pl.types import ConfigurationError, FailedSample, RefinedMask, Sample

Method = Literal[
    "cam", "gradcam", "gradcam++", "layercam", "xgradcam", "hirescam", "eigengradcam", "scorecam"
]
SCALES = (1.0, 0.5, 1.5, 2.0)
STRIDE = 16


def multi_scale_cam(
    network: ResNetClassifier,
    pictures: Iterable[Float[Tensor, "1 3 _ _"]],
    classes: list[int],
    size: tuple[int, int],
    method: Method = "cam",
) -> Float[Tensor, "k H W"]:
    """Return activation maps summed over pictures, each class divided by its maximum.

    Args:
        network: in evaluation mode.
        pictures: the image at several sizes, normalised.
        classes: indices of the classes, from 0.
        size: height and width of the image.
        method: the plain one, or one of the ``grad-cam`` library's on the same layer.
    """
    padded = (-(-size[0] // STRIDE) * STRIDE, -(-size[1] // STRIDE) * STRIDE)
    total = torch.zeros(())
    for picture in pictures:
        if method == "cam":
            maps = activation_maps(network, picture, classes)
        else:
            maps = gradient_maps(network, picture, classes, method)
        total = total.to(maps) + resize_maps(maps, padded)[:, : size[0], : size[1]]
    return total / (total.amax((1, 2), keepdim=True) + 1e-5)


def gradient_maps(
    network: ResNetClassifier,
    image: Float[Tensor, "1 3 H W"],
    classes: list[int],
    method: Method,
) -> Float[Tensor, "k H W"]:
    """Return a Grad-CAM variant's maps of an image and its mirror image, summed.

    Args:
        network: in evaluation mode.
        image: normalised.
        classes: indices of the classes, from 0.
        method: of the ``grad-cam`` library.

    Raises:
        ConfigurationError: the library is missing.
    """
    try:
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        message = f"method: {method} needs the grad-cam library; pip install 'g4seg-pl[cam]'"
        raise ConfigurationError(message) from error
    maps = []
    with torch.enable_grad(), _explainer(method)(network, [network.resnet.layer4[-1]]) as cam:
        for index in classes:
            targets = [ClassifierOutputTarget(index)]
            pair = [
                torch.from_numpy(cam(input_tensor=view.clone().requires_grad_(), targets=targets))
                for view in (image, image.flip(3))
            ]
            maps.append(pair[0][0] + pair[1][0].flip(1))
    return torch.stack(maps).to(image)


def _explainer(method: Method) -> Any:
    """The library's class of a method."""
    import pytorch_grad_cam as library

    return {
        "gradcam": library.GradCAM,
        "gradcam++": library.GradCAMPlusPlus,
        "layercam": library.LayerCAM,
        "xgradcam": library.XGradCAM,
        "hirescam": library.HiResCAM,
        "eigengradcam": library.EigenGradCAM,
        "scorecam": library.ScoreCAM,
    }[method]


class Cam(SeedMaker):
    """Activation maps of the classes an image is known to have; ``fit`` trains the classifier.

    Args:
        architecture: of torchvision's ResNets.
        weights: a checkpoint of ``fit``, a state dict, or IRN's file; None only to train.
        imagenet: begin training with ImageNet's weights (downloaded by torchvision).
        method: plain CAM, or a variant of the ``grad-cam`` library.
        scales: of the image.
        learning_rate: of the ResNet; the head's is ten times as high.
        weight_decay: of all weights.
        train_all: train the first two stages and the batch norms too, which IRN leaves as
            ImageNet left them: needed where training begins with random weights.
        crop: side of training pictures, in pixels.
        longer_side: the range the longer side is drawn from in training, in pixels.
        background: how the background is scored when label maps are made; 0.15 if None.
    """

    def __init__(
        self,
        architecture: Architecture = "resnet50",
        weights: str | None = None,
        imagenet: bool = False,
        method: Method = "cam",
        scales: list[float] | None = None,
        learning_rate: float = 0.1,
        weight_decay: float = 1e-4,
        train_all: bool = False,
        crop: int = 512,
        longer_side: tuple[int, int] = (320, 640),
        background: Threshold | PowerBackground | None = None,
    ) -> None:
        super().__init__(background or Threshold(0.15))
        self.architecture: Architecture = architecture
        self.weights, self.imagenet = weights, imagenet
        self.method: Method = method
        self.scales = SCALES if scales is None else tuple(scales)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.train_all = train_all
        self.crop, self.longer_side = crop, longer_side
        self.network: ResNetClassifier | None = None
        self.failed: dict[str, str] = {}

    def configure_model(self) -> None:
        """Make the network, once, with its weights.

        Raises:
            ConfigurationError: no weights to predict with, they do not fit, or they were trained
                on another number of classes than the data has.
        """
        if self._needs_loading(self.network):
            weights = self.weights
            self.network = self._untrained() if weights is None else self._trained(weights)
        if self.network is not None:
            remedy = "train on those classes, or give the weights' own list as data.class_names"
            self._check_data_classes("weights", self.network.head.out_channels, remedy)

    def make(self, sample: Sample) -> RefinedMask:
        """Make one map a class of the image.

        A class without any positive response keeps its map, zero everywhere as in IRN's files,
        and is named on standard error: no threshold will show it.

        Raises:
            BadItemError: the image has no image-level classes.
        """
        require_classes(sample)
        size = (sample.image.shape[1], sample.image.shape[2])
        sizes = [(round(size[0] * scale), round(size[1] * scale)) for scale in self.scales]
        pictures = (
            normalise(resize_picture(sample.image, one), IMAGENET_MEAN, IMAGENET_STD)
            for one in sizes
        )
        classes = [label - 1 for label in sample.seed.class_ids]
        maps = multi_scale_cam(
            self._network(),
            (picture.to(self.device) for picture in pictures),
            classes,
            size,
            self.method,
        )
        _name_empty_maps(sample, maps)
        return self.composed(sample, maps)

    def on_train_start(self) -> None:
        """Fix the batch norms: Lightning takes modes as it finds them."""
        self._network().train()

    def training_step(
        self, batch: list[Sample | FailedSample], batch_idx: int = 0
    ) -> Tensor | None:
        """Return the multi-label loss of a batch; None if nothing in it can be used.

        Items that could not be read are kept in ``failed``, with what is wrong.
        """
        self.failed |= {bad.image_id: bad.error for bad in batch if isinstance(bad, FailedSample)}
        samples = [item for item in batch if isinstance(item, Sample) and item.class_names]
        if not samples:
            return None
        network = self._network()
        pictures = [training_picture(item, self.crop, self.longer_side) for item in samples]
        present = torch.zeros(len(samples), network.head.out_channels)
        for row, item in zip(present, samples, strict=True):
            row[[label - 1 for label in item.seed.class_ids]] = 1
        logits = network(torch.cat(pictures).to(self.device)).float()
        loss = functional.multilabel_soft_margin_loss(logits, present.to(self.device))
        options: dict[str, Any] = {"on_epoch": True, "batch_size": len(samples)}
        self.log("train/loss", loss, **options)
        return loss

    def configure_optimizers(self) -> Any:
        """SGD, the head ten times as fast, falling to 0 at the last step."""
        network = self._network()
        groups = [
            {"params": list(network.resnet.parameters()), "lr": self.learning_rate},
            {"params": list(network.head.parameters()), "lr": 10 * self.learning_rate},
        ]
        optimizer = torch.optim.SGD(groups, self.learning_rate, weight_decay=self.weight_decay)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the weights: here they are what training is for."""

    def _trained(self, weights: str) -> ResNetClassifier:
        found = read_weights(weights)
        classes = len(found["head.weight"])
        network = ResNetClassifier(self.architecture, classes, train_all=self.train_all)
        try:
            network.load_state_dict(found)
        except RuntimeError as error:
            message = f"weights: {weights} is no {self.architecture}: {error}"
            raise ConfigurationError(message) from error
        fitting = self._trainer is not None and self._trainer.training
        return network.eval().requires_grad_(fitting)

    def _untrained(self) -> ResNetClassifier:
        trainer = self._trainer
        if trainer is None or not trainer.training:
            message = "weights: None given; train them with fit, or give IRN's res50_cam.pth"
            raise ConfigurationError(message)
        classes = len(trainer.datamodule.class_list)  # type: ignore[attr-defined]
        options = {"imagenet": self.imagenet, "train_all": self.train_all}
        return ResNetClassifier(self.architecture, classes, **options)

    def _network(self) -> ResNetClassifier:
        if self.network is None:
            message = "the model is not loaded: use a Trainer, or call configure_model first"
            raise ConfigurationError(message)
        return self.network


def _name_empty_maps(sample: Sample, maps: Tensor) -> None:
    """Say which of an image's classes the classifier has no positive response to."""
    pairs = zip(sample.class_names, maps.amax((1, 2)).tolist(), strict=True)
    if empty := [name for name, highest in pairs if highest <= 0]:
        named = ", ".join(empty)
        print(f"warning: {sample.image_id}: the map of {named} is zero everywhere", file=sys.stderr)
