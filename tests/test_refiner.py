"""The two-line object, end to end on tiny models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from g4seg_pl.backbones.controlnet import ControlNetInjection
from g4seg_pl.core.confidence import Averaged
from g4seg_pl.core.likelihood import ChooseByLikelihood
from g4seg_pl.core.steps import Blur, Correspondence
from g4seg_pl.features.open_clip import OpenClipFeatures
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.recipes import steps_of
from g4seg_pl.refiner import FINDINGS, G4SegRefiner, Refinement
from g4seg_pl.types import BadItemError, ConfigurationError, Sample, Seed

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (50, 70, 3), dtype=np.uint8)
MASK = RNG.random((50, 70)).astype(np.float32)


@pytest.fixture(scope="module")
def refiner(sd1_folder: Path) -> G4SegRefiner:
    return G4SegRefiner.from_pretrained(str(sd1_folder), recipe="paper", device="cpu")


@pytest.fixture(scope="module")
def refined(refiner: G4SegRefiner) -> np.ndarray:
    return refiner.refine(PIXELS, {"dog": MASK})["dog"]


def sample_of(name: str, height: int, width: int, classes: tuple[str, ...]) -> Sample:
    draw = torch.Generator().manual_seed(len(name) + height)
    image = torch.randint(0, 256, (3, height, width), generator=draw, dtype=torch.uint8)
    scores = torch.rand(len(classes), height, width, generator=draw)
    return Sample(name, image, Seed(tuple(range(1, len(classes) + 1)), scores), classes)


@pytest.mark.parametrize("folder", ["sd1_folder", "sd2_folder"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_lines_refine_a_mask(
    folder: str, dtype: Any, clip_folder: Path, request: pytest.FixtureRequest
) -> None:
    model = str(request.getfixturevalue(folder))
    features = OpenClipFeatures(str(clip_folder), image_size=64)
    refiner = G4SegRefiner.from_pretrained(model, features=features, dtype=dtype)
    found = refiner.refine(PIXELS, {"dog": MASK, "zebra disc": 1 - MASK})
    assert list(found) == ["dog", "zebra disc"]
    for mask in found.values():
        assert mask.shape == (50, 70)
        assert mask.min() >= 0
        assert mask.max() <= 1
    assert not np.array_equal(found["dog"], MASK)


def test_two_refiners_of_one_extractor_look_with_their_own_models(
    sd1_folder: Path, sd2_folder: Path, clip_folder: Path
) -> None:
    features = VAEFeatures()
    first = G4SegRefiner.from_pretrained(str(sd1_folder), features=features, device="cpu")
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    before = first.features(images)
    second = G4SegRefiner.from_pretrained(str(sd2_folder), features=features, device="cpu")
    assert torch.equal(first.features(images), before)
    other = second.features(images)
    assert other.shape != before.shape or not torch.equal(other, before)
    clip = OpenClipFeatures(str(clip_folder), image_size=64)
    one, two = (
        G4SegRefiner.from_pretrained(str(sd1_folder), features=clip, dtype=dtype, device="cpu")
        for dtype in ("float32", "bfloat16")
    )
    assert {weight.dtype for weight in one.features.parameters()} == {torch.float32}
    assert {weight.dtype for weight in two.features.parameters()} == {torch.bfloat16}
    assert not list(clip.parameters())


def test_only_uncertain_pixels_change_by_default(refined: np.ndarray) -> None:
    # At working size the mask is smoothed, so that a sure pixel may count as uncertain; but no
    # change exceeds what β leaves.
    change = np.abs(refined - MASK)
    assert 0 < change.max() <= 0.1 + 1e-6


def test_arrays_pictures_and_tensors_give_the_same(
    refiner: G4SegRefiner, refined: np.ndarray
) -> None:
    picture = refiner.refine(Image.fromarray(PIXELS), {"dog": Image.fromarray(MASK)})["dog"]
    assert picture.mode == "F"
    assert picture.size == (70, 50)
    np.testing.assert_array_equal(np.array(picture), refined)
    pixels = torch.from_numpy(PIXELS).permute(2, 0, 1)
    tensor = refiner.refine(pixels, {"dog": torch.from_numpy(MASK).double()})["dog"]
    assert tensor.dtype == torch.float64
    np.testing.assert_array_equal(tensor.numpy(), refined)


def test_classes_do_not_touch_each_other(refiner: G4SegRefiner, refined: np.ndarray) -> None:
    found = refiner.refine(PIXELS, {"cat": 1 - MASK, "dog": MASK})
    np.testing.assert_allclose(found["dog"], refined, atol=1e-5)


def test_the_result_does_not_depend_on_the_batch(refiner: G4SegRefiner) -> None:
    samples = [
        sample_of("a", 40, 60, ("dog", "cat")),
        sample_of("b", 30, 30, ()),
        sample_of("c", 64, 64, ("zebra disc",)),
        sample_of("d", 90, 33, ("dog", "cat", "car")),
    ]
    together = refiner.refine_samples(samples)
    assert [tuple(masks.shape) for masks in together] == [
        (2, 40, 60),
        (0, 30, 30),
        (1, 64, 64),
        (3, 90, 33),
    ]
    backwards = refiner.refine_samples(samples[::-1])[::-1]
    for sample, masks, reversed_masks in zip(samples, together, backwards, strict=True):
        alone = refiner.refine_samples([sample])[0]
        torch.testing.assert_close(alone, masks, rtol=0, atol=1e-5)
        torch.testing.assert_close(reversed_masks, masks, rtol=0, atol=1e-5)
        assert masks.dtype == torch.float32


def with_scores(sample: Sample, scores: torch.Tensor) -> Sample:
    return replace(sample, seed=replace(sample.seed, scores=scores))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda it: replace(it, image=it.image / 255), "a: image is torch.float32.* give uint8"),
        (lambda it: replace(it, image=it.image.permute(1, 2, 0)), "image .* shape .50, 70, 3."),
        (lambda it: with_scores(it, it.seed.scores.mT), "seed.scores has shape .2, 70, 50."),
        (lambda it: with_scores(it, it.seed.scores[0]), "seed.scores has shape .50, 70."),
        (lambda it: with_scores(it, it.seed.scores.mul(255).byte()), "go from 0 to 25"),
        (lambda it: with_scores(it, it.seed.scores - 0.1), "go from -0.0.* rescale"),
        (lambda it: with_scores(it, it.seed.scores.log().log()), "go from nan"),
        (lambda it: with_scores(it, it.seed.scores[:1]), "1 maps .* 2 seed.class_ids and 2"),
        (lambda it: replace(it, class_names=("dog",)), "and 1 class_names"),
    ],
)
def test_samples_that_would_be_misread_are_refused(
    change: Callable[[Sample], Sample], said: str, refiner: G4SegRefiner
) -> None:
    with pytest.raises(BadItemError, match=said):
        refiner.refine_samples([change(sample_of("a", 50, 70, ("dog", "cat")))])


def test_scores_beyond_their_range_by_rounding_are_taken(sd1_folder: Path) -> None:
    refiner = G4SegRefiner.from_pretrained(str(sd1_folder), steps=[Blur()], device="cpu")
    sample = sample_of("a", 50, 70, ("dog",))
    rounded = with_scores(sample, sample.seed.scores * 1.0008 - 0.0004)
    assert refiner.refine_samples([rounded])[0].isfinite().all()
    assert len(refiner.refine_samples([sample_of("b", 50, 70, ())])[0]) == 0


def test_beta_one_returns_the_very_mask(sd1_folder: Path) -> None:
    steps = [Correspondence(beta=1.0), Correspondence(beta=1.0, all_classes_at_once=True)]
    refiner = G4SegRefiner.from_pretrained(str(sd1_folder), steps=steps)
    np.testing.assert_array_equal(refiner.refine(PIXELS, {"dog": MASK})["dog"], MASK)


def test_the_seed_of_the_run_and_the_image_id_choose_the_noise(
    refiner: G4SegRefiner, sd1_folder: Path, refined: np.ndarray
) -> None:
    again = refiner.refine(PIXELS, {"dog": MASK})["dog"]
    np.testing.assert_array_equal(again, refined)
    other_id = refiner.refine(PIXELS, {"dog": MASK}, image_id="another")["dog"]
    other_seed = G4SegRefiner.from_pretrained(str(sd1_folder), recipe="paper", seed=1)
    other_noise = other_seed.refine(PIXELS, {"dog": MASK})["dog"]
    assert not np.array_equal(other_id, refined)
    assert not np.array_equal(other_noise, refined)


def test_the_callback_sees_the_generated_image(refiner: G4SegRefiner) -> None:
    seen: list[Any] = []
    refiner.refine(PIXELS, {"dog": MASK}, callback=seen.append)
    assert seen[0].artifacts["generated"].shape == (1, 3, 64, 64)


def test_steps_can_be_put_together(sd1_folder: Path) -> None:
    refiner = G4SegRefiner.from_pretrained(str(sd1_folder), steps=[Blur(3.0)])
    found = refiner.refine(PIXELS, {"dog": MASK})["dog"]
    assert found.std() < MASK.std()


def test_steps_work_with_the_threshold_that_is_told(sd1_folder: Path) -> None:
    def masks(**options: Any) -> np.ndarray:
        refiner = G4SegRefiner.from_pretrained(str(sd1_folder), device="cpu", **options)
        return refiner.refine(PIXELS, {"dog": MASK})["dog"]

    told = masks(steps=[Correspondence()], threshold=0.2)
    np.testing.assert_array_equal(told, masks(steps=[Correspondence(binarise_at=0.2)]))
    assert not np.array_equal(told, masks(steps=[Correspondence()]))
    with pytest.raises(ValueError, match="threshold is 1"):
        masks(threshold=1)


@pytest.mark.parametrize("size", [0, -8, 500, 508])
def test_a_working_size_that_cannot_be_halved_is_refused(refiner: G4SegRefiner, size: int) -> None:
    with pytest.raises(ValueError, match=f"working_size is {size}: give a multiple of 8"):
        G4SegRefiner(refiner.generator, refiner.features, working_size=size)


def test_refines_at_another_working_size(refiner: G4SegRefiner, sd1_folder: Path) -> None:
    assert refiner.working_size == refiner.generator.image_size
    size = refiner.working_size // 2
    half = G4SegRefiner.from_pretrained(
        str(sd1_folder), recipe="paper", device="cpu", working_size=size
    )
    seen = []
    half.refine(PIXELS, {"dog": MASK}, callback=lambda state: seen.append(tuple(state.after.shape)))
    assert seen == [(1, size, size)]


def test_masks_go_through_a_controlnet(sd1_folder: Path, controlnet_folder: Path) -> None:
    control = ControlNetInjection(str(controlnet_folder), colours={"dog": "sofa"})

    def refined(control: ControlNetInjection | None) -> np.ndarray:
        made = G4SegRefiner.from_pretrained(
            str(sd1_folder), recipe="paper", device="cpu", controlnet=control
        )
        return made.refine(PIXELS, {"dog": MASK})["dog"]

    assert not np.array_equal(refined(control), refined(None))
    with pytest.raises(ConfigurationError, match="no update step injects masks"):
        G4SegRefiner.from_pretrained(str(sd1_folder), controlnet=control)


@pytest.mark.parametrize("device", ["cpu"])
def test_works_in_inference_mode(refiner: G4SegRefiner, device: str, refined: np.ndarray) -> None:
    with torch.inference_mode():
        found = refiner.refine(PIXELS, {"dog": MASK})["dog"]
    np.testing.assert_allclose(found, refined, atol=1e-6)


def test_without_masks_it_says_so(refiner: G4SegRefiner) -> None:
    with pytest.raises(BadItemError, match="masks is empty"):
        refiner.refine(PIXELS, {})


def test_a_class_name_is_a_text(refiner: G4SegRefiner) -> None:
    with pytest.raises(BadItemError, match="class name 3 is of type int; give a text"):
        refiner.refine(PIXELS, {3: MASK})  # type: ignore[dict-item]


def test_the_name_of_a_recipe_is_no_list_of_steps(refiner: G4SegRefiner) -> None:
    with pytest.raises(ConfigurationError, match=r"steps is the text 'paper'.*recipe='paper'"):
        G4SegRefiner.from_pretrained("nowhere", steps="paper")
    with pytest.raises(ConfigurationError, match="steps is the text 'paper'"):
        refiner.with_steps("paper")


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="is no folder"):
        G4SegRefiner.from_pretrained("/no/such/model")


def test_findings_of_the_steps_come_back_at_native_size(sd1_folder: Path) -> None:
    steps = [
        Averaged([Correspondence(beta=0.2)], draws=2),
        ChooseByLikelihood([[Blur(2.0)]], draws=2),
    ]
    refiner = G4SegRefiner.from_pretrained(str(sd1_folder), steps=steps)
    samples = [
        sample_of("a", 40, 60, ("dog", "cat")),
        sample_of("b", 30, 30, ()),
        sample_of("c", 64, 64, ("zebra disc",)),
    ]
    found = refiner.refine_with_findings(samples)
    for sample, one in zip(samples[::2], found[::2], strict=True):
        for maps in (one.confidence, one.pixel_weights):
            assert maps is not None
            assert maps.shape == sample.seed.scores.shape
            assert 0 <= float(maps.min()) <= float(maps.max()) <= 1
        assert one.score is not None
        assert one.score.shape == (len(sample.class_names),)
        alone = refiner.refine_with_findings([sample])[0]
        for name in ("foreground", *FINDINGS):
            torch.testing.assert_close(getattr(one, name), getattr(alone, name), atol=1e-3, rtol=0)
    assert found[1] == Refinement(found[1].foreground)
    torch.testing.assert_close(refiner.refine_samples(samples)[2], found[2].foreground)


def test_without_such_steps_there_are_no_findings(refiner: G4SegRefiner) -> None:
    found = refiner.refine_with_findings([sample_of("a", 40, 60, ("dog",))])[0]
    assert [getattr(found, name) for name in FINDINGS] == [None] * 4


def test_best_recipe_is_the_default_and_the_papers_is_beside_it(
    sd1_folder: Path, refiner: G4SegRefiner
) -> None:
    assert refiner.steps == (Correspondence(),)
    best = G4SegRefiner.from_pretrained(str(sd1_folder), device="cpu")
    assert best.steps == steps_of("best")
    found = best.refine(PIXELS, {"dog": MASK, "cat": 1 - MASK})
    for mask in found.values():
        assert mask.shape == MASK.shape
        assert mask.min() >= 0
        assert mask.max() <= 1
    again = best.refine(PIXELS, {"dog": MASK, "cat": 1 - MASK})
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_unknown_recipe_is_named() -> None:
    with pytest.raises(ValueError, match="'best' or 'paper'"):
        steps_of("worst")  # type: ignore[arg-type]
