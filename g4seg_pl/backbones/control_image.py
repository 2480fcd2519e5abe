"""Masks as the coloured picture that a segmentation ControlNet reads."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.backbones.ade20k import COLOURS, NEAREST
from g4seg_pl.types import ConfigurationError

ColourChoice = str | tuple[int, int, int]
"""The name of an ADE20K class, or red, green and blue from 0 to 255."""


def colour_of(name: str, chosen: Mapping[str, ColourChoice]) -> tuple[int, int, int]:
    """Return a class's colour: the one chosen, else ADE20K's of the same or the nearest class.

    Args:
        name: as in the prompt; case does not matter.
        chosen: colours, or ADE20K's class names, by class name.

    Raises:
        ConfigurationError: ADE20K has no class near to it and none was chosen, or a choice is
            no class of ADE20K.
    """
    plain = " ".join(name.lower().split())
    own = {key.lower(): colour for key, colour in chosen.items()}.get(plain)
    if own is not None and not isinstance(own, str):
        return _checked(name, own)
    wanted = own or NEAREST.get(plain, plain)
    if wanted not in COLOURS:
        what = f"{own!r} is no class of ADE20K" if own else "ADE20K has no class near to it"
        message = (
            f"controlnet.colours: {name!r}: {what}; give an ADE20K class or three numbers from 0 "
            f"to 255, such as {{{name!r}: bus}}"
        )
        raise ConfigurationError(message)
    red, green, blue = bytes.fromhex(COLOURS[wanted])
    return red, green, blue


def require_colours(names: Sequence[str], chosen: Mapping[str, ColourChoice]) -> None:
    """Refuse a run whose classes have no colour, before it starts.

    Raises:
        ConfigurationError: names every such class, or the first choice that cannot be meant.
    """
    for name in chosen:
        colour_of(name, chosen)
    missing = [name for name in names if not _has_colour(name, chosen)]
    if missing:
        message = (
            f"controlnet.colours: ADE20K has no class near to {', '.join(missing)}; give each an "
            f"ADE20K class or three numbers from 0 to 255, such as {{{missing[0]!r}: bus}}"
        )
        raise ConfigurationError(message)


def coloured(
    masks: Float[Tensor, "b c H W"],
    colours: Sequence[Sequence[tuple[int, int, int]]],
    background: tuple[int, int, int] = (0, 0, 0),
) -> Float[Tensor, "b 3 H W"]:
    """Return each row's masks painted in their classes' colours, in [0, 1].

    Soft masks mix their colour with the background's, differentiably; where masks overlap, their
    colours mix.

    Args:
        masks: in [0, 1]; a row's maps beyond its colours are all zero, or the background's own.
        colours: of each row's classes, in order.
        background: of what no mask covers; black is "not labelled" in ADE20K's pictures.
    """
    behind = torch.tensor(background).to(masks) / 255
    table = behind.repeat(*masks.shape[:2], 1)
    for row, each in enumerate(colours):
        table[row, : len(each)] = torch.tensor(each).to(masks) / 255
    shares = masks / masks.sum(1, keepdim=True).clamp(min=1)
    rest = 1 - shares.sum(1, keepdim=True)
    return torch.einsum("bchw,bck->bkhw", shares, table) + rest * behind[:, None, None]


def _has_colour(name: str, chosen: Mapping[str, ColourChoice]) -> bool:
    try:
        colour_of(name, chosen)
    except ConfigurationError:
        return False
    return True


def _checked(name: str, colour: Sequence[int]) -> tuple[int, int, int]:
    if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
        message = f"controlnet.colours: {name!r} is {colour}; give three numbers from 0 to 255"
        raise ConfigurationError(message)
    red, green, blue = colour
    return red, green, blue
