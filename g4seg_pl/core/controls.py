"""Trivial controls: what an update gains without the signal it is named after."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.affinity import Propagation
from g4seg_pl.core.context import RefinementContext, resize_features
from g4seg_pl.core.guided import (
    bring_up,
    check_edges,
    guided_filter,
    joint_bilateral_upsample,
)
from g4seg_pl.core.propagation import AffinityMatrix, gaussian_record
from g4seg_pl.core.random_walk import colour_edges, random_walk
from g4seg_pl.core.steps import NestedStep, any_needs_gradient


@dataclass(frozen=True)
class ColourAffinity(Propagation):
    """Affinity from raw colours: a Gaussian of colour, and of position, instead of attention.

    Attributes:
        size: shorter side of the token grid; None takes the latent's.
        sigma_colour: width in colour, of images in [0, 1].
        sigma_position: width in position, as a share of the image's longer side; None for none.
    """

    power: float = 1.0
    size: int | None = None
    sigma_colour: float = 0.1
    sigma_position: float | None = 0.1

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        _check_positive(self, "sigma_colour")
        if self.sigma_position is not None:
            _check_positive(self, "sigma_position")

    def matrices(
        self, images: Sequence[int], prompts: Sequence[str], context: RefinementContext
    ) -> list[tuple[float, AffinityMatrix]]:
        """Return the affinity of the images' colours on the token grid."""
        pictures = (context.images[list(images)] + 1) / 2
        size = min(context.latents.shape[2:]) if self.size is None else self.size
        scale = size / min(pictures.shape[2:])
        grid = (round(pictures.shape[2] * scale), round(pictures.shape[3] * scale))
        points = functional.adaptive_avg_pool2d(pictures, grid) / self.sigma_colour
        if self.sigma_position is not None:
            places = _places(grid, points) / self.sigma_position
            points = torch.cat([points, places.expand(len(points), -1, -1, -1)], dim=1)
        return [(1.0, self._matrix([gaussian_record(points, 1.0)], [1.0]))]


@dataclass(frozen=True)
class FeatureAffinity(Propagation):
    """Affinity from a feature extractor's tokens, CLIP's for instance, instead of attention.

    Attributes:
        size: shorter side of the token grid; None takes the features' own.
        temperature: a row of A is the softmax of cosines over this.
    """

    power: float = 1.0
    size: int | None = None
    temperature: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        _check_positive(self, "temperature")

    def matrices(
        self, images: Sequence[int], prompts: Sequence[str], context: RefinementContext
    ) -> list[tuple[float, AffinityMatrix]]:
        """Return the affinity of the images' features.

        Raises:
            ValueError: the context has no feature extractor.
        """
        features = resize_features(context.reference_features[list(images)], self.size)
        # On the unit sphere the squared distance is 2 - 2 cos.
        points = functional.normalize(features, dim=1)
        return [(1.0, self._matrix([gaussian_record(points, self.temperature**0.5)], [1.0]))]


@dataclass(frozen=True)
class RandomWalk:
    """A random walk in IRN's manner (Ahn et al. 2019), over neighbours that no edge parts.

    The affinity of two cells within the radius is (1 - the strongest edge on the line between
    them)^β; masks take 2^doublings steps of the walk it defines. The edges are those of the
    image's colours, where IRN learns them. IRN also leaves out neighbours at the radius itself,
    looks at every cell less than one cell from the line, takes 2^8 steps, spares edges, and
    divides all classes by one maximum.

    Attributes:
        size: shorter side of the grid; None takes the latent's.
        radius: of the neighbourhood, in cells.
        beta: β, sharpens the affinity.
        doublings: the walk takes 2 to this power steps.
        edge_scale: an edge e of colours in [0, 1] counts as 1 - exp(-e / edge_scale).
        spare_edges: multiply masks by 1 - edge before the walk, as IRN does.
        mixing: λ; 0 returns the masks, 1 replaces them.
        norm: divide each result by its maximum, or leave it.
    """

    size: int | None = None
    radius: int = 5
    beta: float = 10.0
    doublings: int = 6
    edge_scale: float = 0.2
    spare_edges: bool = False
    mixing: float = 1.0
    norm: Literal["max", "none"] = "max"

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        for name in ("radius", "beta", "edge_scale"):
            _check_positive(self, name)
        if self.doublings < 0 or not 0 <= self.mixing <= 1:
            message = (
                f"doublings is {self.doublings} and mixing {self.mixing}; "
                "give the one as 0 or more, the other from 0 to 1"
            )
            raise ValueError(message)

    @torch.no_grad()
    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return the masks after the walk."""
        size = min(context.latents.shape[2:]) if self.size is None else self.size
        images = resize_features((context.images + 1) / 2, size)
        edges = (1 - torch.exp(-colour_edges(images) / self.edge_scale))[context.owner.tolist()]
        coarse = functional.adaptive_avg_pool2d(foreground, (edges.shape[1], edges.shape[2]))
        start = coarse * (1 - edges) if self.spare_edges else coarse
        walked = random_walk(start, edges, self.radius, self.beta, 2**self.doublings)
        if self.norm == "max":
            tiny = torch.finfo(walked.dtype).tiny
            walked = walked / walked.amax((1, 2), keepdim=True).clamp_min(tiny)
        owners = context.images[context.owner.tolist()]
        target = bring_up(walked, owners, "bilinear", 1, 1.0)
        return (foreground + self.mixing * (target - foreground)).clamp(0, 1)


@dataclass(frozen=True)
class EdgeFilter:
    """A filter that follows the image's edges, on the mask at full size, without any model.

    Attributes:
        kind: guided filter or joint bilateral filter.
        radius: of its windows, in pixels at working size.
        epsilon: squared contrast, of images in [0, 1], below which an edge is smoothed over.
        mixing: λ; 0 returns the masks, 1 replaces them.
    """

    kind: Literal["guided", "joint_bilateral"] = "guided"
    radius: int = 8
    epsilon: float = 1e-3
    mixing: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        check_edges(self.radius, self.epsilon)
        if not 0 <= self.mixing <= 1:
            message = f"mixing is {self.mixing}; give a value from 0 to 1"
            raise ValueError(message)

    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return the masks filtered."""
        owner = context.owner.tolist()
        found = [
            self._filter(foreground[part], ((context.images + 1) / 2)[owner[part]].to(foreground))
            for part in context.parts(len(foreground))
        ]
        filtered = torch.cat(found) if found else foreground
        return (foreground + self.mixing * (filtered - foreground)).clamp(0, 1)

    def _filter(self, masks: Tensor, guides: Tensor) -> Tensor:
        if self.kind == "guided":
            return guided_filter(masks[:, None], guides, self.radius, self.epsilon)[:, 0]
        space, colour = self.radius / 2, self.epsilon**0.5
        return joint_bilateral_upsample(masks[:, None], guides, self.radius, space, colour)[:, 0]


