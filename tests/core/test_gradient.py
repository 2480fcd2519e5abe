"""The gradient against finite differences, its bookkeeping, and the rules that follow it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import given_to_the_unet, same_but_tensors
from torch import Tensor
from torch.nn import functional

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.core.context import RefinementContext
from g4seg_pl.core.descent import (
    AdamMoments,
    Parametrisation,
    gradient_of,
    normalised_direction,
)
from g4seg_pl.core.diffusion import predict_clean
from g4seg_pl.core.generation import Rows, rows_per_class
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.guided import bring_up
from g4seg_pl.core.loss import DenoisingLoss
from g4seg_pl.core.refine import RefinementState, refine
from g4seg_pl.core.threshold import centre_threshold, restore_threshold

SceneMaker = Callable[..., RefinementContext]

STEPS = [
    Gradient(iterations=2),
    Gradient(rule="adam", loss="velocity", draws=2, iterations=2),
    Gradient(rule="mirror", prompt="class_minus_empty", iterations=2, threshold=0.3),
    Gradient(classes_compete=True, timesteps=(400, 600), iterations=2),
    Gradient(classes_compete=True, inject_background=True, rule="mirror", iterations=2),
    Gradient(classes_compete=True, rule="adam", control_variate="flat", iterations=2),
    Gradient(control_variate="previous", relative_loss=False, loss="clean", iterations=2),
    Gradient(loss="image", prompt="empty", noise_per="image", centre=False, iterations=1),
    Gradient(trust_region=0.02, inject_cross_attention=False, iterations=1),
    Gradient(upsampling="guided", mask_resize="nearest", iterations=1),
]


@pytest.fixture(scope="session")
def exact_generator(sd2_folder: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(str(sd2_folder), torch.float64)


def _exact(context: RefinementContext) -> RefinementContext:
    """Return a context all of whose numbers are double."""
    context.images = context.images.double()
    return context.variant(latents=context.latents.double())


def _at_start(
    step: Gradient, masks: Tensor, context: RefinementContext
) -> tuple[Tensor, Parametrisation, Rows]:
    groups, rows = step.rows(masks, context)
    space = step.space(groups, masks)
    coarse = functional.adaptive_avg_pool2d(masks, (16, 16))
    return space.leaf(groups.gather(coarse)), space, rows


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        ("epsilon", "linear"),
        ("velocity", "linear"),
        ("image", "linear"),
        ("epsilon", "logit"),
        ("clean", "softmax"),
    ],
)
def test_gradient_is_that_of_finite_differences(
    loss: Any, kind: Any, scene: SceneMaker, soft_masks: Tensor, exact_generator: StableDiffusion
) -> None:
    context, masks = _exact(scene((0, 1), generator=exact_generator)), soft_masks[:2].double()
    step = Gradient(loss=loss, timesteps=(300, 600), classes_compete=kind == "softmax")
    step = replace(step, rule="adam") if kind == "logit" else step
    leaf, space, rows = _at_start(step, masks, context)
    assert space.kind == kind
    gradient = step.gradient(leaf, space, rows, context)

    def objective(place: Tensor) -> Tensor:
        measure = DenoisingLoss(10.0, loss, binarise_at=None)
        told = replace(rows, foreground=space.classes(space.masks(place)))
        losses = [measure.per_row(told, context, t, 0).log().sum() for t in (300, 600)]
        return torch.stack(losses).mean()

    numbers = torch.Generator().manual_seed(5)
    for _ in range(2):
        way = torch.randn(leaf.shape, generator=numbers, dtype=torch.float64)
        with torch.no_grad():
            slope = (objective(leaf + 1e-4 * way) - objective(leaf - 1e-4 * way)) / 2e-4
        torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-4, atol=0)


def test_what_is_taken_off_meets_the_same_noise(
    scene: SceneMaker, soft_masks: Tensor, exact_generator: StableDiffusion
) -> None:
    context, masks = _exact(scene((0, 1), generator=exact_generator)), soft_masks[:2].double()
    step = Gradient(control_variate="empty", prompt="class_minus_empty")
    leaf, space, rows = _at_start(step, masks, context)
    parts = [
        replace(step, control_variate="none", prompt=prompt).gradient(place, space, rows, context)
        for prompt in ("class", "empty")
        for place in (leaf, torch.zeros_like(leaf))
    ]
    expected = parts[0] - parts[1] - parts[2] + parts[3]
    found = step.gradient(leaf, space, rows, context)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


def test_loss_kinds_are_what_the_model_would_have_to_predict(
    scene: SceneMaker, soft_masks: Tensor, exact_generator: StableDiffusion
) -> None:
    context = _exact(scene(generator=exact_generator))
    rows, t = rows_per_class(soft_masks.double(), context), 300
    noise = context.noise(tuple(context.image_ids[i] for i in rows.owner), rows.names)
    clean = context.latents[list(rows.owner)]
    signal = float(exact_generator.alphas_cumprod[t]) ** 0.5
    spread = (1 - signal**2) ** 0.5
    noisy = signal * clean + spread * noise
    with torch.no_grad():
        velocity = exact_generator.denoise(noisy, t, context.embed(rows.prompts))
        found = {
            kind: DenoisingLoss(0.0, kind).per_row(rows, context, t, 0)
            for kind in ("epsilon", "clean", "velocity", "image")
        }
        guess = predict_clean(noisy, velocity, exact_generator.alphas_cumprod, t, "v_prediction")
        pictures = exact_generator.decode(guess)
    expected = {
        "epsilon": noise - (spread * noisy + signal * velocity),
        "clean": clean - guess,
        "velocity": signal * noise - spread * clean - velocity,
        "image": pictures - context.images[list(rows.owner)],
    }
    for kind, error in expected.items():
        mean = error.square().flatten(1).mean(1)
        torch.testing.assert_close(found[kind], mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", STEPS)
def test_a_mask_depends_on_its_own_image_alone(
    step: Any, scene: SceneMaker, soft_masks: Tensor
) -> None:
    together = refine(soft_masks, scene(), [step])
    assert together.shape == soft_masks.shape
    assert together.min() >= 0
    assert together.max() <= 1
    assert not torch.equal(together, soft_masks)
    in_small_parts = refine(soft_masks, scene(masks_per_pass=1), [step])
    alone = refine(soft_masks[3:], scene((3,)), [step])
    order = [3, 0, 1, 2] if step.classes_compete else [3, 2, 0, 1]
    reordered = refine(soft_masks[order], scene(tuple(order)), [step])
    # A cell's small gradient over its own size, as Adam takes it, doubles rounding at zero.
    allowed = {"rtol": 0, "atol": 2e-2 if step.rule == "adam" else 2e-3}
    torch.testing.assert_close(in_small_parts, together, **allowed)
    torch.testing.assert_close(alone, together[3:], **allowed)
    torch.testing.assert_close(reordered, together[order], **allowed)
    assert (in_small_parts - together).abs().mean() < 1e-4


def test_it_works_in_inference_mode_and_leaves_nothing_behind(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    expected = Gradient(iterations=2)(soft_masks, scene())
    with torch.inference_mode():
        context = scene()
        context.images = context.images.clone()
        context.owner = context.owner.clone()
        found = Gradient(iterations=2)(soft_masks.clone(), context)
        image = Gradient(iterations=1, loss="image")(soft_masks.clone(), context)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert torch.isfinite(image).all()
    parameters = list(context.generator.parameters())
    assert all(p.grad is None and not p.requires_grad for p in parameters)
    assert Gradient.needs_gradient


def test_checkpointing_changes_nothing_but_memory(scene: SceneMaker, soft_masks: Tensor) -> None:
    context = scene()
    unet = context.generator.unet
    processors = {name: type(p) for name, p in unet.attn_processors.items()}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel()
        return tensor

    found = []
    for checkpointing in (False, True):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step = Gradient(checkpointing=checkpointing, classes_compete=True)
            found.append(step.gradient(*_at_start(step, soft_masks, context), context))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-9)
    assert kept[1] < 0.6 * kept[0], kept
    assert not unet.is_gradient_checkpointing
    assert {name: type(p) for name, p in unet.attn_processors.items()} == processors


def test_cost_is_one_pass_a_row_timestep_draw_and_term(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    costs = [
        (Gradient(iterations=3), 3 * 4),
        (Gradient(iterations=1, draws=2, timesteps=(300, 500)), 4 * 4),
        (Gradient(iterations=1, control_variate="flat"), 2 * 4),
        (Gradient(iterations=3, control_variate="previous"), (1 + 2 + 2) * 4),
        (Gradient(iterations=2, classes_compete=True), 2 * 2),
    ]
    for step, rows in costs:
        context = scene()
        before = context.generator.rows
        step(soft_masks, context)
        assert context.generator.rows - before == rows


def test_a_step_follows_the_printed_rule(scene: SceneMaker, soft_masks: Tensor) -> None:
    seen: list[RefinementState] = []
    refined = refine(soft_masks, scene(), [Gradient(iterations=1, step_size=0.1)], seen.append)
    gradient = seen[0].artifacts["gradient"]
    assert gradient.shape == (4, 16, 16)
    centred = gradient - gradient.mean((1, 2), keepdim=True)
    unit = (centred / centred.flatten(1).std(1, correction=0)[:, None, None]).clamp(-3, 3)
    fine = functional.interpolate(unit[:, None], (64, 64), mode="bilinear")[:, 0]
    expected = (soft_masks - 0.1 * fine).clamp(0, 1)
    torch.testing.assert_close(refined, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("upsampling", ["bilinear", "guided", "joint_bilateral"])
def test_a_gradient_may_keep_its_mean_and_come_up_along_edges(
    upsampling: Any, scene: SceneMaker, soft_masks: Tensor
) -> None:
    context, seen = scene(), []
    options = {"upsampling": upsampling, "edge_radius": 3, "edge_epsilon": 0.01}
    step = Gradient(iterations=1, step_size=0.1, centre=False, **options)
    refined = refine(soft_masks, context, [step], seen.append)
    gradient = seen[0].artifacts["gradient"]
    unit = (gradient / gradient.flatten(1).std(1, correction=0)[:, None, None]).clamp(-3, 3)
    fine = bring_up(unit, context.images[context.owner], upsampling, 3, 0.01)
    expected = (soft_masks - 0.1 * fine).clamp(0, 1)
    torch.testing.assert_close(refined, expected, rtol=0, atol=1e-5)


def test_the_previous_estimate_goes_on_with_what_the_mask_changed(
    scene: SceneMaker, soft_masks: Tensor, exact_generator: StableDiffusion
) -> None:
    context, masks = _exact(scene((0, 1), generator=exact_generator)), soft_masks[:2].double()
    step = Gradient(control_variate="previous", carry_over=0.3, iterations=2)
    seen: list[RefinementState] = []
    refine(masks, context, [step], seen.append)
    start, space, rows = _at_start(step, masks, context)
    later, _, _ = _at_start(step, replace(step, iterations=1)(masks, context), context)
    first = step.gradient(start, space, rows, context, 0)
    again, now = (step.gradient(place, space, rows, context, 1) for place in (start, later))
    # Both gradients of the second step meet its noise, so that their difference is the mask's.
    expected = now - 0.3 * again + 0.3 * first
    found = seen[0].artifacts["gradient"][:, None]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("cross", [True, False])
def test_every_field_about_injection_reaches_the_generator(
    cross: bool, scene: SceneMaker, soft_masks: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = scene()
    seen = given_to_the_unet(context.generator, monkeypatch)
    Gradient(
        iterations=1,
        injection_weight=7.0,
        inject_cross_attention=cross,
        inject_self_attention=not cross,
        mask_resize="nearest",
    )(soft_masks, context)
    ((_, injection),) = seen
    coarse = functional.adaptive_avg_pool2d(soft_masks, (16, 16))[:, None]
    torch.testing.assert_close(injection.foreground.detach(), coarse)
    assert same_but_tensors(
        injection,
        7.0,
        cross_attention=cross,
        self_attention=not cross,
        binarise_at=None,
        resize="nearest",
        classes=tuple((name,) for name in context.class_names),
    )


@pytest.mark.parametrize("background", [True, False])
def test_the_background_is_injected_as_a_class_without_word_if_asked(
    background: bool, scene: SceneMaker, soft_masks: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = scene()
    seen = given_to_the_unet(context.generator, monkeypatch)
    step = Gradient(classes_compete=True, inject_background=background, iterations=1)
    step(soft_masks, context)
    ((_, injection),) = seen
    shares, tokens = injection.foreground.detach(), injection.tokens
    assert shares.shape[1] == tokens.shape[1] == 3 + background
    # Three classes of one image and one of the other: with the background they fill every pixel.
    everything = torch.allclose(shares.sum(1), torch.ones(2, 16, 16))
    assert everything is background
    assert tokens[0, :3].any(-1).all()
    assert not tokens[:, 3:].any()


@pytest.mark.parametrize("noise_per", ["class", "image"])
def test_classes_have_their_own_noise_or_share_their_images(
    noise_per: Any, scene: SceneMaker, soft_masks: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = scene()
    seen = given_to_the_unet(context.generator, monkeypatch)
    Gradient(noise_per=noise_per, iterations=1)(soft_masks, context)
    ((noisy, _),) = seen
    names = context.class_names if noise_per == "class" else ("",) * 4
    noise = context.noise(tuple(context.image_ids[i] for i in context.owner.tolist()), names)
    signal = context.generator.alphas_cumprod[500]
    expected = signal.sqrt() * context.latents[context.owner] + (1 - signal).sqrt() * noise
    torch.testing.assert_close(noisy, expected, rtol=0, atol=1e-5)


def test_the_loss_falls(scene: SceneMaker, soft_masks: Tensor) -> None:
    measure = DenoisingLoss(10.0, binarise_at=None)
    for rule, step_size in (("normalised", 0.02), ("adam", 0.1), ("mirror", 0.1)):
        context = scene()
        step = Gradient(rule=rule, step_size=step_size, iterations=4, fresh_noise=False)
        refined = step(soft_masks, context)
        with torch.no_grad():
            before, after = (
                measure.per_row(rows_per_class(masks, context), context, 500, 0)
                for masks in (soft_masks, refined)
            )
        assert (after < before).all()


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_the_trust_region_holds(scene: SceneMaker, soft_masks: Tensor, threshold: float) -> None:
    step = Gradient(step_size=0.3, trust_region=0.05, threshold=threshold)
    change = (step(soft_masks, scene()) - soft_masks).abs()
    assert change.max() == pytest.approx(0.05, abs=1e-5)


def test_a_threshold_is_where_one_half_would_be(scene: SceneMaker, soft_masks: Tensor) -> None:
    step = Gradient(step_size=0.1)
    told = replace(step, threshold=0.3)(soft_masks, scene())
    centred = step(centre_threshold(soft_masks, 0.3), scene())
    torch.testing.assert_close(told, restore_threshold(centred, 0.3))
    assert not torch.allclose(told, step(soft_masks, scene()), atol=1e-3)


def test_the_same_noise_at_every_step_if_asked_for(scene: SceneMaker, soft_masks: Tensor) -> None:
    seen: list[int] = []
    context = scene((3,))
    original = context.noise

    def noise(ids: tuple[str, ...], names: tuple[str, ...], draw: int = 0) -> Tensor:
        seen.append(draw)
        return original(ids, names, draw)

    context.noise = noise  # type: ignore[method-assign]
    Gradient(iterations=2, draws=2)(soft_masks[3:], context)
    Gradient(iterations=2, draws=2, fresh_noise=False)(soft_masks[3:], context)
    assert seen == [0, 1, 2, 3, 0, 1, 0, 1]


def test_the_flat_control_variate_takes_off_what_no_mask_explains(
    scene: SceneMaker, soft_masks: Tensor
) -> None:
    context = scene()
    step = Gradient(control_variate="flat")
    flat, space, rows = _at_start(step, torch.full_like(soft_masks, 0.5), context)
    found = step.gradient(flat, space, rows, context)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["linear", "logit", "softmax"])
def test_parametrisations_return_the_mask(kind: Any) -> None:
    masks = torch.rand(2, 1, 4, 4) * 0.9 + 0.05
    space = Parametrisation(kind, torch.ones(2, 1, dtype=torch.bool))
    leaf = space.leaf(masks)
    torch.testing.assert_close(space.classes(space.masks(leaf)), masks)
    if kind == "softmax":
        several = Parametrisation(kind, torch.tensor([[True, True], [True, False]]))
        shares = several.masks(several.leaf(torch.rand(2, 2, 4, 4)))
        torch.testing.assert_close(shares.sum(1), torch.ones(2, 4, 4))
        assert not shares[1, 1].any()


def test_small_gradients_survive_a_network_in_float16() -> None:
    variable = torch.linspace(0.2, 0.8, 64 * 64).view(1, 1, 64, 64).requires_grad_()
    expected = 2e-4 * variable.detach() / variable.numel()

    def objective(number_format: torch.dtype) -> Tensor:
        # A layer's small part in the mean over a latent: 6e-9 to 2e-8, where float16 has 6e-8.
        passed = 1e-2 * variable.to(number_format)
        return passed.float().square().mean()

    found = gradient_of(objective(torch.float16), variable)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    (plain,) = torch.autograd.grad(objective(torch.float32), variable)
    assert torch.equal(gradient_of(objective(torch.float32), variable), plain)
    with pytest.raises(FloatingPointError, match="float16 model overflows"):
        gradient_of(1e30 * objective(torch.float16), variable)


def test_adam_is_pytorchs() -> None:
    numbers = torch.Generator().manual_seed(0)
    variable = torch.zeros(1, 1, 3, 3, requires_grad=True)
    reference = torch.optim.Adam([variable], lr=0.1, eps=0)
    moments, own = AdamMoments(), torch.zeros(1, 1, 3, 3)
    for _ in range(5):
        variable.grad = torch.randn(1, 1, 3, 3, generator=numbers)
        reference.step()
        own = own - 0.1 * moments.direction(variable.grad)
    torch.testing.assert_close(own, variable.detach())


@settings(max_examples=30)
@given(st.floats(-6, 6), st.floats(1e-3, 1e3), st.integers(0, 100))
def test_direction_ignores_shift_and_scale(shift: float, scale: float, seed: int) -> None:
    gradient = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(seed)).double()
    found = normalised_direction(gradient * scale + shift, 3.0)
    torch.testing.assert_close(found, normalised_direction(gradient, 3.0))
    assert not normalised_direction(torch.zeros(1, 1, 2, 2), 3.0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws is 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"injection_weight": 0.0}, "injection_weight is 0.0"),
        ({"timesteps": ()}, "timesteps is empty"),
        ({"trust_region": -0.1}, "trust_region is -0.1"),
        ({"trust_region": 0.0}, "trust_region is 0.0"),
        ({"carry_over": 2.0}, "carry_over is 2.0"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"inject_cross_attention": False, "inject_self_attention": False}, "nothing is injected"),
    ],
)
def test_values_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gradient(**options)
