"""Segmenters that were trained with full supervision, from transformers, soft scores kept.

Semantic models (SegFormer and others) give logits, brought to the image's size bilinearly before
the softmax. Universal models (MaskFormer, Mask2Former, OneFormer) give queries: a class's score
is the sum over queries of its probability times the query's mask, as the library's own
``post_process_semantic_segmentation`` has it before it takes the best class; Mask2Former's masks
are brought to 384×384 first. Sizes and normalisation are those of the model's image processor.
"""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.resize import resize_maps
from g4seg_pl.seeds.base import SeedMaker
from g4seg_pl.seeds.panoptic import panoptic_segments
from g4seg_pl.seeds.vocabulary import predicted_masks
from g4seg_pl.types import ConfigurationError, RefinedMask, Sample, check_class_count
from g4seg_pl.weights import load_whole

MASK2FORMER_SIDE = 384
UNIVERSAL = ("maskformer", "mask2former", "oneformer")
# Weights that only training uses, or nobody: published checkpoints lack some of them.
_UNUSED = ("criterion.", "auxiliary_head.", "neck.fusion_stage.layers.0.residual_layer1.")


def query_scores(
    classes: Float[Tensor, "q c1"], masks: Float[Tensor, "q h w"], size: tuple[int, int]
) -> Float[Tensor, "c H W"]:
    """Return class scores at a size from queries; they lie in [0, 1] only nearly.

    Args:
        classes: logits of each query, "no object" last.
        masks: mask logits of each query.
        size: height and width wanted.
    """
    probabilities = classes.softmax(-1)[:, :-1]
    return resize_maps(torch.einsum("qc,qhw->chw", probabilities, masks.sigmoid()), size)


class Supervised(SeedMaker):
    """A supervised segmenter's maps; the masks written are those of the classes that win.

    Args:
        model: a transformers folder or hub id with its image processor.
        task: ``semantic``: a map a class; ``panoptic``: the segments of a universal model, those
            of one class joined by their maximum, for a seed has one map a class.
        first_label: label value of the model's class 0: 1 where the model has no background
            (ADE20K), 0 where class 0 is the background.
        panoptic_threshold: score a query needs to become a segment.
        panoptic_overlap: share of its own mask a segment must keep.
    """

    def __init__(
        self,
        model: str,
        task: Literal["semantic", "panoptic"] = "semantic",
        first_label: Literal[0, 1] = 1,
        panoptic_threshold: float = 0.8,
        panoptic_overlap: float = 0.8,
    ) -> None:
        super().__init__()
        self.model = model
        self.task: Literal["semantic", "panoptic"] = task
        self.first_label: Literal[0, 1] = first_label
        self.panoptic_threshold, self.panoptic_overlap = panoptic_threshold, panoptic_overlap
        self.network: Any = None
        self.universal = False
        self._processor: Any = None

    def configure_model(self) -> None:
        """Load the model and its processor, once.

        Raises:
            ConfigurationError: it is no segmenter, cannot do the task, or has another number of
                classes than the data, or than masks can hold.
        """
        if self._needs_loading(self.network):
            self._load()
        if self.network is not None:
            # The last label value, which is the number of classes: label 0 is no class.
            classes = self.network.config.num_labels + self.first_label - 1
            check_class_count("model", classes)
            remedy = (
                f"with first_label {self.first_label}, give a model of those classes, or the "
                "model's own list as data.class_names"
            )
            self._check_data_classes("model", classes, remedy)

    def _load(self) -> None:
        network = load_segmenter(self.model)
        self.universal = network.config.model_type in UNIVERSAL
        if self.task == "panoptic" and not self.universal:
            message = f"task: {self.model} is a semantic model; panoptic needs a universal one"
            raise ConfigurationError(message)
        self._processor = load_processor(self.model, network.config.model_type)
        self.network = network.eval().requires_grad_(False)

    def make(self, sample: Sample) -> RefinedMask:
        """Segment one image."""
        native = (sample.image.shape[1], sample.image.shape[2])
        outputs = self.network(**self._inputs(sample))
        if self.task == "panoptic":
            return self._panoptic(sample.image_id, outputs, native)
        if self.universal:
            masks = self._masks(outputs)
            scores = query_scores(outputs.class_queries_logits[0].float(), masks, native)
            label = scores.argmax(0)
        else:
            logits = resize_maps(outputs.logits[0].float(), native)
            # Of the logits: the softmax's rounding would decide between near ties.
            scores, label = logits.softmax(0), logits.argmax(0)
        scores = torch.cat([scores.new_zeros(self.first_label, *native), scores])
        label = (label + self.first_label).to(torch.uint8)
        return predicted_masks(sample.image_id, scores, label)

    def _panoptic(self, image_id: str, outputs: Any, size: tuple[int, int]) -> RefinedMask:
        """Segments, those of one class joined: what is read again has one map a class."""
        found = panoptic_segments(
            outputs.class_queries_logits[0].float(),
            self._masks(outputs),
            size,
            self.panoptic_threshold,
            self.panoptic_overlap,
            fused=range(self.network.config.num_labels),
        )
        values = torch.tensor(found.class_ids, dtype=torch.int64) + self.first_label
        label = torch.cat([values.new_zeros(1), values])[found.segments.cpu()].to(torch.uint8)
        owned = values > 0  # where the model's class 0 is the background, it has no map
        class_ids, maps = tuple(values[owned].tolist()), found.scores.cpu()[owned]
        return RefinedMask(image_id, class_ids, maps, label)

    def _masks(self, outputs: Any) -> Tensor:
        """Mask logits at the resolution the library adds them up at."""
        masks: Tensor = outputs.masks_queries_logits.float()
        if self.network.config.model_type == "mask2former":
            side = (MASK2FORMER_SIDE, MASK2FORMER_SIDE)
            masks = functional.interpolate(masks, side, mode="bilinear", align_corners=False)
        return masks[0]

    def _inputs(self, sample: Sample) -> dict[str, Tensor]:
        pixels = np.ascontiguousarray(sample.image.permute(1, 2, 0).cpu().numpy())
        options: dict[str, Any] = {"images": pixels, "return_tensors": "pt"}
        if self.network.config.model_type == "oneformer":
            options["task_inputs"] = [self.task]
        inputs = self._processor(**options)
        return {name: value.to(self.device) for name, value in inputs.items()}


def load_segmenter(model: str) -> Any:
    """Load a semantic or universal segmenter.

    Raises:
        ConfigurationError: transformers cannot load it as either.
    """
    from transformers import (
        AutoConfig,
        AutoModelForSemanticSegmentation,
        AutoModelForUniversalSegmentation,
    )

    try:
        config = AutoConfig.from_pretrained(model)
        universal = config.model_type in UNIVERSAL
        kind = AutoModelForUniversalSegmentation if universal else AutoModelForSemanticSegmentation
        with torch.device("cpu"):  # whatever Lightning's context says
            return load_whole(kind.from_pretrained, model, unused=_UNUSED, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        message = f"model: transformers cannot load {model} as a segmenter: {error}"
        raise ConfigurationError(message) from error


def load_processor(model: str, model_type: str) -> Any:
    """Load a model's image processor; OneFormer's takes the task too.

    Raises:
        ConfigurationError: the folder or hub id has none.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        kind = AutoProcessor if model_type == "oneformer" else AutoImageProcessor
        return kind.from_pretrained(model)
    except (OSError, ValueError) as error:
        message = f"model: {model} has no image processor: {error}"
        raise ConfigurationError(message) from error
