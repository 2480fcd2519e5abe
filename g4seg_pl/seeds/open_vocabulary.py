"""What MaskCLIP and SCLIP share: open_clip, a vocabulary, and nothing told about the image."""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.core.background import PowerBackground, Threshold
from g4seg_pl.seeds.base import SeedMaker
from g4seg_pl.seeds.clip_model import encode_texts, load_clip
from g4seg_pl.seeds.vocabulary import (
    Vocabulary,
    best_labels,
    class_names_of,
    drop_small,
    make_vocabulary,
    predicted_masks,
)
from g4seg_pl.types import RefinedMask, Sample


class OpenVocabularyClip(SeedMaker):
    """Names every pixel from all classes of the data set by CLIP's dense features.

    The masks written are those of the classes that win somewhere.

    Args:
        model: an open_clip folder, ``hf-hub:owner/name``, or a name of open_clip's.
        pretrained: the weights of a named model, such as ``openai``.
        class_names: names of each class in the order of the label values from 1; the prompt
            names of the data set if None.
        background_words: names of the background; if there are none, ``background`` decides.
        templates: of all texts, each with one ``{}``; the 80 of CLIP's ImageNet if None.
        probability_threshold: a pixel whose best score is below it is background.
        area_threshold: share of the foreground a class must win, or it is dropped; None keeps
            all.
        background: how the background is scored where it has no name.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None,
        class_names: list[list[str]] | None,
        background_words: list[str] | None,
        templates: list[str] | None,
        probability_threshold: float,
        area_threshold: float | None,
        background: Threshold | PowerBackground | None,
    ) -> None:
        super().__init__(background)
        self.model, self.pretrained = model, pretrained
        self.class_names = class_names
        self.background_words = background_words
        self.templates = templates
        self.probability_threshold = probability_threshold
        self.area_threshold = area_threshold
        self.clip: Any = None
        self.vocabulary: Vocabulary | None = None
        self.texts: Tensor | None = None
        self._tokenizer: Any = None

    @property
    def label_rule(self) -> str | None:
        """How labels are made where no rule of the background makes them, for records."""
        if not self.background_words:
            return None
        return f"best name of the classes and of {len(self.background_words)} background words"

    @abstractmethod
    def scores(self, sample: Sample, texts: Tensor, names: Vocabulary) -> Float[Tensor, "c H W"]:
        """Return probabilities of each label value, the background's first, at native size."""

    def configure_model(self) -> None:
        """Load the model, once."""
        if self._needs_loading(self.clip):
            self.clip, self._tokenizer = load_clip(self.model, self.pretrained)

    def make(self, sample: Sample) -> RefinedMask:
        """Name every pixel."""
        texts, names = self._queries()
        scores = self.scores(sample, texts, names)
        if not names.has_background:
            scores = torch.cat([self.background(scores[1:])[None], scores[1:]])
        scores = drop_small(scores, self.area_threshold)
        return predicted_masks(
            sample.image_id, scores, best_labels(scores, self.probability_threshold)
        )

    def _queries(self) -> tuple[Tensor, Vocabulary]:
        """The vocabulary and its unit vectors, encoded once."""
        if self.vocabulary is None or self.texts is None:
            classes = class_names_of(self)
            names = make_vocabulary(self.background_words or (), classes)
            self.texts = encode_texts(
                self.clip, self._tokenizer, names.names, self.templates or imagenet_templates()
            )
            self.vocabulary = names
        return self.texts.to(self.device), self.vocabulary


def imagenet_templates() -> list[str]:
    """Return the 80 prompt templates of CLIP's ImageNet classification, as open_clip has them."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