@dataclass(frozen=True)
class FlatInjection:
    """The same steps from a flat mask; what they change in it is added to the masks.

    Attributes:
        steps: ``Gradient``, for instance.
        level: of the flat mask, the seed's threshold.
    """

    steps: list[NestedStep]
    level: float = 0.5

    @property
    def needs_gradient(self) -> bool:
        """Whether any of the steps does."""
        return any_needs_gradient(self.steps)

    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return the masks plus the change of a flat one."""
        flat = torch.full_like(foreground, self.level)
        return (foreground + _in_order(flat, context, self.steps) - flat).clamp(0, 1)


@dataclass(frozen=True)
class OtherLatent:
    """The same steps on another image's latent: that of the next image of the batch.

    A batch's only image gets its own latent turned upside down. What an image gets depends on
    its batch, so that such a run is no more than a control.

    Attributes:
        steps: ``Affinity`` or ``Gradient``, for instance.
        permute: take the next image's latent, or turn each image's own upside down.
    """

    steps: list[NestedStep]
    permute: Literal["next_image", "upside_down"] = "next_image"

    @property
    def needs_gradient(self) -> bool:
        """Whether any of the steps does."""
        return any_needs_gradient(self.steps)

    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return the masks after the steps."""
        latents = context.latents
        alone = len(latents) == 1 or self.permute == "upside_down"
        other = latents.flip(2, 3) if alone else latents.roll(1, 0)
        return _in_order(foreground, context.variant(latents=other), self.steps)


@dataclass(frozen=True)
class OtherClass:
    """The same steps told another class: each mask gets the next name of a list.

    Attributes:
        steps: ``Correspondence`` or ``Gradient``, for instance.
        names: the classes, in a ring; a name that is not in it gets the first.
    """

    steps: list[NestedStep]
    names: list[str]

    def __post_init__(self) -> None:
        """Refuse a ring without another class."""
        if len(set(self.names)) < 2:
            message = f"names is {self.names}; give two different classes at least"
            raise ValueError(message)

    @property
    def needs_gradient(self) -> bool:
        """Whether any of the steps does."""
        return any_needs_gradient(self.steps)

    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return the masks after the steps."""
        following = dict(zip(self.names, [*self.names[1:], self.names[0]], strict=True))
        names = tuple(following.get(name, self.names[0]) for name in context.class_names)
        return _in_order(foreground, context.variant(class_names=names), self.steps)


def _places(grid: tuple[int, int], like: Tensor) -> Float[Tensor, "1 2 h w"]:
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) for n in grid)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    return places[None] / max(grid)


def _in_order(
    masks: Tensor, context: RefinementContext, steps: Sequence[NestedStep]
) -> Float[Tensor, "m H W"]:
    for step in steps:
        masks = step(masks, context)
    return masks


def _check_positive(step: object, name: str) -> None:
    value = getattr(step, name)
    if value <= 0:
        message = f"{name} is {value}; give a positive value"
        raise ValueError(message)
