"""Evidence: where an image denoises worse once a class's name is taken out of its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.generation import Rows, rows_per_image
from g4seg_pl.core.grounding import Grounding
from g4seg_pl.core.guided import Upsampling, box_mean, bring_up, check_edges
from g4seg_pl.core.loss import DenoisingLoss
from g4seg_pl.core.paired import Paired

# Plain passes: nothing is injected.
_PLAIN = DenoisingLoss(injection_weight=0.0)


@dataclass(frozen=True)
class ExplainedShares(Paired):
    """How much of the evidence for a class candidate masks explain, pass by pass.

    Attributes:
        shares: ``(k, m, n)``: of every candidate, mask and pass; the mean over passes is at most
            1, and 0 for an empty mask.
    """

    shares: Float[Tensor, "k m n"]

    def without_last(self) -> "ExplainedShares":
        """Return all candidates but the last."""
        return ExplainedShares(self.shares[:-1])

    def paired(self, reference: int) -> Float[Tensor, "k m n"]:
        """Return how much less each candidate explains than the reference."""
        return self.shares[reference] - self.shares


@dataclass(frozen=True)
class ClassEvidence:
    """The evidence of a generator's own denoising loss for a class, and masks judged by it.

    With a_i the squared error of ε at place i under the prompt that names all classes of the
    image, and b_i under the same prompt without class c, both under the same noise, a mask S of c
    has the loss Σ_i S_i a_i + (1 - S_i) b_i if the name is heard inside of it alone. Against the
    empty mask it saves Σ_S e_i with e = b - a: the log-likelihood ratio of "c is here" against
    "c is not here", place by place. How strong the evidence is at a place of c is not known
    beforehand; were it μ everywhere on c under noise of one variance, the ratio's logarithm would
    be Σ_S (μ e_i - μ²/2) but for a factor, at its best μ (Σ_S e_i)² / 2|S|. Its signed root is
    what masks are judged by,

        share(S) = Σ_S e_i / (√|S| · ‖e⁺‖),

    the matched filter of detection theory. By Cauchy and Schwarz it is at most 1: where S holds
    all that speaks for c, evenly, and nothing else. The divisor is common to all masks of c.

    The passes do not depend on the masks, so that any number of candidates costs the same: for an
    image of K classes K + 1 rows at every timestep and draw. No mask is injected, so that a mask
    cannot be fitted to the loss that judges it, as `Gradient` does to that of an injected one.

    Attributes:
        timesteps: of the passes; object-sized structure is decided in the middle.
        draws: passes at each timestep, every pass under noise of its own.
        radius: of the square that evidence is averaged over, in latent cells.
        upsampling: of the evidence: bilinear, or along the image's edges.
        edge_radius: window of the latter, in latent cells.
        edge_epsilon: squared contrast below which an edge is smoothed over.
        word_weight: the weight of the attention to the class's name (`Grounding`'s word map, in
            [0, 1]) against evidence of root mean square 1. 0 is denoising loss alone; above that
            masks made of word maps are favoured.
        word_timestep: t of the word map.
        word_draws: draws of noise of the word map.
    """

    timesteps: tuple[int, ...] = (100, 300, 500)
    draws: int = 4
    radius: int = 1
    upsampling: Upsampling = "joint_bilateral"
    edge_radius: int = 3
    edge_epsilon: float = 1e-3
    word_weight: float = 0.0
    word_timestep: int = 20
    word_draws: int = 3

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if self.draws < 1 or not self.timesteps:
            message = f"draws is {self.draws} at timesteps {self.timesteps}; give one of each"
            raise ValueError(message)
        if self.radius < 0:
            message = f"radius is {self.radius}; give 0 (off) or more latent cells"
            raise ValueError(message)
        if self.word_weight < 0 or self.word_draws < 1:
            message = (
                f"word_weight is {self.word_weight} and word_draws {self.word_draws}; "
                "give a weight of 0 (off) or more and one draw at least"
            )
            raise ValueError(message)
        check_edges(self.edge_radius, self.edge_epsilon)

    @torch.no_grad()
    def passes(self, context: RefinementContext) -> Float[Tensor, "m n h w"]:
        """Return e of every mask's class, timestep and draw on the latent's grid."""
        whole, without = _whole(context), _without(context)
        row_of = {image: row for row, image in enumerate(whole.owner)}
        index = [row_of[image] for image in without.owner]
        found = []
        # Noise is common to both prompts and new in every pass, so that it averages out.
        for draw, (timestep, _) in enumerate(product(self.timesteps, range(self.draws))):
            heard = _errors(whole, context, timestep, draw)[index]
            found.append(_errors(without, context, timestep, draw) - heard)
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def shares(
        self,
        candidates: Sequence[Float[Tensor, "m H W"]],
        context: RefinementContext,
        passes: Float[Tensor, "m n h w"] | None = None,
    ) -> ExplainedShares:
        """Return how much of the evidence every candidate explains.

        Args:
            candidates: each all masks of the context, in [0, 1]; soft ones count in part.
            context: the images.
            passes: what ``passes`` returned, if it is there already.
        """
        passes = self.passes(context) if passes is None else passes
        scale, words = self._scale(passes, context), self._words(context)
        masks = torch.stack(list(candidates)).to(passes)
        root = masks.square().sum((2, 3)).sqrt().clamp_min(torch.finfo(masks.dtype).tiny)
        sums, total = [], torch.zeros_like(masks[0])
        for number in range(passes.shape[1]):
            fine = self.bring_up(passes[:, number], context) / scale + words
            sums.append((masks * fine).sum((2, 3)) / root)
            total += fine / passes.shape[1]
        tiny = torch.finfo(masks.dtype).tiny
        most = total.clamp_min(0).square().sum((1, 2)).sqrt().clamp_min(tiny)
        return ExplainedShares(torch.stack(sums, dim=-1) / most[:, None])

    def bring_up(
        self, evidence: Float[Tensor, "m h w"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return evidence at the images' size, averaged over neighbours and along edges."""
        smooth = box_mean(evidence[:, None], self.radius)[:, 0] if self.radius else evidence
        images = context.images[context.owner].to(smooth)
        return bring_up(smooth, images, self.upsampling, self.edge_radius, self.edge_epsilon)

    def _scale(self, passes: Tensor, context: RefinementContext) -> Float[Tensor, "m 1 1"]:
        """Return the root mean square of each mask's evidence; 1 where no word is weighed in."""
        if not self.word_weight:
            return passes.new_ones(len(passes), 1, 1)
        fine = self.bring_up(passes.mean(1), context)
        mean_square = fine.square().mean((1, 2), keepdim=True)
        return mean_square.sqrt().clamp_min(torch.finfo(fine.dtype).tiny)

    def _words(self, context: RefinementContext) -> Tensor:
        """Return the weighted word maps, ``(m, H, W)``, or a zero."""
        if not self.word_weight:
            return context.images.new_zeros(())
        grounding = Grounding(
            mixing=1.0,
            timestep=self.word_timestep,
            draws=self.word_draws,
            upsampling="joint_bilateral",
            edge_epsilon=3e-3,
        )
        size = (len(context.owner), *context.images.shape[2:])
        return self.word_weight * grounding(context.images.new_zeros(size), context)


def _errors(
    rows: Rows, context: RefinementContext, timestep: int, draw: int
) -> Float[Tensor, "r h w"]:
    parts = context.parts(len(rows))
    return torch.cat([_PLAIN.maps(rows.part(part), context, timestep, draw) for part in parts])


def _whole(context: RefinementContext) -> Rows:
    """Return one row an image, all of its classes in the prompt."""
    return rows_per_image(_nothing(context), context)


def _without(context: RefinementContext) -> Rows:
    """Return one row a mask, all classes of its image but its own in the prompt."""
    owner, prompts = context.owner.tolist(), []
    pairs = list(zip(owner, context.class_names, strict=True))
    for image, name in pairs:
        others = tuple(dict.fromkeys(n for i, n in pairs if i == image and n != name))
        prompts.append(context.prompt(others)[0] if others else "")
    empty = _nothing(context)[:, None]
    tokens = empty.new_zeros(len(owner), 1, 1)
    names, classes = ("",) * len(owner), tuple(() for _ in owner)
    return Rows(tuple(owner), tuple(prompts), names, empty, tokens, classes)


def _nothing(context: RefinementContext) -> Float[Tensor, "m H W"]:
    return context.images.new_zeros(len(context.owner), *context.images.shape[2:])
