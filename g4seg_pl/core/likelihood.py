"""Likelihood: of several masks, the one under which the image denoises best (Eq. 6)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.evidence import ClassEvidence, ExplainedShares
from g4seg_pl.core.guided import box_mean
from g4seg_pl.core.loss import DenoisingLoss, LossKind
from g4seg_pl.core.paired_losses import PairedLosses, paired_losses
from g4seg_pl.core.steps import NestedStep, any_needs_gradient

# Far from the draws of any step, those of `Averaged` included.
_JUDGED_FROM = 100_000_000


@dataclass(frozen=True)
class ChooseByLikelihood:
    """Runs candidate updates and keeps, mask by mask, what explains the image best.

    The masks given are always a candidate. Recorded for the callback, a row a mask: ``chosen``,
    the candidate's number; ``likelihood`` and ``likelihood_error``, every candidate's
    log L - log L of the masks given, and its standard error. Kept in the context: ``score`` and
    ``score_error``, how much better than an empty mask the chosen one explains the image, and
    its standard error; ``pixel_weights``, of the chosen mask against the empty one. With
    ``evidence``, shares explained stand in for -log L, with their sign turned where L's is.
    What else a mask's chosen candidate found out about it, such as ``confidence``, is kept too;
    not a number where that candidate measured none. No noise is judged under that a candidate
    was made with.

    Attributes:
        candidates: lists of steps, each applied in order to the masks given.
        every_step: the masks after each step of a list are candidates, not only the last: how a
            list is stopped where it is best.
        margin: standard errors by which a candidate must be better than the masks given.
        timesteps: of the losses.
        draws: of noise at each timestep.
        injection_weight: w of Eq. 5.
        loss: what is compared: noise, clean latent, velocity, or the decoded image.
        binarise_at: from where on a candidate counts as 1, the seed's threshold; None is soft.
        inject_cross_attention: inject into cross-attention (Eq. 3).
        inject_self_attention: inject into self-attention (Eq. 4).
        all_classes_at_once: judge all masks of an image together, in one pass.
        evidence: judge by the evidence for the class's name, which no candidate is injected
            for; None judges by the denoising loss under each candidate. Of the settings above
            only ``binarise_at`` and ``margin`` count with it.
    """

    candidates: list[list[NestedStep]]
    every_step: bool = False
    margin: float = 0.0
    timesteps: tuple[int, ...] = (400,)
    draws: int = 2
    injection_weight: float = 20.0
    loss: LossKind = "epsilon"
    binarise_at: float | None = 0.5
    inject_cross_attention: bool = True
    inject_self_attention: bool = True
    all_classes_at_once: bool = False
    evidence: ClassEvidence | None = None

    def __post_init__(self) -> None:
        """Refuse a margin that cannot be measured."""
        if self.draws < 1 or not self.timesteps:
            message = f"draws is {self.draws} at timesteps {self.timesteps}; give one of each"
            raise ValueError(message)
        judge: ChooseByLikelihood | ClassEvidence = self.evidence or self
        count = judge.draws * len(judge.timesteps)
        if self.margin < 0 or (self.margin > 0 and count < 2):
            message = (
                f"margin is {self.margin} standard errors over {count} draws; give 0 or more, "
                "and two draws or timesteps at least for a margin"
            )
            raise ValueError(message)

    @property
    def needs_gradient(self) -> bool:
        """Whether any candidate's steps do."""
        return any(any_needs_gradient(steps) for steps in self.candidates)

    def __call__(
        self, foreground: Float[Tensor, "m H W"], context: RefinementContext
    ) -> Float[Tensor, "m H W"]:
        """Return each mask's best candidate."""
        found, findings = [foreground], [context.kept]
        for steps in self.candidates:
            masks, nested = foreground, context.with_own_findings()
            for position, step in enumerate(steps, start=1):
                masks = step(masks, nested)
                if self.every_step or position == len(steps):
                    found.append(masks)
                    findings.append(nested.kept)
        # The empty mask is for the score alone and cannot be chosen.
        candidates = [*found, torch.zeros_like(foreground)]
        if self.evidence is None:
            losses = self.losses(candidates, context)
            chosen = choose(losses.without_last(), self.margin)
            _keep_chosen(findings, chosen, context)
            self._record(losses, chosen, context)
            self._keep_weights(losses, chosen, foreground, context)
        else:
            chosen = self._choose_by_evidence(self.evidence, candidates, findings, context)
        every = torch.arange(len(foreground), device=foreground.device)
        return torch.stack(found)[chosen, every]

    def losses(
        self, candidates: Sequence[Float[Tensor, "m H W"]], context: RefinementContext
    ) -> PairedLosses:
        """Return the candidates' losses, with maps, under this step's settings."""
        loss = DenoisingLoss(
            self.injection_weight,
            self.loss,
            cross_attention=self.inject_cross_attention,
            self_attention=self.inject_self_attention,
            binarise_at=self.binarise_at,
        )
        together = self.all_classes_at_once
        return paired_losses(
            candidates,
            judging(context),
            self.timesteps,
            self.draws,
            loss=loss,
            all_classes_at_once=together,
            keep_maps=True,
            noise_per_timestep=True,
        )

    def _choose_by_evidence(
        self,
        evidence: ClassEvidence,
        candidates: Sequence[Float[Tensor, "m H W"]],
        findings: Sequence[Mapping[str, Tensor]],
        context: RefinementContext,
    ) -> Int[Tensor, " m"]:
        """Return the numbers of the candidates that explain most of the evidence."""
        cut = self.binarise_at
        masks = [each if cut is None else (each >= cut).to(each.dtype) for each in candidates]
        under = judging(context)
        passes = evidence.passes(under)
        shares = evidence.shares(masks, under, passes)
        chosen = choose(shares.without_last(), self.margin)
        _keep_chosen(findings, chosen, context)
        self._record(shares, chosen, context)
        stacked = torch.stack(masks)
        picked = stacked[chosen, torch.arange(len(chosen), device=chosen.device)]
        grid = (passes.shape[2], passes.shape[3])
        inside = functional.adaptive_avg_pool2d(picked, grid)[:, None].to(passes)
        # What the name, heard inside the mask alone, saves against hearing it nowhere.
        size = (picked.shape[1], picked.shape[2])
        weights = pixel_weights(torch.zeros_like(passes), inside * passes, size)
        context.keep("pixel_weights", weights)
        return chosen

    def _record(
        self, scores: PairedLosses | ExplainedShares, chosen: Tensor, context: RefinementContext
    ) -> None:
        every = torch.arange(len(chosen), device=chosen.device)
        context.record("chosen", chosen)
        context.record("likelihood", scores.difference()[:-1].T)
        context.record("likelihood_error", scores.standard_error()[:-1].T)
        context.keep("score", -scores.difference(-1)[chosen, every])
        context.keep("score_error", scores.standard_error(-1)[chosen, every])

    def _keep_weights(
        self, losses: PairedLosses, chosen: Tensor, foreground: Tensor, context: RefinementContext
    ) -> None:
        if losses.maps is not None:
            every = torch.arange(len(chosen), device=chosen.device)
            best, empty = losses.maps[chosen, every], losses.maps[-1]
            size = (foreground.shape[1], foreground.shape[2])
            context.keep("pixel_weights", pixel_weights(best, empty, size))


