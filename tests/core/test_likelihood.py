"""Likelihood: common noise, choosing, scores, and confidence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import given_to_the_unet
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.confidence import Averaged, confidence
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.diffusion import seeded_noise
from g4seg_pl.core.evidence import ClassEvidence
from g4seg_pl.core.generation import rows_per_class
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.likelihood import (
    ChooseByLikelihood,
    choose,
    pixel_weights,
    rank_images,
)
from g4seg_pl.core.loss import DenoisingLoss
from g4seg_pl.core.paired_losses import PairedLosses, paired_losses
from g4seg_pl.core.refine import RefinementState, refine
from g4seg_pl.core.steps import Blur, Correspondence, NestedStep

SceneMaker = Callable[..., RefinementContext]


@dataclass(frozen=True)
class Add:
    """A step whose result is known."""

    amount: float

    def __call__(self, foreground: Tensor, context: RefinementContext) -> Tensor:
        return (foreground + self.amount).clamp(0, 1)


@dataclass(frozen=True)
class Noisy:
    """A step whose result depends on nothing but the draw of noise."""

    def __call__(self, foreground: Tensor, context: RefinementContext) -> Tensor:
        owners = tuple(context.image_ids[image] for image in context.owner.tolist())
        noise = context.noise(owners, context.class_names)[:, 0]
        return functional.interpolate(noise.sigmoid()[:, None], foreground.shape[1:])[:, 0]


def test_losses_are_those_of_single_passes_under_common_noise(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    context = scene(masks_per_pass=3)
    empty = torch.zeros_like(soft_masks)
    loss = DenoisingLoss(20.0, binarise_at=None)
    found = paired_losses(
        [soft_masks, empty, soft_masks], context, (200, 400), 2, loss=loss, keep_maps=True
    )
    assert found.losses.shape == (3, 4, 4)
    assert found.maps is not None
    assert found.maps.shape == (3, 4, 4, 16, 16)
    assert torch.equal(found.losses[0], found.losses[2])
    with torch.no_grad():
        for candidate, masks in enumerate((soft_masks, empty)):
            rows = rows_per_class(masks, context)
            for number, (t, draw) in enumerate([(200, 0), (200, 1), (400, 0), (400, 1)]):
                expected = loss.per_row(rows, context, t, draw)
                torch.testing.assert_close(found.losses[candidate, :, number], expected)
    plain = DenoisingLoss(0.0)
    without = paired_losses([soft_masks], context, (200, 400), 2, loss=plain)
    torch.testing.assert_close(without.losses[0], found.losses[1], rtol=1e-4, atol=0)
    own = paired_losses([soft_masks], context, (200, 400), 2, loss=loss, noise_per_timestep=True)
    with torch.no_grad():
        rows = rows_per_class(soft_masks, context)
        for number, (t, draw) in enumerate([(200, 0), (200, 1), (400, 2), (400, 3)]):
            expected = loss.per_row(rows, context, t, draw)
            torch.testing.assert_close(own.losses[0, :, number], expected)


def test_differences_are_paired() -> None:
    numbers = torch.Generator().manual_seed(0)
    common = torch.rand(1, 2, 5, generator=numbers) * 10 + 1
    better = torch.tensor([1.0, 0.9, 1.2])[:, None, None]
    losses = PairedLosses(common * better)
    torch.testing.assert_close(losses.difference(), better[:, :, 0].log().expand(3, 2))
    assert losses.standard_error().max() < 1e-6
    noisy = PairedLosses(common * (better + 0.01 * torch.rand(3, 2, 5, generator=numbers)))
    ratio = (noisy.losses / noisy.losses[:1]).log()
    torch.testing.assert_close(noisy.standard_error(), ratio.std(-1) / 5**0.5)
    assert PairedLosses(common[..., :1]).standard_error().isnan().all()


@settings(max_examples=50)
@given(st.integers(0, 1000), st.permutations(range(4)), st.sampled_from([0.0, 1.0, 3.0]))
def test_choice_follows_masks_and_is_never_worse(
    seed: int, order: Sequence[int], margin: float
) -> None:
    losses = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(seed)) + 0.5
    chosen = choose(PairedLosses(losses), margin)
    assert torch.equal(choose(PairedLosses(losses[:, list(order)]), margin), chosen[list(order)])
    picked = PairedLosses(losses).difference()[chosen, torch.arange(4)]
    error = PairedLosses(losses).standard_error()[chosen, torch.arange(4)]
    assert ((chosen == 0) | (picked + margin * error < 0)).all()


def test_each_mask_keeps_its_best_candidate(scene: SceneMaker, soft_masks: Tensor) -> None:
    seen: list[RefinementState] = []
    context = scene()
    steps = [[Add(0.3), Add(-0.6)], [Blur(3.0)]]
    choice = ChooseByLikelihood(steps, every_step=True, draws=2, binarise_at=None)
    refined = refine(soft_masks, context, [choice], seen.append)
    raised = (soft_masks + 0.3).clamp(0, 1)
    candidates = [soft_masks, raised, (raised - 0.6).clamp(0, 1), Blur(3.0)(soft_masks, context)]
    losses = choice.losses(candidates, context)
    best = losses.losses.log().mean(-1).argmin(0)
    assert len(set(best.tolist())) > 1
    for mask, winner in enumerate(best.tolist()):
        assert torch.equal(refined[mask], candidates[winner][mask])
    artifacts = seen[0].artifacts
    assert torch.equal(artifacts["chosen"], best)
    torch.testing.assert_close(artifacts["likelihood"], losses.difference().T)
    assert artifacts["likelihood_error"].shape == (4, 4)
    kept = context.kept
    empty = choice.losses([refined, torch.zeros_like(refined)], context)
    torch.testing.assert_close(kept["score"], empty.difference()[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kept["score_error"], empty.standard_error()[1], rtol=1e-3, atol=1e-6)
    weights = kept["pixel_weights"]
    assert weights.shape == soft_masks.shape
    assert weights.min() >= 0
    assert weights.max() <= 1


def test_pixels_weigh_how_surely_the_chosen_mask_beats_the_empty_one(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    context = scene()
    choice = ChooseByLikelihood([[Add(0.3)], [Add(-0.3)]], draws=3, binarise_at=None)
    chosen = choice(soft_masks, context)
    maps = choice.losses([chosen, torch.zeros_like(chosen)], context).maps
    assert maps is not None
    gain = functional.avg_pool2d(maps[1] - maps[0], 3, 1, 1, count_include_pad=False)
    normal = torch.distributions.Normal(0.0, 1.0)
    sure = normal.cdf(gain.mean(1) / (gain.std(1) / 3**0.5))
    expected = functional.interpolate(sure[:, None], (64, 64), mode="bilinear")[:, 0]
    assert (expected - 0.5).abs().max() > 0.4
    torch.testing.assert_close(context.kept["pixel_weights"], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("cross", [True, False])
def test_candidates_are_injected_where_asked(
    cross: bool, scene: SceneMaker, soft_masks: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = scene()
    seen = given_to_the_unet(context.generator, monkeypatch)
    choice = ChooseByLikelihood(
        [], draws=1, inject_cross_attention=cross, inject_self_attention=not cross
    )
    choice.losses([soft_masks], context)
    ((_, injection),) = seen
    assert (injection.cross_attention, injection.self_attention) == (cross, not cross)


def test_findings_are_shown_to_the_callback_too(scene: SceneMaker, soft_masks: Tensor) -> None:
    context, seen = scene(), list[RefinementState]()
    choice = ChooseByLikelihood([[Averaged([Noisy()], draws=2)]], draws=1)
    refine(soft_masks, context, [choice], seen.append)
    artifacts, kept = seen[0].artifacts, context.kept
    for name in ("confidence", "score", "pixel_weights"):
        torch.testing.assert_close(artifacts[name], kept[name], rtol=0, atol=0, equal_nan=True)


def test_only_the_last_of_a_list_counts_unless_asked(scene: SceneMaker, soft_masks: Tensor) -> None:
    context = scene()
    ChooseByLikelihood([[Add(0.3), Add(-0.3)], [Blur()]])(soft_masks, context)
    # Two candidates, the masks given and the empty ones; two draws; four masks.
    assert context.generator.rows == 4 * 2 * 4
    before = context.generator.rows
    ChooseByLikelihood([[Blur()]], all_classes_at_once=True)(soft_masks, context)
    assert context.generator.rows - before == 3 * 2 * 2


def test_an_unreachable_margin_keeps_the_masks(scene: SceneMaker, soft_masks: Tensor) -> None:
    choice = ChooseByLikelihood([[Add(0.3)]], margin=1e6, binarise_at=None)
    assert torch.equal(choice(soft_masks, scene()), soft_masks)


def test_all_classes_at_once_choose_for_the_image(scene: SceneMaker, soft_masks: Tensor) -> None:
    choice = ChooseByLikelihood([[Add(0.2)]], all_classes_at_once=True, binarise_at=None)
    seen: list[RefinementState] = []
    refine(soft_masks, scene(), [choice], seen.append)
    chosen = seen[0].artifacts["chosen"].tolist()
    assert chosen[0] == chosen[1] == chosen[2]


@pytest.mark.parametrize("options", [{}, {"loss": "image"}, {"timesteps": (300, 500), "draws": 1}])
def test_a_mask_depends_on_its_own_image_alone(
    options: dict[str, Any], scene: SceneMaker, soft_masks: Tensor
) -> None:
    candidates = [soft_masks, (soft_masks + 0.3).clamp(0, 1)]
    choice = ChooseByLikelihood([], **options)
    together = choice.losses(candidates, scene()).losses
    small = choice.losses(candidates, scene(masks_per_pass=1)).losses
    torch.testing.assert_close(small, together, rtol=1e-4, atol=0)
    order = [3, 1, 0, 2]
    reordered = choice.losses([c[order] for c in candidates], scene(tuple(order))).losses
    torch.testing.assert_close(reordered, together[:, order], rtol=1e-4, atol=0)


def test_gradients_are_announced_and_work_inside(scene: SceneMaker, soft_masks: Tensor) -> None:
    nested = ChooseByLikelihood([[Averaged([Gradient(iterations=1)], draws=2)], [Blur()]])
    assert nested.needs_gradient
    assert not ChooseByLikelihood([[Blur()], [Correspondence()]]).needs_gradient
    with torch.inference_mode():
        context = scene()
        found = nested(soft_masks.clone(), context)
    assert torch.isfinite(found).all()
    assert set(context.kept) == {"confidence", "score", "score_error", "pixel_weights"}


def test_a_place_that_is_surely_better_weighs_one() -> None:
    numbers = torch.Generator().manual_seed(0)
    worse = torch.rand(2, 6, 8, 8, generator=numbers) + 1
    better = worse.clone()
    better[:, :, :, :4] -= 0.5 + 0.1 * torch.rand(2, 6, 8, 4, generator=numbers)
    better[:, :, :, 4:] += 0.5 + 0.1 * torch.rand(2, 6, 8, 4, generator=numbers)
    weights = pixel_weights(better, worse, (16, 16))
    assert weights[:, :, :6].min() > 0.99
    assert weights[:, :, 10:].max() < 0.01
    single = pixel_weights(better[:, :1], worse[:, :1], (16, 16))
    assert single[:, :, :6].min() > 0.5 > single[:, :, 10:].max()


def test_doubtful_images_come_first() -> None:
    scores, owner = torch.tensor([0.5, -0.1, 0.3, 0.1]), torch.tensor([0, 0, 2, 5])
    assert rank_images(scores, owner) == (0, 5, 2)
    assert rank_images(scores, owner, by="mean") == (5, 0, 2)


def test_confidence_is_one_where_draws_agree(scene: SceneMaker, soft_masks: Tensor) -> None:
    context = scene()
    Averaged([Add(0.1)], draws=3)(soft_masks, context)
    torch.testing.assert_close(context.kept["confidence"], torch.ones_like(soft_masks))
    Averaged([Add(0.1)], draws=1, spread_over="steps")(soft_masks, context)
    assert context.kept["confidence"].min() < 0.95
    zero, one = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    assert not confidence([zero, one]).any()


@dataclass(frozen=True)
class Sure:
    """A step that moves the masks, and says how sure it is of them."""

    amount: float
    confidence: float

    def __call__(self, foreground: Tensor, context: RefinementContext) -> Tensor:
        context.keep("confidence", torch.full_like(foreground, self.confidence))
        return Add(self.amount)(foreground, context)


@pytest.mark.parametrize("evidence", [None, ClassEvidence(timesteps=(300,), draws=2)])
def test_findings_are_those_of_the_chosen_candidates(
    evidence: ClassEvidence | None, scene: SceneMaker, soft_masks: Tensor
) -> None:
    steps = [[Sure(0.3, 0.1), Sure(-0.6, 0.2)], [Sure(-0.2, 0.3)]]
    choice = ChooseByLikelihood(steps, every_step=True, evidence=evidence)
    seen: list[RefinementState] = []
    context = scene()
    refine(soft_masks, context, [choice], seen.append)
    chosen = seen[0].artifacts["chosen"]
    assert len(set(chosen.tolist())) > 1
    expected = torch.tensor([torch.nan, 0.1, 0.2, 0.3])[chosen]
    found = context.kept["confidence"]
    torch.testing.assert_close(found[:, 0, 0], expected, equal_nan=True)
    # What was known of the masks given stays known of those that stay.
    known = scene()
    refine(soft_masks, known, [Sure(0.0, 0.9), choice], seen.append)
    chosen = seen[-1].artifacts["chosen"]
    expected = torch.tensor([0.9, 0.1, 0.2, 0.3])[chosen]
    torch.testing.assert_close(known.kept["confidence"][:, 0, 0], expected)


@pytest.mark.parametrize("evidence", [None, ClassEvidence(timesteps=(200, 400), draws=2)])
def test_no_candidate_is_judged_by_noise_that_made_it(
    evidence: ClassEvidence | None,
    scene: SceneMaker,
    soft_masks: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []

    def noted(shape: Any, seed: int, image: str, name: str, draw: int) -> Tensor:
        drawn.append(draw)
        return seeded_noise(shape, seed, image, name, draw)

    monkeypatch.setattr("g4seg_pl.core.context.seeded_noise", noted)
    context = scene()
    candidates: list[list[NestedStep]] = [[Averaged([Correspondence()], draws=3)]]
    candidates[0][0](soft_masks, context)
    made_with, count = set(drawn), len(drawn)
    step = ChooseByLikelihood(candidates, timesteps=(200, 400), draws=2, evidence=evidence)
    step(soft_masks, context)
    judged_by = set(drawn[2 * count :])
    # Two timesteps of two draws each; none is met twice.
    assert len(judged_by) == 4
    assert made_with.isdisjoint(judged_by)


def test_draws_share_what_depends_on_the_image_alone(scene: SceneMaker, soft_masks: Tensor) -> None:
    context, seen = scene(), []
    patches = context.features

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return patches(images)

    context.features = counted
    Averaged([Correspondence()], draws=3)(soft_masks, context)
    # F(x0) of two images once, F of four generated ones three times.
    assert sum(seen) == 2 + 3 * 4


def test_averaged_draws_other_noise_each_time(scene: SceneMaker, soft_masks: Tensor) -> None:
    context = scene()
    single = Noisy()(soft_masks, context)
    mean = Averaged([Noisy()], draws=2)(soft_masks, context)
    other = Noisy()(soft_masks, context.variant(first_draw=10_000))
    torch.testing.assert_close(mean, (single + other) / 2)
    assert not torch.equal(single, other)
    expected = confidence([single, other])
    torch.testing.assert_close(context.kept["confidence"], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChooseByLikelihood([], draws=0), "draws is 0"),
        (lambda: ChooseByLikelihood([], margin=1.0, draws=1), "margin is 1.0"),
        (lambda: ChooseByLikelihood([], margin=-1.0), "margin is -1.0"),
        (lambda: Averaged([]), r"steps \[\]"),
    ],
)
def test_values_without_meaning_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
