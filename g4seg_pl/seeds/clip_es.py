"""CLIP-ES: softmax Grad-CAM of CLIP, propagated by its own attention.

Lin et al., CVPR 2023; the facts are those of linyq2117/CLIP-ES @3893f817
(``generate_cams_voc12.py``, ``generate_cams_coco14.py``, ``utils.py``, ``clip/model.py``):

- layer: output of the last block's ``ln_1``; channel weights are the mean gradient over patches;
- size: the image's own, sides rounded up to the patch, bicubic; position embeddings bilinear;
- score: softmax over the image's classes and the background words of the cosine between texts
  and the *mean projected patch token*, times the model's temperature; not the class token;
- normalisation: each map by its minimum and maximum, before and after the propagation.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from g4seg_pl.core.background import PowerBackground, Threshold
from g4seg_pl.core.resize import min_max, resize_maps
from g4seg_pl.seeds.attention_affinity import attention_affinity, box_masks
from g4seg_pl.seeds.base import ClassMaps, SeedMaker, require_classes, resize_picture
from g4seg_pl.seeds.clip_model import (
    Interpolation,
    Tokenizer,
    attend,
    embed_patches,
    encode_texts,
    finish_block,
    load_clip,
    project_tokens,
)
from g4seg_pl.types import RefinedMask, Sample

Pooling = Literal["patches", "class_token"]
ChannelWeights = Literal["mean", "elementwise"]

# What surrounds objects in photographs; the last two are left out for COCO.
# fmt: off
BACKGROUND_WORDS = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea",
    "railway", "railroad", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock",
    "street", "valley", "bridge", "keyboard", "sign",
)
# fmt: on


def gradcam_maps(
    model: nn.Module,
    images: Float[Tensor, "b 3 H W"],
    text_features: Float[Tensor, "k d"],
    present: Bool[Tensor, "b k"],
    background: Float[Tensor, "w d"],
    pooling: Pooling = "patches",
    interpolation: Interpolation = "bilinear",
    channel_weights: ChannelWeights = "mean",
) -> ClassMaps:
    """Return the softmax Grad-CAM of each present class on the token grid, in [0, 1].

    Args:
        model: open_clip's CLIP with a plain vision transformer.
        images: in [-1, 1], sides multiples of the patch.
        text_features: unit vectors of all classes.
        present: the classes each image is known to have; the others stay out of its softmax.
        background: unit vectors of the background words; may be none.
        pooling: what is compared with the texts; CLIP-ES's is ``patches``.
        interpolation: of position embeddings at another size.
        channel_weights: Grad-CAM's mean of the gradient over the patches, or each patch's own
            gradient (HiResCAM, Draelos and Carin 2020).
    """
    how = (pooling, interpolation, channel_weights)
    maps, _ = _maps_and_attention(model, images, text_features, present, background, *how)
    return maps


def clip_es_maps(
    model: nn.Module,
    images: Float[Tensor, "b 3 H W"],
    text_features: Float[Tensor, "k d"],
    present: Bool[Tensor, "b k"],
    background: Float[Tensor, "w d"],
    box_threshold: float = 0.4,
    affinity_layers: int = 8,
    pooling: Pooling = "patches",
    interpolation: Interpolation = "bilinear",
    channel_weights: ChannelWeights = "mean",
) -> tuple[ClassMaps, ClassMaps]:
    """Return Grad-CAM after and before class-aware attention affinity, on the token grid.

    Args:
        model: open_clip's CLIP with a plain vision transformer.
        images: in [-1, 1], sides multiples of the patch.
        text_features: unit vectors of all classes.
        present: the classes each image is known to have.
        background: unit vectors of the background words; may be none.
        box_threshold: share of a map's maximum that its boxes hold: 0.4 for VOC, 0.7 for COCO.
        affinity_layers: how many of the last attention layers are averaged; all if there are
            fewer.
        pooling: what is compared with the texts; CLIP-ES's is ``patches``.
        interpolation: of position embeddings at another size.
        channel_weights: see ``gradcam_maps``.

    Returns:
        the propagated maps (``attn_highres`` of CLIP-ES) and the plain ones (``highres``).
    """
    how = (pooling, interpolation, channel_weights)
    plain, attention = _maps_and_attention(
        model, images, text_features, present, background, *how, affinity_layers
    )
    affinity = attention_affinity(attention)
    boxed = plain.maps * box_masks(plain.maps, box_threshold)
    moved = torch.einsum("mij,mj->mi", affinity[plain.owner], boxed.flatten(1))
    moved = min_max(moved.reshape_as(plain.maps))
    return ClassMaps(plain.owner, plain.class_index, moved), plain


def _maps_and_attention(
    model: nn.Module,
    images: Tensor,
    text_features: Tensor,
    present: Tensor,
    background: Tensor,
    pooling: Pooling,
    interpolation: Interpolation,
    channel_weights: ChannelWeights,
    layers: int = 1,
) -> tuple[ClassMaps, list[Tensor]]:
    """Plain maps, and the attention between patches of so many of the last layers."""
    visual: Any = model.visual
    tokens, attention, grid = _before_last_block(visual, images, interpolation, layers)
    last = visual.transformer.resblocks[-1]
    with torch.enable_grad():
        normed = last.ln_1(tokens).detach().requires_grad_()
        attended, weights = attend(last, normed)
        joint = project_tokens(visual, finish_block(last, tokens, attended))
        pooled = joint[:, 1:].mean(1) if pooling == "patches" else joint[:, 0]
        scores = _softmax_scores(model, pooled, text_features, present, background)
        maps = _gradient_maps(scores, normed, present, grid, channel_weights)
    return maps, [*attention, weights.detach()[:, 1:, 1:]]


def _before_last_block(
    visual: Any,
    images: Tensor,
    interpolation: Interpolation,
    layers: int,
) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
    """The last block's input, the attention of the last ones before it, and the grid."""
    attention = []
    blocks = visual.transformer.resblocks
    # All are n×n matrices: what is not averaged later is not kept.
    kept = range(len(blocks))[-layers:]
    with torch.no_grad():
        tokens, grid = embed_patches(visual, images, interpolation)
        for index, block in enumerate(blocks[:-1]):
            attended, weights = attend(block, block.ln_1(tokens))
            if index in kept:
                attention.append(weights[:, 1:, 1:])
            tokens = finish_block(block, tokens, attended)
    return tokens, attention, grid