def judging(context: RefinementContext) -> RefinementContext:
    """Return the context with noise that no candidate was made under.

    A mask made under some noise may explain that noise better than it does other.
    """
    return context.variant(first_draw=context.first_draw + _JUDGED_FROM)


def choose(losses: PairedLosses | ExplainedShares, margin: float = 0.0) -> Int[Tensor, " m"]:
    """Return each mask's best candidate, 0 unless another is better by the margin.

    Args:
        losses: of the candidates, or the shares they explain; the first stands if in doubt.
        margin: in standard errors of the difference.
    """
    difference = losses.difference()
    bound = difference if margin == 0 else difference + margin * losses.standard_error()
    eligible = difference.masked_fill(bound >= 0, torch.inf)
    eligible[0] = 0.0
    return eligible.argmin(0)


def pixel_weights(
    better: Float[Tensor, "m n h w"],
    worse: Float[Tensor, "m n h w"],
    size: tuple[int, int],
    radius: int = 1,
) -> Float[Tensor, "m H W"]:
    """Return how surely, from 0 to 1, one mask explains each place better than another.

    The normal distribution function of the paired difference over its standard error; training
    on the mask can weight its pixels so, or ignore those below some value
    (:class:`~g4seg_pl.callbacks.ignore.IgnoreUncertain`). With a single draw the error is taken
    over all places.

    Args:
        better: squared errors under the mask to be weighed, of every draw.
        worse: the same under the mask it is compared with, such as the empty one.
        size: height and width wanted.
        radius: of the square that errors are averaged over first, in latent cells.
    """
    gain = box_mean(worse - better, radius)
    count = gain.shape[1]
    error = gain.std(1) / count**0.5 if count > 1 else gain[:, 0].std((1, 2), keepdim=True)
    sure = torch.special.ndtr(gain.mean(1) / error.clamp_min(torch.finfo(gain.dtype).tiny))
    fine = functional.interpolate(sure[:, None], size, mode="bilinear", align_corners=False)
    return fine[:, 0].clamp(0, 1)


def rank_images(
    scores: Float[Tensor, " m"],
    owner: Int[Tensor, " m"],
    by: Literal["worst", "mean"] = "worst",
) -> tuple[int, ...]:
    """Return the indices of images, those a person should check first at the beginning.

    Args:
        scores: how much better than an empty mask each mask explains its image.
        owner: the image index of each mask; images without masks are not ranked.
        by: what an image's masks count as: their worst score, or the mean.
    """
    per_image: dict[int, list[float]] = {}
    for image, score in zip(owner.tolist(), scores.tolist(), strict=True):
        per_image.setdefault(image, []).append(score)
    whole = {
        image: min(found) if by == "worst" else sum(found) / len(found)
        for image, found in per_image.items()
    }
    return tuple(sorted(whole, key=lambda image: whole[image]))


def _keep_chosen(
    findings: Sequence[Mapping[str, Tensor]], chosen: Int[Tensor, " m"], context: RefinementContext
) -> None:
    """Keep what each mask's chosen candidate found out, not a number where it found nothing.

    Args:
        findings: by name, of every candidate.
        chosen: the candidate's number, of every mask.
        context: keeps them.
    """
    every = torch.arange(len(chosen), device=chosen.device)
    for name, rows in {name: rows for each in findings for name, rows in each.items()}.items():
        unknown = torch.full_like(rows, torch.nan)
        measured = torch.stack([each.get(name, unknown) for each in findings])
        context.keep(name, measured[chosen, every])
