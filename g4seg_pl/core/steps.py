"""Update steps: each takes all masks of a batch one step further."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.context import RefinementContext, resize_features
from g4seg_pl.core.correspondence import (
    aligned_target,
    discrepancy,
    matched_target,
    mix,
    nearest_neighbours,
)
from g4seg_pl.core.diffusion import predict_clean
from g4seg_pl.core.generation import (
    Rows,
    denoise,
    in_parts,
    noised,
    rows_per_class,
    rows_per_image,
)
from g4seg_pl.core.injection import Injection, InjectionRule, check_rule


@runtime_checkable
class UpdateStep(Protocol):
    """One update of all masks; frozen dataclasses with plain fields are meant.

    Another class keeps each of its arguments as an attribute of its name (or behind an underscore),
    or returns all from a method ``configuration``: run.json tells runs apart by them.
    """

    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return the updated masks, in [0, 1], at the same size and in the same order."""


# How steps that hold others spell UpdateStep: a protocol with nothing but a call is, to the
# command line's parser, a function that returns masks, and it would refuse class_path of a step.
NestedStep = Callable[..., Any]


def every_step(steps: Iterable[object]) -> Iterator[object]:
    """Yield the steps and those that they hold as ``steps`` or ``candidates``, at any depth."""
    for step in steps:
        if isinstance(step, (list, tuple)):
            yield from every_step(step)
            continue
        yield step
        for name in ("steps", "candidates"):
            yield from every_step(getattr(step, name, ()))


def any_needs_gradient(steps: Iterable[NestedStep]) -> bool:
    """Return whether any step says that it takes gradients (``needs_gradient``)."""
    return any(getattr(step, "needs_gradient", False) for step in steps)