def _softmax_scores(
    model: nn.Module, pooled: Tensor, classes: Tensor, present: Tensor, background: Tensor
) -> Tensor:
    """Probability of each class among an image's own and the background words, (b, k)."""
    temperature: Any = model.logit_scale
    texts = torch.cat([classes, background]).to(pooled)
    logits = temperature.exp() * functional.normalize(pooled, dim=-1) @ texts.T
    absent = functional.pad(~present.to(logits.device), (0, len(background)), value=False)
    scores: Tensor = logits.masked_fill(absent, -torch.inf).softmax(-1)
    return scores[:, : len(classes)]


def _gradient_maps(
    scores: Tensor,
    normed: Tensor,
    present: Tensor,
    grid: tuple[int, int],
    channel_weights: ChannelWeights,
) -> ClassMaps:
    """Grad-CAM of every present class; one backward pass for the n-th class of all images."""
    owner, class_index = present.to(scores.device).nonzero(as_tuple=True)
    turn = (present.cumsum(1) - 1).to(scores.device)[owner, class_index]
    maps = normed.new_zeros(len(owner), *grid)
    for index in range(int(present.sum(1).max()) if len(owner) else 0):
        chosen = turn == index
        images = owner[chosen]
        total = scores[images, class_index[chosen]].sum()
        (gradient,) = torch.autograd.grad(total, normed, retain_graph=True)
        weights = gradient[images, 1:]
        if channel_weights == "mean":
            weights = weights.mean(1, keepdim=True)
        maps[chosen] = (weights * normed[images, 1:]).sum(2).detach().reshape(-1, *grid)
    # Twice, as the public library does: gradients are often smaller than the divisor's guard.
    return ClassMaps(owner, class_index, min_max(min_max(maps.float().clamp(min=0))))


