"""GroupViT: an encoder that groups patches by itself; groups are named by their texts.

Xu et al., CVPR 2022; the facts are those of NVlabs/GroupViT @13b7861
(``segmentation/evaluation/group_vit_seg.py``, ``segmentation/configs``), on transformers' port of
the weights, which lacks the background and the top-5 rule:

- layer: the soft assignments of the grouping blocks, multiplied, brought to the picture's size
  bilinearly, then each pixel belongs to its strongest group alone;
- size: shorter side 448, longer at most 2048, windows of 448 every 224 pixels; position
  embeddings bicubic; ImageNet's mean and deviation;
- score of a group: softmax over all classes times softmax over the image's five likeliest, both
  of the cosine times the temperature (at most 100);
- background: pixels whose best score is below 0.95 (VOC, COCO) or 0.35 (Context), or below the
  best of all groups where that is less; windows are averaged after that.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.resize import resize_maps
from g4seg_pl.features.base import normalise
from g4seg_pl.seeds.base import SeedMaker, keep_ratio, resize_bilinear
from g4seg_pl.seeds.vocabulary import class_names_of, predicted_masks
from g4seg_pl.seeds.windows import sliding_mean
from g4seg_pl.types import ConfigurationError, RefinedMask, Sample
from g4seg_pl.weights import load_whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAXIMUM_SCALE = 100.0


def grouped(
    model: Any, images: Float[Tensor, "b 3 H W"]
) -> tuple[Float[Tensor, "b g H W"], Float[Tensor, "b g d"], Float[Tensor, "b d"]]:
    """Return how much of each pixel each group holds, and groups and images in the joint space.

    Args:
        model: transformers' GroupViTModel.
        images: in [-1, 1], sides multiples of the patch.

    Returns:
        soft assignments at the images' size; unit vectors of groups; unit vectors of images.
    """
    vision = model.vision_model
    pixels = normalise(images, IMAGENET_MEAN, IMAGENET_STD)
    tokens = vision.embeddings(pixels, interpolate_pos_encoding=True)
    encoded = vision.encoder(hidden_states=tokens, output_attentions=True, return_dict=True)
    groups = vision.layernorm(encoded.last_hidden_state)
    assigned = _multiplied([part for part in encoded.attentions if part is not None])
    patch = vision.embeddings.patch_size
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    size = (images.shape[2], images.shape[3])
    soft = functional.interpolate(assigned.unflatten(2, grid), size, mode="bilinear")
    project = model.visual_projection
    vectors = project(groups.flatten(0, 1)).unflatten(0, groups.shape[:2])
    pooled = project(groups.mean(1))
    return soft, functional.normalize(vectors, dim=-1), functional.normalize(pooled, dim=-1)


def group_scores(
    groups: Float[Tensor, "g d"],
    image: Float[Tensor, " d"],
    texts: Float[Tensor, "k d"],
    scale: float,
    likeliest: int = 5,
) -> Float[Tensor, "g k"]:
    """Return the score of each class for each group.

    Args:
        groups: unit vectors.
        image: unit vector of the whole image.
        texts: unit vectors of the classes.
        scale: inverse temperature of the softmaxes.
        likeliest: how many classes the image may have.
    """
    logits = groups @ texts.T * scale
    top = (image @ texts.T).topk(min(likeliest, len(texts))).indices
    out = torch.ones(len(texts), dtype=torch.bool, device=texts.device)
    out[top] = False
    return logits.masked_fill(out, -torch.inf).softmax(-1) * logits.softmax(-1)


def groupvit_scores(
    model: Any,
    images: Float[Tensor, "1 3 H W"],
    texts: Float[Tensor, "k d"],
    background_threshold: float = 0.95,
    likeliest: int = 5,
) -> Float[Tensor, "1 c H W"]:
    """Return one map a label value, the background's first.

    Args:
        model: transformers' GroupViTModel.
        images: one image in [-1, 1], sides multiples of the patch.
        texts: unit vectors of the classes.
        background_threshold: a pixel whose best score is below it is background.
        likeliest: how many classes the image may have.
    """
    soft, groups, pooled = grouped(model, images)
    scale = min(float(model.logit_scale.exp()), MAXIMUM_SCALE)
    scores = group_scores(groups[0], pooled[0], texts, scale, likeliest)
    maps = scores[soft[0].argmax(0)].permute(2, 0, 1)
    threshold = min(background_threshold, float(scores.max()))
    background = (maps.amax(0, keepdim=True) < threshold).to(maps)
    return torch.cat([background, maps])[None]


def _multiplied(assignments: Sequence[Tensor]) -> Tensor:
    """Assignments of patches to the last groups, (b, g, n), from each block's (b, g, previous)."""
    total = assignments[0]
    for following in assignments[1:]:
        total = following @ total
    return total