@dataclass(frozen=True)
class Correspondence:
    """The paper's update: generate under the mask, match, mix (Eq. 2-9).

    Attributes:
        timestep: t_s, at which the image is noised.
        injection_weight: w of Eq. 5; 0 generates without the mask. The paper leaves it open.
        beta: β of Eq. 9, how much of the old mask stays: 0.9 for weakly supervised seeds, 0.8
            for open-vocabulary ones.
        confidence_range: only pixels whose mask value lies in this range change; None for all.
        guidance_scale: classifier-free guidance of the one pass; 1 is none.
        matching: where a location's new value comes from. ``generated_to_image``: from its
            best match in the image (SCA). ``aligned``: from the same place, turned over where
            image and generation differ (EMI without SCA). ``self``: the control that matches
            the image with itself outside a neighbourhood and generates nothing.
        match_size: shorter side of the matching grid; None takes the features' own grid.
        exclude_radius: the neighbourhood left out by ``self``, in cells of the matching grid.
        carry: whether the change or the new values are interpolated to full size.
        all_classes_at_once: name all classes of an image in one prompt and inject their masks
            in one pass, instead of one pass a class.
        noise_per: whether each class draws its own noise or an image's classes share it.
        injection_rule: Eq. 5 as printed, or DenseDiffusion's rule, whose λ the weight then is: at
            most 1, where Kim et al. take (t/1000)^5.
        inject_cross_attention: inject into cross-attention (Eq. 3).
        inject_self_attention: inject into self-attention (Eq. 4).
        binarise_at: from where on a mask counts as 1 when injected (S_c of Eq. 3 and 4), which
            `G4SegModule` sets to the threshold of the labels; None injects it soft.
        mask_resize: how masks come to an attention layer's token grid.
    """

    timestep: int = 400
    injection_weight: float = 10.0
    beta: float = 0.9
    confidence_range: tuple[float, float] | None = (0.2, 0.6)
    guidance_scale: float = 1.0
    matching: Literal["generated_to_image", "aligned", "self"] = "generated_to_image"
    match_size: int | None = None
    exclude_radius: float = 1.5
    carry: Literal["difference", "values"] = "difference"
    all_classes_at_once: bool = False
    noise_per: Literal["class", "image"] = "class"
    injection_rule: InjectionRule = "eq5"
    inject_cross_attention: bool = True
    inject_self_attention: bool = True
    binarise_at: float | None = 0.5
    mask_resize: Literal["nearest", "area"] = "area"

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if not 0 <= self.beta <= 1:
            message = f"beta is {self.beta}; give a value from 0 to 1"
            raise ValueError(message)
        if self.injection_weight < 0:
            message = f"injection_weight is {self.injection_weight}; give 0 (off) or more"
            raise ValueError(message)
        check_rule(self.injection_rule, self.injection_weight)
        for name, least in (("timestep", 0), ("match_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                message = f"{name} is {value}; give {least} or more"
                raise ValueError(message)
        if self.binarise_at is not None and not 0 <= self.binarise_at <= 1:
            message = f"binarise_at is {self.binarise_at}; give a value from 0 to 1, None for soft"
            raise ValueError(message)
        if self.confidence_range is not None:
            low, high = self.confidence_range
            if not 0 <= low <= high <= 1:
                message = f"confidence_range is {self.confidence_range}; give 0 ≤ low ≤ high ≤ 1"
                raise ValueError(message)

    @torch.no_grad()
    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return S* of every mask."""
        if self.matching == "self":
            return self._match_image_with_itself(foreground, context)
        rows = self._rows(foreground, context)
        found, generated = [], []
        for part in in_parts(rows, context):
            images = self.generate(part, context)
            found.append(self.compare(images, part, context))
            generated.append(images)
        per_row = torch.cat(found)
        context.record("generated", _for_each_mask(torch.cat(generated), rows, context))
        return self._update(foreground, _for_each_mask(per_row, rows, context), context)

    def generate(self, rows: Rows, context: RefinementContext) -> Float[Tensor, "r 3 H W"]:
        """Return x̃₀, the conditional reconstruction of each row's image (Eq. 2-5)."""
        noisy, _ = noised(rows, context, self.timestep)
        injection = self.injection(rows)
        output = denoise(rows, context, noisy, self.timestep, injection, self.guidance_scale)
        generator = context.generator
        clean = predict_clean(
            noisy, output, generator.alphas_cumprod, self.timestep, generator.prediction_type
        )
        return generator.decode(clean)

    def injection(self, rows: Rows) -> Injection:
        """Return what is injected into the conditional pass of the rows."""
        return Injection(
            rows.foreground,
            rows.tokens,
            self.injection_weight,
            cross_attention=self.inject_cross_attention,
            self_attention=self.inject_self_attention,
            rule=self.injection_rule,
            binarise_at=self.binarise_at,
            resize=self.mask_resize,
            classes=rows.classes,
        )

    def _rows(self, foreground: Tensor, context: RefinementContext) -> Rows:
        if self.all_classes_at_once:
            return rows_per_image(foreground, context)
        return rows_per_class(foreground, context, own_noise=self.noise_per == "class")

    def compare(self, images: Tensor, rows: Rows, context: RefinementContext) -> Tensor:
        """Return δ of Eq. 8, or the discrepancy at the same place, of each row."""
        references = resize_features(context.reference_features, self.match_size)
        references = references[list(rows.owner)]
        queries = resize_features(self.extract(images, rows, context), self.match_size)
        if not torch.isfinite(queries).all():
            message = (
                f"the generated image at timestep {self.timestep} is not finite; "
                "a float16 model overflows, load it in bfloat16 or float32"
            )
            raise FloatingPointError(message)
        if self.matching == "aligned":
            return discrepancy(queries, references)
        return nearest_neighbours(queries, references)

    def extract(
        self, images: Float[Tensor, "r 3 H W"], rows: Rows, context: RefinementContext
    ) -> Float[Tensor, "r c h w"]:
        """Return F of the rows' generated images (Eq. 8)."""
        del rows  # for those who tell images apart by what they were generated from
        return context.extract(images)

    def _match_image_with_itself(self, foreground: Tensor, context: RefinementContext) -> Tensor:
        features = resize_features(context.reference_features, self.match_size)
        found = torch.cat(
            [
                nearest_neighbours(features[part], features[part], self.exclude_radius)
                for part in context.parts(len(features))
            ]
        )
        return self._update(foreground, found[context.owner], context)

    def _update(self, foreground: Tensor, found: Tensor, context: RefinementContext) -> Tensor:
        grid = resize_features(context.reference_features[:1], self.match_size).shape[2:]
        name = "discrepancy" if self.matching == "aligned" else "neighbours"
        context.record(name, found.view(len(found), grid[0], grid[1]))
        coarse = functional.adaptive_avg_pool2d(foreground, (grid[0], grid[1]))
        if self.matching == "aligned":
            target = aligned_target(coarse, found)
        else:
            target = matched_target(coarse, found)
        return mix(foreground, coarse, target, self.beta, self.confidence_range, carry=self.carry)


@dataclass(frozen=True)
class Blur:
    """The plainest control: a Gaussian over the mask, no image and no model.

    Attributes:
        sigma: standard deviation in pixels at working size; 0 changes nothing.
        confidence_range: only pixels whose mask value lies in this range change; None for all.
    """

    sigma: float = 2.0
    confidence_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Refuse a negative width."""
        if self.sigma < 0:
            message = f"sigma is {self.sigma}; give 0 (off) or more pixels"
            raise ValueError(message)

    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return the masks blurred, their borders replicated."""
        if self.sigma == 0:
            return foreground
        blurred = _blur_rows(_blur_rows(foreground, self.sigma).mT, self.sigma).mT
        return mix(foreground, foreground, blurred, 0.0, self.confidence_range)


def _blur_rows(maps: Float[Tensor, "m H W"], sigma: float) -> Float[Tensor, "m H W"]:
    reach = max(1, round(4 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.softmax(-0.5 * (offsets / sigma) ** 2, dim=0)
    padded = functional.pad(maps, (reach, reach), mode="replicate")
    windows = padded.unfold(-1, 2 * reach + 1, 1)
    return windows @ kernel


def _for_each_mask(per_row: Tensor, rows: Rows, context: RefinementContext) -> Tensor:
    """Return a row's result for each mask: its own, or its image's."""
    if len(rows) == len(context.owner):
        return per_row
    position = {image: row for row, image in enumerate(rows.owner)}
    index: Int[Tensor, " m"] = torch.tensor([position[i] for i in context.owner.tolist()])
    return per_row[index.to(per_row.device)]
