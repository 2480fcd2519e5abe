"""Evidence for a class's name: explicit passes, the matched filter, and choosing by it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.diffusion import seeded_noise
from g4seg_pl.core.evidence import ClassEvidence, ExplainedShares
from g4seg_pl.core.grounding import Grounding
from g4seg_pl.core.likelihood import ChooseByLikelihood, judging
from g4seg_pl.core.refine import RefinementState, refine
from g4seg_pl.core.steps import Blur

SceneMaker = Callable[..., RefinementContext]
FEW = ClassEvidence(timesteps=(200, 400), draws=2)


def explicit_error(
    context: RefinementContext, image: int, prompt: str, t: int, draw: int
) -> Tensor:
    """Squared error of ε of one image under one prompt, written out for an ε-model."""
    latent = context.latents[image : image + 1]
    noise = seeded_noise(latent.shape[1:], context.seed, context.image_ids[image], "", draw)[None]
    alpha = float(context.generator.alphas_cumprod[t])
    noisy = alpha**0.5 * latent + (1 - alpha) ** 0.5 * noise
    with torch.no_grad():
        output = context.generator.denoise(noisy, t, context.generator.embed([prompt]))
    return (noise - output).square().mean(1)[0]


def test_passes_are_explicit_differences_of_two_prompts(scene: SceneMaker) -> None:
    context = scene(masks_per_pass=3)
    context.generator.rows = 0  # type: ignore[attr-defined]
    found = FEW.passes(context)
    # Two images, four masks, two timesteps, two draws.
    assert context.generator.rows == (2 + 4) * 4  # type: ignore[attr-defined]
    assert found.shape == (4, 4, 16, 16)
    whole = "A photo of dog and cat and zebra disc"
    prompts = {
        0: (0, whole, "A photo of cat and zebra disc"),
        1: (0, whole, "A photo of dog and zebra disc"),
        3: (1, "A photo of potted plant", ""),
    }
    for mask, (image, with_class, without) in prompts.items():
        for number, (t, draw) in enumerate([(200, 0), (200, 1), (400, 2), (400, 3)]):
            expected = explicit_error(context, image, without, t, draw)
            expected = expected - explicit_error(context, image, with_class, t, draw)
            torch.testing.assert_close(found[mask, number], expected, rtol=1e-3, atol=1e-5)


def test_passes_do_not_depend_on_the_batch(scene: SceneMaker) -> None:
    together, apart = FEW.passes(scene(masks_per_pass=2)), FEW.passes(scene((0, 1, 2)))
    # Differences of large errors, whose sums another batch size rounds otherwise.
    torch.testing.assert_close(together[:3], apart, rtol=1e-3, atol=2e-2 * float(apart.std()))
    assert (together[0] - together[1]).abs().max() > apart.std()


def planted(context: RefinementContext, truth: Tensor, noise: float) -> Tensor:
    """Evidence that is positive inside of known masks, under noise."""
    numbers = torch.Generator().manual_seed(3)
    inside = functional.adaptive_avg_pool2d(truth, (16, 16))[:, None]
    return inside + noise * torch.randn(len(truth), 6, 16, 16, generator=numbers)


def test_shares_are_those_of_the_formula(scene: SceneMaker, soft_masks: Tensor) -> None:
    context = scene()
    judge = ClassEvidence(radius=0, upsampling="bilinear")
    passes = planted(context, (soft_masks > 0.5).float(), 1.0)
    empty, full = torch.zeros_like(soft_masks), torch.ones_like(soft_masks)
    hard = (soft_masks > 0.6).float()
    found = judge.shares([hard, empty, full], context, passes)
    assert found.shares.shape == (3, 4, 6)
    fine = functional.interpolate(passes.mean(1)[:, None], (64, 64), mode="bilinear")[:, 0]
    for mask in range(4):
        inside = hard[mask] > 0
        expected = fine[mask][inside].sum() / inside.sum().sqrt()
        expected = expected / fine[mask].clamp_min(0).norm()
        torch.testing.assert_close(found.shares[0, mask].mean(), expected)
    assert (found.shares[1] == 0).all()
    difference = found.difference(1)
    torch.testing.assert_close(difference, -found.shares.mean(-1))
    spread = found.shares[0].std(-1) / 6**0.5
    torch.testing.assert_close(found.standard_error(1)[0], spread)
    assert ExplainedShares(found.shares[..., :1]).standard_error().isnan().all()


@pytest.mark.parametrize("seed", range(12))
def test_no_mask_explains_more_than_everything(scene: SceneMaker, seed: int) -> None:
    context = scene((3,))
    numbers = torch.Generator().manual_seed(seed)
    evidence = torch.randn(1, 3, 64, 64, generator=numbers)
    judge = ClassEvidence(radius=0, upsampling="bilinear")
    mask = (torch.rand(1, 64, 64, generator=numbers) > 0.1 + 0.07 * seed).float()
    positive = (evidence.mean(1) > 0).float()
    assert judge.shares([mask, positive], context, evidence).shares.mean(-1).max() <= 1 + 1e-5
    # Even evidence that a mask holds alone is explained to the full.
    even = positive[:, None].expand(-1, 3, -1, -1)
    share = judge.shares([positive], context, even).shares.mean()
    assert share.item() == pytest.approx(1.0, abs=1e-5)


def test_the_true_mask_wins_under_noise(scene: SceneMaker, soft_masks: Tensor) -> None:
    context = scene()
    truth = (soft_masks > 0.5).float()
    passes = planted(context, truth, 0.3)
    larger = functional.max_pool2d(truth, 15, 1, 7)
    smaller = 1 - functional.max_pool2d(1 - truth, 9, 1, 4)
    moved = truth.roll(12, 2)
    found = ClassEvidence(radius=0, upsampling="bilinear").shares(
        [truth, larger, smaller, moved], context, passes
    )
    assert (found.difference()[1:] > 0).all()


def test_word_map_is_added_at_its_weight(scene: SceneMaker, soft_masks: Tensor) -> None:
    context = scene()
    plain = ClassEvidence(timesteps=(300,), draws=1, radius=0, upsampling="bilinear")
    weighed = ClassEvidence(
        timesteps=(300,), draws=1, radius=0, upsampling="bilinear", word_weight=2.0, word_draws=1
    )
    passes = plain.passes(context)
    words = Grounding(1.0, timestep=20, draws=1, upsampling="joint_bilateral", edge_epsilon=3e-3)(
        torch.zeros_like(soft_masks), context
    )
    fine = functional.interpolate(passes[:, :1].mean(1)[:, None], (64, 64), mode="bilinear")[:, 0]
    expected = fine / fine.square().mean((1, 2), keepdim=True).sqrt() + 2 * words
    hard = (soft_masks > 0.5).float()
    share = (hard * expected).sum((1, 2)) / hard.sum((1, 2)).sqrt()
    share = share / expected.clamp_min(0).flatten(1).norm(dim=1)
    found = weighed.shares([hard], context, passes).shares[0, :, 0]
    torch.testing.assert_close(found, share, rtol=1e-4, atol=1e-5)


def test_choosing_by_evidence(scene: SceneMaker, soft_masks: Tensor) -> None:
    context, seen = scene(), list[RefinementState]()
    step = ChooseByLikelihood([[Blur(6.0)], [Blur(12.0)]], evidence=FEW)
    refined = refine(soft_masks, context, [step], seen.append)
    candidates = [soft_masks, Blur(6.0)(soft_masks, context), Blur(12.0)(soft_masks, context)]
    shares = FEW.shares([(each >= 0.5).float() for each in candidates], judging(context))
    best = shares.shares.mean(-1).argmax(0)
    for mask, winner in enumerate(best.tolist()):
        assert torch.equal(refined[mask], candidates[winner][mask])
    assert torch.equal(seen[0].artifacts["chosen"], best)
    torch.testing.assert_close(seen[0].artifacts["likelihood"], shares.difference().T)
    picked = shares.shares.mean(-1)[best, torch.arange(4)]
    torch.testing.assert_close(context.kept["score"], picked)
    weights = context.kept["pixel_weights"]
    assert weights.shape == soft_masks.shape
    assert 0 <= weights.min() <= weights.max() <= 1
    stays = ChooseByLikelihood([[Blur(6.0)]], evidence=FEW, margin=1e6)
    assert torch.equal(stays(soft_masks, scene()), soft_masks)


def test_pixels_weigh_how_surely_the_name_is_heard_inside_the_mask(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    context = scene()
    chosen = ChooseByLikelihood([[Blur(6.0)]], evidence=FEW)(soft_masks, context)
    inside = functional.avg_pool2d((chosen >= 0.5).float()[:, None], 4)
    gain = inside * FEW.passes(judging(context))
    gain = functional.avg_pool2d(gain, 3, 1, 1, count_include_pad=False)
    normal = torch.distributions.Normal(0.0, 1.0)
    error = gain.std(1).clamp_min(1e-30) / 4**0.5
    sure = normal.cdf(gain.mean(1) / error)
    expected = functional.interpolate(sure[:, None], (64, 64), mode="bilinear")[:, 0]
    # Outside, where nothing is claimed, nothing is known.
    outside = functional.max_pool2d((chosen >= 0.5).float(), 33, 1, 16) == 0
    found = context.kept["pixel_weights"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert (found[outside] == 0.5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws is 0"),
        ({"timesteps": ()}, "timesteps"),
        ({"radius": -1}, "radius is -1"),
        ({"word_weight": -1.0}, "word_weight is -1"),
        ({"edge_radius": 0}, "edge_radius is 0"),
    ],
)
def test_values_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassEvidence(**options)


def test_a_margin_needs_two_passes() -> None:
    single = ClassEvidence(timesteps=(300,), draws=1)
    with pytest.raises(ValueError, match=r"margin is 1.0 standard errors over 1"):
        ChooseByLikelihood([], margin=1.0, evidence=single)