class GroupVit(SeedMaker):
    """GroupViT's maps; the masks written are those of the classes that win somewhere.

    Args:
        model: a transformers folder or hub id, such as ``nvidia/groupvit-gcc-yfcc``.
        class_names: names of each class in the order of the label values from 1; the prompt
            names of the data set if None. Several names of a class are averaged.
        templates: of all texts, each with one ``{}``.
        background_threshold: 0.95 for VOC and COCO, 0.35 for Context.
        likeliest: how many classes the image may have.
        short_side: the image is scaled to it, in pixels; None takes the image as it is.
        crop: side of a window.
        stride: from one window to the next.
    """

    def __init__(
        self,
        model: str,
        class_names: list[list[str]] | None = None,
        templates: list[str] | None = None,
        background_threshold: float = 0.95,
        likeliest: int = 5,
        short_side: int | None = 448,
        crop: int = 448,
        stride: int = 224,
    ) -> None:
        super().__init__()
        self.model = model
        self.class_names = class_names
        self.templates = ["a photo of a {}."] if templates is None else templates
        self.background_threshold = background_threshold
        self.likeliest = likeliest
        self.short_side, self.crop, self.stride = short_side, crop, stride
        self.network: Any = None
        self._tokenizer: Any = None
        self._vectors: Tensor | None = None

    @property
    def label_rule(self) -> str:
        """How labels are made, for records."""
        return f"best class, background where none reaches {self.background_threshold:g}"

    def configure_model(self) -> None:
        """Load the model, once.

        Raises:
            ConfigurationError: it cannot be loaded.
        """
        if not self._needs_loading(self.network):
            return
        from transformers import AutoTokenizer, GroupViTModel

        try:
            with torch.device("cpu"):  # whatever Lightning's context says
                network = load_whole(GroupViTModel.from_pretrained, self.model, dtype=torch.float32)
            self._tokenizer = AutoTokenizer.from_pretrained(self.model)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            message = f"model: transformers cannot load {self.model} as GroupViT: {error}"
            raise ConfigurationError(message) from error
        self.network = network.eval().requires_grad_(False)

    def make(self, sample: Sample) -> RefinedMask:
        """Name every pixel."""
        native = (sample.image.shape[1], sample.image.shape[2])
        size = native if self.short_side is None else keep_ratio(native, self.short_side)
        image = resize_bilinear(sample.image, size).to(self.device)
        texts = self._texts()
        maps = sliding_mean(lambda part: self._window(part, texts), image, self.crop, self.stride)
        scores = resize_maps(maps[0], native)
        return predicted_masks(sample.image_id, scores, scores.argmax(0).to(torch.uint8))

    def _window(self, window: Tensor, texts: Tensor) -> Tensor:
        """Scores of a window; sides are stretched to whole patches."""
        patch = self.network.config.vision_config.patch_size
        height, width = window.shape[2:]
        fitted = (max(height // patch, 1) * patch, max(width // patch, 1) * patch)
        scores = groupvit_scores(
            self.network,
            functional.interpolate(window, fitted, mode="bilinear"),
            texts,
            self.background_threshold,
            self.likeliest,
        )
        return resize_maps(scores[0], (height, width))[None]

    def _texts(self) -> Tensor:
        """One unit vector a class, encoded once."""
        if self._vectors is None:
            classes = class_names_of(self)
            rows = [functional.normalize(self._encode(names).mean(0), dim=0) for names in classes]
            self._vectors = torch.stack(rows)
        return self._vectors.to(self.device)

    def _encode(self, names: Sequence[str]) -> Tensor:
        """Unit vectors of names in all templates."""
        texts = [template.format(name) for name in names for template in self.templates]
        length = self.network.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        pooled = self.network.text_model(**tokens).pooler_output
        return functional.normalize(self.network.text_projection(pooled), dim=-1)
