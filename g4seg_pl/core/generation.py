"""The conditional reconstruction of an image: one noising, one injected U-Net pass."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.diffusion import add_noise
from g4seg_pl.core.injection import Injection


@dataclass(frozen=True)
class Groups:
    """Which masks go together: those of one image, or each alone.

    Attributes:
        images: the image index of each group; images without masks have none.
        members: the indices of each group's masks, in order.
    """

    images: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]

    def gather(self, maps: Float[Tensor, "m ..."]) -> Float[Tensor, "r c ..."]:
        """Return the masks group by group; all-zero ones fill up the smaller groups."""
        most = max(len(group) for group in self.members)
        return torch.stack([_fill_up(maps[list(group)], most) for group in self.members])

    def scatter(self, maps: Float[Tensor, "r c ..."]) -> Float[Tensor, "m ..."]:
        """Return what ``gather`` brought together mask by mask again."""
        places = [
            (mask, row, slot)
            for row, group in enumerate(self.members)
            for slot, mask in enumerate(group)
        ]
        _, rows, slots = zip(*sorted(places), strict=True)
        return maps[list(rows), list(slots)]


def groups_per_image(context: RefinementContext) -> Groups:
    """Return the masks of each image together."""
    owner = context.owner.tolist()
    images = tuple(dict.fromkeys(owner))
    members = (tuple(m for m, image in enumerate(owner) if image == each) for each in images)
    return Groups(images, tuple(members))


def groups_per_class(context: RefinementContext) -> Groups:
    """Return each mask alone."""
    owner = tuple(context.owner.tolist())
    return Groups(owner, tuple((mask,) for mask in range(len(owner))))


@dataclass(frozen=True)
class Rows:
    """What goes through the U-Net: a row is one mask, or one image with all of its masks.

    Attributes:
        owner: the image index of each row.
        prompts: the prompt of each row.
        names: the class whose noise the row gets; empty for the image's own.
        foreground: ``(r, c, H, W)``, the masks injected in each row; all-zero ones fill up.
        tokens: ``(r, c, l)``, where each mask's class is named in the prompt.
        classes: the names of each row's classes, in the order of its masks.
    """

    owner: tuple[int, ...]
    prompts: tuple[str, ...]
    names: tuple[str, ...]
    foreground: Float[Tensor, "r c H W"]
    tokens: Float[Tensor, "r c l"]
    classes: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.owner)

    def part(self, part: slice) -> "Rows":
        """Return the rows of a slice."""
        return Rows(
            self.owner[part],
            self.prompts[part],
            self.names[part],
            self.foreground[part],
            self.tokens[part],
            self.classes[part],
        )


def rows_per_class(
    foreground: Float[Tensor, "m H W"], context: RefinementContext, *, own_noise: bool = True
) -> Rows:
    """Return one row a mask, its class alone in the prompt, all else background (the paper's).

    Args:
        foreground: the masks of all images of the context.
        context: the images.
        own_noise: draw noise for each class; otherwise the classes of an image share it.
    """
    prompts, tokens = zip(*(context.prompt((name,)) for name in context.class_names), strict=True)
    names = context.class_names if own_noise else ("",) * len(prompts)
    stacked = torch.stack(tokens).to(foreground)
    return Rows(
        tuple(context.owner.tolist()),
        prompts,
        names,
        foreground[:, None],
        stacked,
        tuple((name,) for name in context.class_names),
    )


def rows_per_image(foreground: Float[Tensor, "m H W"], context: RefinementContext) -> Rows:
    """Return one row an image, all its classes in one prompt and one pass of rank C.

    Images without masks get no row. Its cost does not grow with an image's classes.
    """
    groups = groups_per_image(context)
    most = max(len(masks) for masks in groups.members)
    prompts, tokens = [], []
    classes = tuple(tuple(context.class_names[m] for m in group) for group in groups.members)
    for group in classes:
        prompt, marks = context.prompt(group)
        prompts.append(prompt)
        tokens.append(_fill_up(marks.to(foreground), most))
    names = ("",) * len(prompts)
    masks = groups.gather(foreground)
    return Rows(groups.images, tuple(prompts), names, masks, torch.stack(tokens), classes)


def noised(
    rows: Rows, context: RefinementContext, timestep: int, draw: int = 0
) -> tuple[Float[Tensor, "r c h w"], Float[Tensor, "r c h w"]]:
    """Return z_t and the ε in it for every row.

    Args:
        rows: what goes through the U-Net.
        context: the images.
        timestep: t.
        draw: counts independent draws of the noise.
    """
    image_ids = tuple(context.image_ids[image] for image in rows.owner)
    noise = context.noise(image_ids, rows.names, draw)
    clean = context.latents[list(rows.owner)]
    return add_noise(clean, noise, context.generator.alphas_cumprod, timestep), noise


def denoise(
    rows: Rows,
    context: RefinementContext,
    noisy: Float[Tensor, "r c h w"],
    timestep: int,
    injection: Injection | None,
    guidance_scale: float = 1.0,
    *,
    checkpointing: bool = False,
) -> Float[Tensor, "r c h w"]:
    """Return the raw model output for every row, with classifier-free guidance if asked for.

    Guidance scale 1 costs a single pass; any other a second one, without prompt or injection.

    Args:
        rows: what goes through the U-Net; its masks are used only through ``injection``.
        context: the images.
        noisy: z_t of every row.
        timestep: t.
        injection: what is injected into the conditional pass; None for nothing.
        guidance_scale: 1 for none.
        checkpointing: recompute activations for a gradient instead of keeping them.
    """
    embeddings = context.embed(rows.prompts)
    # Only on request, so that any generator that lacks it serves where it is not needed.
    extra = {"checkpointing": True} if checkpointing else {}
    output = context.generator.denoise(noisy, timestep, embeddings, injection, **extra)
    if guidance_scale == 1:
        return output
    without = context.generator.denoise(noisy, timestep, context.embed(("",) * len(rows)))
    return without + guidance_scale * (output - without)


def in_parts(rows: Rows, context: RefinementContext) -> Iterator[Rows]:
    """Yield the rows in groups within the context's memory bound."""
    for part in context.parts(len(rows)):
        yield rows.part(part)


def _fill_up(maps: Tensor, count: int) -> Tensor:
    missing = maps.new_zeros(count - len(maps), *maps.shape[1:])
    return torch.cat([maps, missing])
