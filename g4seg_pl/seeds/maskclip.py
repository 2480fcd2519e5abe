"""MaskCLIP: the values of CLIP's last attention layer, named pixel by pixel.

Zhou et al., ECCV 2022; the facts are those of chongzhou96/MaskCLIP @245d31f
(``mmseg/models/backbones/vit.py``, ``decode_heads/maskclip_head.py``):

- layer: the last block with its attention replaced by the identity (every patch attends to
  itself only), residual and perceptron kept, then the final norm and the projection;
- size: shorter side 512, longer at most 2048 (VOC), or longer side 520 (Context), padded at the
  bottom and right to whole patches with the mean colour; position embeddings bicubic;
- normalisation: ImageNet's mean and deviation, not those CLIP was trained with;
- score: cosine with the texts, times 100 where a softmax is taken;
- key smoothing and prompt denoising are off (0) unless asked for (1.0 and 0.5 there).

The public code averages 85 prompts: the 80 of CLIP's ImageNet, which are the default here, and
``there is a {} in the scene.``, ``there is the {} in the scene.``, ``this is a {} in the scene.``,
``this is the {} in the scene.``, ``this is one {} in the scene.``; ``templates`` takes all of them.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.background import PowerBackground, Threshold
from g4seg_pl.core.resize import resize_maps
from g4seg_pl.features.base import normalise
from g4seg_pl.seeds.base import keep_ratio, resize_bilinear
from g4seg_pl.seeds.clip_model import (
    Interpolation,
    finish_block,
    image_statistics,
    last_block_input,
    project_tokens,
    projections,
)
from g4seg_pl.seeds.groupvit import IMAGENET_MEAN, IMAGENET_STD
from g4seg_pl.seeds.open_vocabulary import OpenVocabularyClip
from g4seg_pl.seeds.vocabulary import Vocabulary, label_scores
from g4seg_pl.types import Sample

SOFTMAX_SCALE = 100.0


def value_features(
    visual: Any, images: Float[Tensor, "b 3 H W"], interpolation: Interpolation = "bicubic"
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b n d"]]:
    """Return patches in the joint space by the value path, and the last layer's keys.

    Args:
        visual: open_clip's vision transformer.
        images: in [-1, 1], sides multiples of the patch.
        interpolation: of position embeddings at another size.

    Returns:
        features, not normalised, and keys of the patches after the output projection, as the
        public code takes them.
    """
    tokens, grid = last_block_input(visual, images, interpolation)
    block = visual.transformer.resblocks[-1]
    _, key, value = projections(block, block.ln_1(tokens))
    joint = project_tokens(visual, finish_block(block, tokens, block.attn.out_proj(value)))
    dense = joint[:, 1:].transpose(1, 2).unflatten(2, grid)
    return dense, block.attn.out_proj(key)[:, 1:]


def mask_clip_scores(
    features: Float[Tensor, "b c h w"],
    keys: Float[Tensor, "b n d"],
    texts: Float[Tensor, "q c"],
    key_smoothing: float = 0.0,
    prompt_denoising: float = 0.0,
) -> Float[Tensor, "b q h w"]:
    """Return cosines with the texts, or probabilities if keys are smoothed.

    Args:
        features: of the patches, in the joint space.
        keys: of the same patches.
        texts: unit vectors.
        key_smoothing: patches whose best probability is below it take the key-weighted sum of
            all patches' probabilities; 0 is off.
        prompt_denoising: names whose best probability is below it are taken out; 0 is off.
    """
    scores = torch.einsum("bchw,qc->bqhw", functional.normalize(features, dim=1), texts)
    if prompt_denoising > 0:
        best = (scores * SOFTMAX_SCALE).softmax(1).amax((2, 3), keepdim=True)
        scores = scores.masked_fill(best < prompt_denoising, -100.0)
    if key_smoothing <= 0:
        return scores
    flat = (scores * SOFTMAX_SCALE).softmax(1).flatten(2).transpose(1, 2)
    # The public code normalises each key channel over the patches, not each patch's key.
    units = functional.normalize(keys, dim=1)
    smooth = units @ (units.transpose(1, 2) @ flat)
    unsure = flat.amax(2, keepdim=True) < key_smoothing
    return torch.where(unsure, smooth, flat).transpose(1, 2).reshape_as(scores)


class MaskClip(OpenVocabularyClip):
    """MaskCLIP's maps.

    Args:
        model: an open_clip folder, ``hf-hub:owner/name``, or a name of open_clip's. The public
            code runs OpenAI's weights with plain GELU (``ViT-B-16``, not ``-quickgelu``).
        pretrained: the weights of a named model, such as ``openai``.
        class_names: names of each class in the order of the label values from 1; the prompt
            names of the data set if None.
        background_words: names of the background; if there are none, ``background`` decides.
        templates: of all texts, each with one ``{}``; the 80 of CLIP's ImageNet if None.
        short_side: the image is scaled to it, in pixels; None takes the image as it is.
        long_side: bound of the other side, where ``short_side`` is given.
        statistics: mean and deviation that pixels are normalised by: the model's own, or
            ImageNet's as in the public code.
        key_smoothing: 0 is off; 1.0 smooths every patch.
        prompt_denoising: 0 is off; 0.5 in the paper.
        probability_threshold: a pixel whose best score is below it is background.
        area_threshold: share of the foreground a class must win; None keeps all.
        background: how the background is scored where it has no name.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        class_names: list[list[str]] | None = None,
        background_words: list[str] | None = None,
        templates: list[str] | None = None,
        short_side: int | None = 512,
        long_side: int = 2048,
        statistics: Literal["model", "imagenet"] = "model",
        key_smoothing: float = 0.0,
        prompt_denoising: float = 0.0,
        probability_threshold: float = 0.0,
        area_threshold: float | None = None,
        background: Threshold | PowerBackground | None = None,
    ) -> None:
        super().__init__(
            model,
            pretrained,
            class_names,
            background_words,
            templates,
            probability_threshold,
            area_threshold,
            background,
        )
        self.short_side, self.long_side = short_side, long_side
        self.statistics = statistics
        self.key_smoothing, self.prompt_denoising = key_smoothing, prompt_denoising

    def scores(self, sample: Sample, texts: Tensor, names: Vocabulary) -> Float[Tensor, "c H W"]:
        """Return probabilities of each label value at native size."""
        native = (sample.image.shape[1], sample.image.shape[2])
        size = native
        if self.short_side is not None:
            size = keep_ratio(native, self.short_side, self.long_side)
        visual = self.clip.visual
        image = resize_bilinear(sample.image, size)
        if self.statistics == "imagenet":
            image = as_normalised_by(image, IMAGENET_MEAN, IMAGENET_STD, visual)
        image = pad_to_patches(image, visual.patch_size, image_statistics(visual)[0])
        features, keys = value_features(visual, image.to(self.device))
        smoothing, denoising = self.key_smoothing, self.prompt_denoising
        scores = mask_clip_scores(features.float(), keys.float(), texts, smoothing, denoising)
        maps = resize_maps(resize_maps(scores[0], size), native)
        # Smoothed scores are probabilities already.
        if smoothing > 0:
            maps = maps.clamp(min=1e-12).log()
        return label_scores(maps, names, 1.0 if smoothing > 0 else SOFTMAX_SCALE)


def as_normalised_by(
    image: Float[Tensor, "1 3 H W"], mean: Sequence[float], std: Sequence[float], visual: Any
) -> Float[Tensor, "1 3 H W"]:
    """Return the image that a model's own normalisation turns into one by another mean and std.

    Args:
        image: in [-1, 1]; the result may leave that range.
        mean: of the normalisation wanted, for [0, 1].
        std: the same.
        visual: open_clip's vision transformer, which normalises by its own.
    """
    own_mean, own_std = (image.new_tensor(each)[:, None, None] for each in image_statistics(visual))
    return 2 * (normalise(image, mean, std) * own_std + own_mean) - 1


def pad_to_patches(
    image: Float[Tensor, "1 3 H W"], patch: tuple[int, int], mean: Sequence[float]
) -> Float[Tensor, "1 3 h w"]:
    """Return an image in [-1, 1] continued at the bottom and right by the mean colour of [0, 1]."""
    height, width = image.shape[2:]
    rows, columns = -height % patch[0], -width % patch[1]
    colour = image.new_tensor(mean)[:, None, None] * 2 - 1
    return functional.pad(image - colour, (0, columns, 0, rows)) + colour
