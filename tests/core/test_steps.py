"""Update steps on a real tiny model: caching, batching, controls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from injections import given_to_the_unet, same_but_tensors
from torch import Tensor
from torch.nn import functional

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.core.context import RefinementContext, resize_features
from g4seg_pl.core.diffusion import predict_clean
from g4seg_pl.core.generation import (
    denoise,
    groups_per_image,
    noised,
    rows_per_class,
    rows_per_image,
)
from g4seg_pl.core.injection import Injection
from g4seg_pl.core.refine import RefinementState, refine
from g4seg_pl.core.steps import Blur, Correspondence

CLASSES = ("dog", "cat", "zebra disc", "potted plant")
OWNER = (0, 0, 0, 2)
ContextMaker = Callable[..., RefinementContext]


class CountingGenerator(StableDiffusion):
    """The real model, with its calls counted."""

    calls: dict[str, int]

    def encode(self, images: Tensor) -> Tensor:
        self.calls["encode"] += len(images)
        return super().encode(images)

    def embed(self, prompts: Any) -> Tensor:
        self.calls["embed"] += len(prompts)
        return super().embed(prompts)

    def denoise(self, noisy: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls["denoise"] += len(noisy)
        self.calls["largest"] = max(self.calls["largest"], len(noisy))
        return super().denoise(noisy, *args, **kwargs)


class PooledPixels:
    """Features without weights: patches of pixels."""

    images = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return functional.pixel_unshuffle(images, 8)


@pytest.fixture(scope="module")
def generator(sd1_folder: Path) -> CountingGenerator:
    return CountingGenerator.from_pretrained(str(sd1_folder))


@pytest.fixture
def make_context(generator: CountingGenerator) -> ContextMaker:
    generator.calls = dict.fromkeys(("encode", "embed", "denoise", "largest"), 0)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def make(masks: tuple[int, ...] = (0, 1, 2, 3), **options: Any) -> RefinementContext:
        """Return a context of the given masks only; images that have none are left out."""
        kept = sorted({OWNER[mask] for mask in masks})
        return RefinementContext(
            images=images[kept],
            image_ids=tuple(f"image{index}" for index in kept),
            class_names=tuple(CLASSES[mask] for mask in masks),
            owner=torch.tensor([kept.index(OWNER[mask]) for mask in masks]),
            generator=generator,
            features=PooledPixels(),
            **options,
        )

    return make


@pytest.fixture
def foreground() -> Tensor:
    coarse = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return functional.interpolate(coarse, (64, 64), mode="bilinear")[:, 0]


STEPS = [
    Correspondence(),
    Correspondence(matching="aligned", confidence_range=None),
    Correspondence(matching="self", match_size=6),
    Correspondence(all_classes_at_once=True, confidence_range=None, carry="values"),
    Correspondence(
        injection_rule="dense_diffusion",
        injection_weight=1.0,
        noise_per="image",
        guidance_scale=3.0,
    ),
    Correspondence(binarise_at=None, mask_resize="nearest", inject_cross_attention=False),
    Correspondence(injection_weight=0.0),
    Blur(),
]


@pytest.mark.parametrize("step", STEPS)
def test_every_step_changes_masks_and_keeps_them_in_range(
    step: Any, make_context: ContextMaker, foreground: Tensor
) -> None:
    refined = refine(foreground, make_context(), [step])
    assert refined.shape == foreground.shape
    assert refined.min() >= 0
    assert refined.max() <= 1
    assert not torch.equal(refined, foreground)


@pytest.mark.parametrize("matching", ["generated_to_image", "aligned", "self"])
def test_beta_one_returns_the_seed_exactly(
    matching: Any, make_context: ContextMaker, foreground: Tensor
) -> None:
    refined = refine(foreground, make_context(), [Correspondence(beta=1.0, matching=matching)])
    assert torch.equal(refined, foreground)


@pytest.mark.parametrize("step", STEPS[:6])
def test_a_mask_does_not_depend_on_the_batch_it_is_in(
    step: Any, make_context: ContextMaker, foreground: Tensor
) -> None:
    together = refine(foreground, make_context(), [step])
    in_small_parts = refine(foreground, make_context(masks_per_pass=1), [step])
    torch.testing.assert_close(in_small_parts, together, rtol=0, atol=1e-4)
    order = (3, 2, 1, 0) if not getattr(step, "all_classes_at_once", False) else (3, 0, 1, 2)
    reordered = refine(foreground[list(order)], make_context(order), [step])
    torch.testing.assert_close(reordered, together[list(order)], rtol=0, atol=1e-4)
    alone = refine(foreground[3:], make_context((3,)), [step])
    torch.testing.assert_close(alone, together[3:], rtol=0, atol=1e-4)


def test_what_depends_on_an_image_or_prompt_alone_is_computed_once(
    make_context: ContextMaker, foreground: Tensor, generator: CountingGenerator
) -> None:
    context = make_context(masks_per_pass=3)
    refine(foreground, context, [Correspondence(), Correspondence(timestep=200)])
    # Two steps of four masks: one pass each, the images and prompts only once.
    expected = {"encode": 2, "embed": 4, "denoise": 8, "largest": 3}
    assert generator.calls == expected
    assert context.features.images == 2 + 8
    following = make_context(prompt_embeddings=context.prompt_embeddings)
    refine(foreground, following, [Correspondence()])
    assert generator.calls["embed"] == 4


def test_prompts_of_many_sets_of_classes_do_not_pile_up(
    make_context: ContextMaker, generator: CountingGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("g4seg_pl.core.context._KEPT_PROMPTS", 3)
    context = make_context()
    for index in range(6):
        context.embed(("a dog", f"a photo of {index} cats"))
    assert list(context.prompt_embeddings) == ["a photo of 4 cats", "a dog", "a photo of 5 cats"]
    assert generator.calls["embed"] == 7
    assert len(context.embed(tuple("abcd"))) == 4
    assert len(context.prompt_embeddings) == 3


def test_embeddings_follow_the_models_to_another_device(make_context: ContextMaker) -> None:
    context = make_context()
    context.embed(("a dog",))
    moved = make_context(prompt_embeddings=context.prompt_embeddings)
    moved.images = moved.images.to("meta")
    assert moved.embed(("a dog", "a dog")).device.type == "meta"


def test_guidance_costs_a_second_pass_without_injection(
    make_context: ContextMaker, foreground: Tensor, generator: CountingGenerator
) -> None:
    context = make_context()
    rows = rows_per_class(foreground, context)
    noisy, _ = noised(rows, context, 400)
    injection = Injection(rows.foreground, rows.tokens, 10.0)
    with torch.no_grad():
        guided = denoise(rows, context, noisy, 400, injection, 7.5)
        assert generator.calls["denoise"] == 8
        conditional = generator.denoise(noisy, 400, context.embed(rows.prompts), injection)
        plain = generator.denoise(noisy, 400, context.embed(("",) * 4))
    torch.testing.assert_close(guided, plain + 7.5 * (conditional - plain))


def test_generation_is_decoded_from_the_clean_latent(
    make_context: ContextMaker, foreground: Tensor, generator: CountingGenerator
) -> None:
    context, seen = make_context(), []
    refine(foreground, context, [Correspondence(injection_weight=0.0)], seen.append)
    with torch.no_grad():
        rows = rows_per_class(foreground, context)
        noisy, _ = noised(rows, context, 400)
        output = generator.unet(noisy, 400, context.embed(rows.prompts))[0]
        clean = predict_clean(noisy, output, generator.alphas_cumprod, 400, "epsilon")
        expected = generator.decode(clean)
    torch.testing.assert_close(seen[0].artifacts["generated"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("carry", ["difference", "values"])
def test_the_update_is_equations_8_and_9_on_what_was_generated(
    carry: Any, make_context: ContextMaker, foreground: Tensor
) -> None:
    context, seen = make_context(), []
    step = Correspondence(beta=0.4, confidence_range=(0.3, 0.7), carry=carry)
    refined = refine(foreground, context, [step], seen.append)
    artifacts, patches = seen[0].artifacts, PooledPixels()
    generated, images = (
        functional.normalize(patches(pictures), dim=1).flatten(2)
        for pictures in (artifacts["generated"], context.images[context.owner])
    )
    # A row is a place of the generated image: it looks for its partner in the image.
    cosines = generated.mT @ images
    partners = artifacts["neighbours"].flatten(1)
    best = cosines.gather(2, partners[..., None])[..., 0]
    torch.testing.assert_close(best, cosines.amax(2), rtol=0, atol=1e-6)
    coarse = functional.adaptive_avg_pool2d(foreground, (8, 8))
    values = torch.stack([m.flatten()[p] for m, p in zip(coarse, partners, strict=True)])
    target = values.view(4, 8, 8)
    old = coarse if carry == "difference" else torch.zeros_like(coarse)
    brought = functional.interpolate((target - old)[:, None], (64, 64), mode="bilinear")[:, 0]
    kept = foreground if carry == "difference" else 0.4 * foreground
    sure = (foreground < 0.3) | (foreground > 0.7)
    expected = torch.where(sure, foreground, kept + 0.6 * brought).clamp(0, 1)
    torch.testing.assert_close(refined, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cross", [True, False])
def test_every_field_about_injection_reaches_the_generator(
    cross: bool,
    make_context: ContextMaker,
    foreground: Tensor,
    generator: CountingGenerator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = make_context()
    seen = given_to_the_unet(generator, monkeypatch)
    Correspondence(
        injection_weight=0.75,
        injection_rule="dense_diffusion",
        inject_cross_attention=cross,
        inject_self_attention=not cross,
        binarise_at=0.3,
        mask_resize="nearest",
    )(foreground, context)
    ((_, injection),) = seen
    assert torch.equal(injection.foreground, foreground[:, None])
    for name, marked in zip(CLASSES, injection.tokens, strict=True):
        assert torch.equal(marked.bool(), context.prompt((name,))[1])
    assert same_but_tensors(
        injection,
        0.75,
        cross_attention=cross,
        self_attention=not cross,
        rule="dense_diffusion",
        binarise_at=0.3,
        resize="nearest",
        classes=tuple((name,) for name in CLASSES),
    )


@pytest.mark.parametrize(("noise_per", "names"), [("class", CLASSES), ("image", ("",) * 4)])
def test_classes_have_their_own_noise_or_share_their_images(
    noise_per: Any,
    names: tuple[str, ...],
    make_context: ContextMaker,
    foreground: Tensor,
    generator: CountingGenerator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = make_context()
    seen = given_to_the_unet(generator, monkeypatch)
    Correspondence(noise_per=noise_per)(foreground, context)
    ((noisy, _),) = seen
    noise = context.noise(tuple(f"image{index}" for index in OWNER), names)
    signal = generator.alphas_cumprod[400]
    expected = signal.sqrt() * context.latents[context.owner] + (1 - signal).sqrt() * noise
    torch.testing.assert_close(noisy, expected, rtol=0, atol=1e-5)


def test_all_classes_of_an_image_share_one_pass_and_one_picture(
    make_context: ContextMaker, foreground: Tensor, generator: CountingGenerator
) -> None:
    seen: list[RefinementState] = []
    context = make_context()
    refine(foreground, context, [Correspondence(all_classes_at_once=True)], seen.append)
    assert generator.calls["denoise"] == 2
    generated = seen[0].artifacts["generated"]
    assert generated.shape == (4, 3, 64, 64)
    assert torch.equal(generated[0], generated[2])
    rows = rows_per_image(foreground, context)
    assert rows.prompts[0] == "A photo of dog and cat and zebra disc"
    assert rows.tokens[0].sum(-1).tolist() == [1, 1, 2]
    assert rows.tokens[1].sum(-1).tolist() == [2, 0, 0]
    assert not rows.foreground[1, 1:].any()


def test_masks_come_back_in_their_order_where_images_alternate(
    make_context: ContextMaker, foreground: Tensor
) -> None:
    context = make_context((0, 3, 1))
    assert context.owner.tolist() == [0, 1, 0]
    groups = groups_per_image(context)
    masks = foreground[[0, 3, 1]]
    together = groups.gather(masks)
    assert torch.equal(together[0], masks[[0, 2]])
    assert torch.equal(together[1, 0], masks[1])
    assert torch.equal(groups.scatter(together), masks)


def test_a_name_within_an_earlier_name_is_marked_at_its_own_place(
    make_context: ContextMaker,
) -> None:
    _, tokens = make_context().prompt(("zebra disc", "disc", "dog"))
    # <start> A photo of zebra disc and disc and dog
    assert tokens[0].nonzero().flatten().tolist() == [4, 5]
    assert tokens[1].nonzero().flatten().tolist() == [7]
    assert tokens[2].nonzero().flatten().tolist() == [9]


def test_what_is_cached_in_inference_mode_serves_a_gradient_later(
    make_context: ContextMaker, foreground: Tensor, generator: CountingGenerator
) -> None:
    context = make_context()
    with torch.inference_mode():
        refine(foreground.clone(), context, [Correspondence()])
    soft = foreground.clone().requires_grad_()
    rows = rows_per_class(soft, context)
    noisy, noise = noised(rows, context, 400)
    injection = Injection(rows.foreground, rows.tokens, 10.0, binarise_at=None)
    output = denoise(rows, context, noisy, 400, injection)
    (gradient,) = torch.autograd.grad((output - noise).square().mean(), soft)
    assert gradient.abs().max() > 0


def test_non_square_images_work(generator: CountingGenerator) -> None:
    generator.calls = dict.fromkeys(("encode", "embed", "denoise", "largest"), 0)
    images, masks = torch.rand(1, 3, 40, 72) * 2 - 1, torch.rand(2, 40, 72)
    context = RefinementContext(
        images, ("a",), ("dog", "cat"), torch.tensor([0, 0]), generator, PooledPixels()
    )
    steps = [Correspondence(), Correspondence(match_size=7, all_classes_at_once=True)]
    assert refine(masks, context, steps).shape == (2, 40, 72)
    assert resize_features(context.reference_features, 10).shape[2:] == (10, 18)


def test_blur_is_scipys_gaussian_filter(make_context: ContextMaker, foreground: Tensor) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    found = Blur(sigma=3.0)(foreground, make_context())
    for mask, blurred in zip(foreground, found, strict=True):
        expected = ndimage.gaussian_filter(mask.numpy(), 3.0, mode="nearest")
        torch.testing.assert_close(blurred, torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_the_callback_sees_every_step(make_context: ContextMaker, foreground: Tensor) -> None:
    seen: list[RefinementState] = []
    steps = [Correspondence(), Blur(1.0)]
    refined = refine(foreground, make_context(), steps, seen.append)
    assert [(state.index, state.step) for state in seen] == list(enumerate(steps))
    assert seen[0].before is foreground
    assert seen[1].before is seen[0].after
    assert seen[1].after is refined
    assert dict(seen[1].artifacts) == {}


def test_no_masks_and_no_steps_change_nothing(
    make_context: ContextMaker, foreground: Tensor, generator: CountingGenerator
) -> None:
    assert refine(foreground, make_context(), []) is foreground
    empty = RefinementContext(
        torch.zeros(1, 3, 64, 64), ("a",), (), torch.zeros(0, dtype=torch.long), generator
    )
    assert refine(foreground[:0], empty, [Correspondence()]).shape == (0, 64, 64)


def test_a_step_that_breaks_a_mask_is_named(make_context: ContextMaker, foreground: Tensor) -> None:
    def breaking(masks: Tensor, context: RefinementContext) -> Tensor:
        return masks / 0 - masks / 0

    with pytest.raises(FloatingPointError, match=r"step 0 .*breaking.* not finite"):
        refine(foreground, make_context(), [breaking])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, "beta is 1.5"),
        ({"injection_weight": -1.0}, "injection_weight is -1.0"),
        ({"injection_rule": "dense_diffusion"}, "rule's λ; give 0"),
        ({"binarise_at": 2.0}, "binarise_at is 2.0"),
        ({"match_size": 0}, "match_size is 0"),
        ({"timestep": -5}, "timestep is -5"),
        ({"confidence_range": (0.6, 0.2)}, r"confidence_range is \(0.6, 0.2\)"),
    ],
)
def test_values_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Correspondence(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_template": "A photo"}, "prompt_template is 'A photo'"),
        ({"masks_per_pass": 0}, "masks_per_pass is 0"),
    ],
)
def test_contexts_without_meaning_are_refused(
    options: dict[str, Any], message: str, make_context: ContextMaker
) -> None:
    with pytest.raises(ValueError, match=message):
        make_context(**options)


def test_masks_and_names_must_agree(make_context: ContextMaker, foreground: Tensor) -> None:
    with pytest.raises(ValueError, match="3 masks for 4 class_names"):
        refine(foreground[:3], make_context(), [Correspondence()])


@pytest.mark.parametrize("matching", ["generated_to_image", "aligned", "self"])
def test_images_whose_features_are_not_finite_are_named(
    make_context: ContextMaker, foreground: Tensor, matching: Any
) -> None:
    class Overflowing(PooledPixels):
        def __call__(self, images: Tensor) -> Tensor:
            features = super().__call__(images)
            features[-1, 0] = float("inf")
            return features

    context = make_context()
    context.features = Overflowing()
    with pytest.raises(FloatingPointError, match="features of image image2 are not finite"):
        refine(foreground, context, [Correspondence(matching=matching)])


def test_a_step_that_compares_images_asks_for_features(
    make_context: ContextMaker, foreground: Tensor
) -> None:
    context = make_context()
    context.features = None
    with pytest.raises(ValueError, match="set `features`"):
        refine(foreground, context, [Correspondence()])
