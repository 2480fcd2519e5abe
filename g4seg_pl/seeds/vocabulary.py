"""Label maps from names: several names a class, a named background, and what follows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from g4seg_pl.seeds.base import SeedMaker
from g4seg_pl.types import ConfigurationError, RefinedMask, check_class_count


@dataclass(frozen=True)
class Vocabulary:
    """The names that stand for each label value.

    Attributes:
        names: what is asked of the model, background words first.
        labels: the label value of each name, ascending from 0 or, without a background, from 1.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]

    @property
    def has_background(self) -> bool:
        """Whether label 0 has a name."""
        return 0 in self.labels


def make_vocabulary(background: Sequence[str], classes: Sequence[Sequence[str]]) -> Vocabulary:
    """Return the vocabulary of background words and the names of each class in order.

    Raises:
        ConfigurationError: a class has no name.
    """
    if empty := [index for index, names in enumerate(classes, start=1) if not names]:
        message = f"class_names: no name for label values {empty}; give each at least one"
        raise ConfigurationError(message)
    pairs = [(name, 0) for name in background]
    pairs += [(name, label) for label, names in enumerate(classes, start=1) for name in names]
    return Vocabulary(tuple(name for name, _ in pairs), tuple(label for _, label in pairs))


def class_names_of(maker: SeedMaker) -> list[list[str]]:
    """Return the names of each class: the maker's own, or the prompt names of the run's data set.

    Raises:
        ConfigurationError: it has none and no data module is there to tell, or there are more
            than masks can number.
    """
    if maker.class_names is not None:
        # Asked again: outside a Trainer nobody calls ``setup``.
        check_class_count("class_names", len(maker.class_names))
        return [list(names) for names in maker.class_names]
    classes = maker.data_classes()
    if classes is None:
        message = "class_names: None given and no data module; name each class"
        raise ConfigurationError(message)
    return [[name] for name in classes.prompts]


def label_scores(
    logits: Float[Tensor, "q H W"], vocabulary: Vocabulary, scale: float
) -> Float[Tensor, "c H W"]:
    """Return the probability of each label value: the best of its names after the softmax.

    Args:
        logits: cosines, one map a name.
        vocabulary: of the same names.
        scale: the softmax's inverse temperature.

    Returns:
        one map a label value, label 0's first; without background words it is 0 everywhere.
    """
    probabilities = (logits * scale).softmax(0)
    owners = torch.tensor(vocabulary.labels, device=logits.device)
    maps = logits.new_zeros(int(owners.max()) + 1, *logits.shape[1:])
    spread = owners[:, None, None].expand_as(probabilities)
    return maps.scatter_reduce(0, spread, probabilities, "amax")


def drop_small(
    scores: Float[Tensor, "c H W"], area_threshold: float | None
) -> Float[Tensor, "c H W"]:
    """Return scores with classes set to 0 that win too small a share of the foreground.

    Args:
        scores: one map a label value, the background's first.
        area_threshold: the share; None keeps all.
    """
    if area_threshold is None:
        return scores
    winners = scores.argmax(0).flatten()
    areas = torch.bincount(winners, minlength=len(scores))[1:].float()
    kept = areas > area_threshold * areas.sum()
    keep = torch.cat([kept.new_ones(1), kept]).to(scores)
    return scores * keep[:, None, None]


def best_labels(
    scores: Float[Tensor, "c H W"], probability_threshold: float
) -> UInt8[Tensor, "H W"]:
    """Return the best label value of each pixel, 0 where even that is below the threshold."""
    best: Int[Tensor, "H W"]
    highest, best = scores.max(0)
    return best.masked_fill(highest < probability_threshold, 0).to(torch.uint8)


def predicted_masks(
    image_id: str, scores: Float[Tensor, "c H W"], label: UInt8[Tensor, "H W"]
) -> RefinedMask:
    """Return a label map with the soft maps of the classes in it, on the CPU.

    Args:
        image_id: of the image.
        scores: one map a label value, the background's first.
        label: label values; 255 is none.
    """
    found = [int(value) for value in label.unique() if 0 < value < 255]
    maps = scores[found].float().clamp(0, 1).cpu()
    return RefinedMask(image_id, tuple(found), maps, label.cpu())
