"""open_clip's models as the makers need them: words to vectors, and vision blocks in pieces."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from g4seg_pl.features.base import CLIP_MEAN, CLIP_STD, normalise
from g4seg_pl.features.open_clip import load_open_clip, open_clip_name
from g4seg_pl.types import ConfigurationError

Tokenizer = Callable[[list[str]], Tensor]
Interpolation = Literal["bilinear", "bicubic", "bicubic_offset"]
"""The last is DINO's: bicubic by a factor a tenth of a cell too large, whole cells kept."""


def load_clip(model: str, pretrained: str | None = None) -> tuple[nn.Module, Tokenizer]:
    """Load a CLIP model with a plain vision transformer, frozen, and its tokenizer.

    Args:
        model: a folder (open_clip_config.json, open_clip_model.safetensors, and, where the
            configuration has ``hf_tokenizer_name``, the tokenizer's files beside them or in the
            folder's subfolder of that name), ``hf-hub:owner/name``, or a name of open_clip's.
        pretrained: the weights of a named model, such as ``openai``.

    Raises:
        ConfigurationError: it cannot be loaded, or its image tower is of another kind.
    """
    clip = load_open_clip(model, pretrained, "model").eval().requires_grad_(False)
    _check_visual(clip.visual, model)
    return clip, _load_tokenizer(model, pretrained)


def encode_texts(
    clip: nn.Module, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "k d"]:
    """Return one unit vector a name: the normalised mean of its templates' unit vectors.

    Args:
        clip: open_clip's model.
        tokenizer: the model's own.
        names: class names.
        templates: each with one ``{}``.
    """
    encoder: Any = clip
    rows = []
    for name in names:
        tokens = tokenizer([template.format(name) for template in templates])
        device = next(clip.parameters()).device
        vectors = functional.normalize(encoder.encode_text(tokens.to(device)).float(), dim=-1)
        rows.append(functional.normalize(vectors.mean(0), dim=0))
    return torch.stack(rows)


def embed_patches(
    visual: Any,
    images: Float[Tensor, "b 3 H W"],
    interpolation: Interpolation,
) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
    """Return the tokens that enter the first block, the class token first, and their grid.

    Args:
        visual: open_clip's vision transformer.
        images: in [-1, 1], sides multiples of the patch.
        interpolation: of the position embeddings where the grid is not the trained one.
    """
    images = normalise(images, *image_statistics(visual))
    patches = visual.conv1(images.to(visual.conv1.weight))
    grid = (int(patches.shape[2]), int(patches.shape[3]))
    first = visual.class_embedding.to(patches).expand(len(patches), 1, -1)
    positions = grid_positions(visual.positional_embedding, visual.grid_size, grid, interpolation)
    tokens = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
    return visual.ln_pre(tokens + positions.to(patches)), grid


def image_statistics(visual: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and deviation, for [0, 1], that a vision transformer was trained with."""
    mean = getattr(visual, "image_mean", None) or CLIP_MEAN
    return mean, getattr(visual, "image_std", None) or CLIP_STD


def grid_positions(
    positions: Float[Tensor, "n d"],
    trained: tuple[int, int],
    grid: tuple[int, int],
    interpolation: Interpolation,
) -> Float[Tensor, "m d"]:
    """Return position embeddings for another grid, the class token's first.

    Args:
        positions: one for the class token and one for each patch, rows first.
        trained: the grid they were trained on.
        grid: the grid wanted.
        interpolation: how; public implementations differ in it.
    """
    if tuple(trained) == grid:
        return positions
    maps = positions[1:].T.reshape(1, -1, *trained).float()
    if interpolation == "bicubic_offset":
        factors = ((grid[0] + 0.1) / trained[0], (grid[1] + 0.1) / trained[1])
        maps = functional.interpolate(maps, scale_factor=factors, mode="bicubic")
    else:
        maps = functional.interpolate(maps, grid, mode=interpolation, align_corners=False)
    return torch.cat([positions[:1], maps[0].flatten(1).T.to(positions)])


def attend(
    block: Any,
    normed: Float[Tensor, "b n d"],
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n n"]]:
    """Return a block's attention output and its weights averaged over heads.

    Args:
        block: of open_clip's transformer.
        normed: the output of the block's first norm.
    """
    output, weights = block.attn(normed, normed, normed, need_weights=True)
    return output, weights


def projections(
    block: Any, normed: Float[Tensor, "b n d"]
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
    """Return a block's queries, keys and values, heads side by side.

    Args:
        block: of open_clip's transformer.
        normed: the output of the block's first norm.
    """
    attention = block.attn
    joined = functional.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = joined.chunk(3, dim=-1)
    return query, key, value


def finish_block(
    block: Any,
    tokens: Float[Tensor, "b n d"],
    attended: Float[Tensor, "b n d"],
) -> Float[Tensor, "b n d"]:
    """Return a block's output: residuals and the perceptron.

    Args:
        block: of open_clip's transformer.
        tokens: the block's input.
        attended: its attention's output.
    """
    tokens = tokens + block.ls_1(attended)
    output: Tensor = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
    return output


def last_block_input(
    visual: Any, images: Float[Tensor, "b 3 H W"], interpolation: Interpolation
) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
    """Return the tokens that enter the last block, and their grid.

    Args:
        visual: open_clip's vision transformer.
        images: in [-1, 1], sides multiples of the patch.
        interpolation: of the position embeddings where the grid is not the trained one.
    """
    tokens, grid = embed_patches(visual, images, interpolation)
    for block in visual.transformer.resblocks[:-1]:
        tokens = block(tokens)
    return tokens, grid


def project_tokens(
    visual: Any,
    tokens: Float[Tensor, "b n d"],
) -> Float[Tensor, "b n k"]:
    """Return tokens in the joint space: final norm and projection, not normalised."""
    tokens = visual.ln_post(tokens)
    return tokens if visual.proj is None else tokens @ visual.proj


def _load_tokenizer(model: str, pretrained: str | None) -> Tokenizer:
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    name = open_clip_name(model, pretrained, "model")
    folder = Path(model).expanduser()
    tokenizer: Tokenizer
    try:
        text = _text_configuration(folder) if folder.is_dir() else {}
        subfolder = text.get("hf_tokenizer_name", "")
        if subfolder and (folder / subfolder).is_dir():
            options = dict(text.get("tokenizer_kwargs", {}))
            length = text.get("context_length", 77)
            tokenizer = HFTokenizer(str(folder / subfolder), context_length=length, **options)
        else:
            tokenizer = open_clip.get_tokenizer(name)
    except (OSError, ValueError) as error:
        message = f"model: {model} has no readable tokenizer: {error}"
        raise ConfigurationError(message) from error
    return tokenizer


def _text_configuration(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    text: dict[str, Any] = config["model_cfg"]["text_cfg"]
    return text


def _check_visual(visual: Any, model: str) -> None:
    from open_clip.transformer import VisionTransformer

    plain = isinstance(visual, VisionTransformer) and visual.attn_pool is None
    if not plain or not all(
        isinstance(block.attn, nn.MultiheadAttention) for block in visual.transformer.resblocks
    ):
        message = (
            f"model: the image tower of {model} is a {type(visual).__name__}, not a plain vision "
            "transformer; give a model such as ViT-B-16"
        )
        raise ConfigurationError(message)