class ClipES(SeedMaker):
    """CLIP-ES's maps of the classes an image is known to have.

    Args:
        model: an open_clip folder, ``hf-hub:owner/name``, or a name of open_clip's.
        pretrained: the weights of a named model, such as ``openai``.
        background_words: the softmax's other side; COCO's leave out ``keyboard`` and ``sign``.
        prompt_template: of all texts, with one ``{}``.
        box_threshold: 0.4 for VOC, 0.7 for COCO.
        affinity: propagate the maps by attention; without it they are plain Grad-CAM.
        affinity_layers: how many of the last attention layers are averaged.
        pooling: ``patches`` is CLIP-ES's; ``class_token`` is what CLIP was trained with.
        channel_weights: ``mean`` is Grad-CAM's and CLIP-ES's; ``elementwise`` is HiResCAM's, for
            models whose gradients point elsewhere at every patch.
        scale: of the image before it enters.
        background: how the background is scored when label maps are made; (1 - max) if None.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        background_words: list[str] | None = None,
        prompt_template: str = "a clean origami {}.",
        box_threshold: float = 0.4,
        affinity: bool = True,
        affinity_layers: int = 8,
        pooling: Pooling = "patches",
        channel_weights: ChannelWeights = "mean",
        scale: float = 1.0,
        background: Threshold | PowerBackground | None = None,
    ) -> None:
        super().__init__(background or PowerBackground())
        self.model, self.pretrained = model, pretrained
        words = BACKGROUND_WORDS if background_words is None else background_words
        self.background_words = tuple(words)
        self.prompt_template = prompt_template
        self.box_threshold = box_threshold
        self.affinity, self.affinity_layers = affinity, affinity_layers
        self.pooling: Pooling = pooling
        self.channel_weights: ChannelWeights = channel_weights
        self.scale = scale
        self.clip: Any = None
        self._tokenizer: Tokenizer | None = None
        self._vectors: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        """Load the model, once."""
        if self._needs_loading(self.clip):
            self.clip, self._tokenizer = load_clip(self.model, self.pretrained)

    def make(self, sample: Sample) -> RefinedMask:
        """Make one map a class of the image.

        Raises:
            BadItemError: the image has no image-level classes.
        """
        require_classes(sample)
        image = resize_picture(sample.image, self._size_of(sample)).to(self.device)
        # A class that an image has cannot be its own background.
        others = [word for word in self.background_words if word not in sample.class_names]
        classes, words = self._texts(sample.class_names), self._texts(others)
        present = torch.ones(1, len(classes), dtype=torch.bool, device=self.device)
        arguments = (self.clip, image, classes, present, words)
        how: Any = {"pooling": self.pooling, "channel_weights": self.channel_weights}
        if self.affinity:
            box, layers = self.box_threshold, self.affinity_layers
            maps, _ = clip_es_maps(*arguments, box, layers, **how)
        else:
            maps = gradcam_maps(*arguments, **how)
        size = (sample.image.shape[1], sample.image.shape[2])
        return self.composed(sample, resize_maps(maps.maps, size))

    def _size_of(self, sample: Sample) -> tuple[int, int]:
        """The image's size, scaled, each side rounded up to the patch."""
        height, width = (
            int(np.ceil(self.scale * side / patch)) * patch
            for side, patch in zip(sample.image.shape[1:], self.clip.visual.patch_size, strict=True)
        )
        return height, width

    def _texts(self, names: Sequence[str]) -> Tensor:
        """Unit vectors of names, each encoded once a run."""
        for name in names:
            if name not in self._vectors and self._tokenizer is not None:
                templates = [self.prompt_template]
                self._vectors[name] = encode_texts(self.clip, self._tokenizer, [name], templates)[0]
        rows = [self._vectors[name] for name in names]
        none = torch.zeros(0, self.clip.text_projection.shape[1])
        return (torch.stack(rows) if rows else none).to(self.device)
