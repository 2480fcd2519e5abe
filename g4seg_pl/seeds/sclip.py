"""SCLIP: CLIP whose last attention layer correlates patches with themselves.

Wang et al., ECCV 2024; the facts are those of wangf3014/SCLIP @b56bd301 (``clip_segmentor.py``,
``clip/model.py``, ``configs/``):

- layer: the last block with attention weights softmax(q qᵀ / √d) + softmax(k kᵀ / √d), which sum
  to 2 a row; residual, perceptron, final norm and projection kept;
- size: shorter side 336, longer at most 2048, bilinear; windows of 224 every 112 pixels, cosines
  brought to the window's size and averaged; position embeddings bicubic;
- score: softmax of the cosines times 65 (VOC with background), 50 (Context with background,
  COCO-Object) or 40, over all names of all classes, the best name of a class after the softmax;
- background: named (26 words, or ``background`` for Context); pixels whose best probability is
  below 0.1 join it, and on VOC classes that win less than 0.1 of the foreground are dropped.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.background import PowerBackground, Threshold
from g4seg_pl.core.resize import resize_maps
from g4seg_pl.seeds.base import keep_ratio, resize_bilinear
from g4seg_pl.seeds.clip_model import (
    Interpolation,
    finish_block,
    last_block_input,
    project_tokens,
    projections,
)
from g4seg_pl.seeds.open_vocabulary import OpenVocabularyClip
from g4seg_pl.seeds.vocabulary import Vocabulary, label_scores
from g4seg_pl.seeds.windows import sliding_mean
from g4seg_pl.types import Sample


def self_correlated(block: Any, normed: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Return the output of correlative self-attention.

    Args:
        block: of open_clip's transformer.
        normed: the output of the block's first norm.
    """
    heads = block.attn.num_heads
    query, key, value = (
        part.unflatten(2, (heads, -1)).transpose(1, 2) for part in projections(block, normed)
    )
    # Two plain attentions with one and the same value, so that no n×n matrix need be kept.
    mixed = functional.scaled_dot_product_attention(query, query, value)
    mixed = mixed + functional.scaled_dot_product_attention(key, key, value)
    output: Tensor = block.attn.out_proj(mixed.transpose(1, 2).flatten(2))
    return output


def sclip_cosines(
    visual: Any,
    images: Float[Tensor, "b 3 H W"],
    texts: Float[Tensor, "q c"],
    interpolation: Interpolation = "bicubic_offset",
) -> Float[Tensor, "b q h w"]:
    """Return cosines of each patch with each text on the token grid.

    Args:
        visual: open_clip's vision transformer.
        images: in [-1, 1], sides multiples of the patch.
        texts: unit vectors.
        interpolation: of position embeddings at another size.
    """
    tokens, grid = last_block_input(visual, images, interpolation)
    block = visual.transformer.resblocks[-1]
    attended = self_correlated(block, block.ln_1(tokens))
    joint = project_tokens(visual, finish_block(block, tokens, attended))
    units = functional.normalize(joint[:, 1:].float(), dim=-1)
    cosines: Tensor = units @ texts.T
    return cosines.transpose(1, 2).reshape(len(images), -1, *grid)


def sclip_maps(
    visual: Any,
    image: Float[Tensor, "1 3 H W"],
    texts: Float[Tensor, "q c"],
    crop: int = 224,
    stride: int = 112,
) -> Float[Tensor, "q H W"]:
    """Return mean cosines over sliding windows at the size of the image.

    Args:
        visual: open_clip's vision transformer.
        image: in [-1, 1].
        texts: unit vectors.
        crop: side of a window; 0 takes the image whole.
        stride: from one window to the next.
    """

    def of_window(window: Tensor) -> Tensor:
        size = (window.shape[2], window.shape[3])
        fitted = _whole_patches(window, visual.patch_size)
        return resize_maps(sclip_cosines(visual, fitted, texts)[0], size)[None]

    if crop == 0:
        return of_window(image)[0]
    return sliding_mean(of_window, image, crop, stride)[0]


class Sclip(OpenVocabularyClip):
    """SCLIP's maps.

    Args:
        model: an open_clip folder, ``hf-hub:owner/name``, or a name of open_clip's.
        pretrained: the weights of a named model, such as ``openai``.
        class_names: names of each class in the order of the label values from 1; the prompt
            names of the data set if None.
        background_words: names of the background; if there are none, ``background`` decides.
        templates: of all texts, each with one ``{}``; the 80 of CLIP's ImageNet if None.
        logit_scale: of the softmax between names: 65 for VOC, 50 for Context and COCO-Object.
        short_side: the image is scaled to it, in pixels; None takes the image as it is.
        crop: side of a window; 0 takes the image whole.
        stride: from one window to the next.
        probability_threshold: a pixel whose best score is below it is background; 0.1 where the
            background is named.
        area_threshold: share of the foreground a class must win; 0.1 for VOC, None keeps all.
        background: how the background is scored where it has no name.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        class_names: list[list[str]] | None = None,
        background_words: list[str] | None = None,
        templates: list[str] | None = None,
        logit_scale: float = 40.0,
        short_side: int | None = 336,
        crop: int = 224,
        stride: int = 112,
        probability_threshold: float = 0.1,
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
        self.logit_scale = logit_scale
        self.short_side = short_side
        self.crop, self.stride = crop, stride

    def scores(self, sample: Sample, texts: Tensor, names: Vocabulary) -> Float[Tensor, "c H W"]:
        """Return probabilities of each label value at native size."""
        native = (sample.image.shape[1], sample.image.shape[2])
        size = native if self.short_side is None else keep_ratio(native, self.short_side)
        image = resize_bilinear(sample.image, size).to(self.device)
        maps = sclip_maps(self.clip.visual, image, texts, self.crop, self.stride)
        return label_scores(resize_maps(maps, native), names, self.logit_scale)


def _whole_patches(window: Tensor, patch: tuple[int, int]) -> Tensor:
    """The window without the pixels that fill no patch, which a strided convolution skips."""
    height, width = window.shape[2:]
    if height < patch[0] or width < patch[1]:
        rows, columns = max(patch[0] - height, 0), max(patch[1] - width, 0)
        return functional.pad(window, (0, columns, 0, rows), mode="replicate")
    return window[:, :, : height - height % patch[0], : width - width % patch[1]]
