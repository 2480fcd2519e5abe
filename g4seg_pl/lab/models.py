"""The models that experiments run on, and what tells two of them apart."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from g4seg_pl.backbones.loading import place_of, resolve_dtype
from g4seg_pl.callbacks.run_record import Json, describe
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.lab.cache import identity_of
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import ConfigurationError
from g4seg_pl.world.folders import CLIP, GENERATOR


@dataclass
class Models:
    """A generator with feature extractors, loaded when first used.

    Attributes:
        generator: a diffusers folder or hub id; the embedded one by default.
        clip: an open_clip folder, for seeds of the embedded world.
        device: None takes a GPU if there is one.
        prompt_template: the prompt, with one ``{}`` for the class.
        masks_per_pass: how many masks enter a network at once: the bound on memory.
        decoder: an AutoencoderTiny that decodes instead of the generator's autoencoder.
    """

    generator: str | Path = GENERATOR
    clip: Path = CLIP
    device: str | None = None
    prompt_template: str = "A photo of {}"
    masks_per_pass: int = 32
    decoder: str | Path | None = None
    _refiners: dict[str, G4SegRefiner] = field(default_factory=dict, init=False, repr=False)

    def refiner(self, features: DenseFeatures | None = None) -> G4SegRefiner:
        """The generator with a feature extractor, the generator's own autoencoder if None.

        Raises:
            ConfigurationError: the model cannot be loaded.
        """
        features = VAEFeatures() if features is None else features
        name = str(describe(features))
        if name not in self._refiners:
            self._refiners[name] = self._load(features)
        return self._refiners[name]

    def _load(self, features: DenseFeatures) -> G4SegRefiner:
        for other in self._refiners.values():
            # The generator itself is loaded once, whatever looks at its images.
            features.load(getattr(other.generator, "vae", None))
            features.to(other.generator.alphas_cumprod.device, self._number_format)
            return G4SegRefiner(
                other.generator,
                features,
                (),
                prompt_template=self.prompt_template,
                masks_per_pass=self.masks_per_pass,
            )
        return G4SegRefiner.from_pretrained(
            str(self.generator),
            features=features,
            steps=(),
            device=self.device,
            prompt_template=self.prompt_template,
            masks_per_pass=self.masks_per_pass,
            decoder=None if self.decoder is None else str(self.decoder),
        )

    @property
    def _number_format(self) -> torch.dtype:
        """What ``auto`` is where the models run."""
        return resolve_dtype("auto", place_of(self.device))

    @cached_property
    def generator_identity(self) -> str:
        """Hash of the generator's files; the name itself for a hub id."""
        return identity_of(self.generator)

    @cached_property
    def clip_identity(self) -> str:
        """Hash of CLIP's files.

        Raises:
            ConfigurationError: there is no such folder.
        """
        if not Path(self.clip).is_dir():
            message = (
                f"clip: no folder {self.clip}; train it by `python -m g4seg_pl.world.train clip`, "
                "or give another"
            )
            raise ConfigurationError(message)
        return identity_of(self.clip)

    def identity(self, features: DenseFeatures | None) -> Json:
        """What results depend on besides the settings of a way."""
        # Results without a tiny decoder, in float32, keep the names they had before there were
        # others.
        extra = {} if self.decoder is None else {"decoder": identity_of(self.decoder)}
        if self._number_format != torch.float32:
            extra["dtype"] = str(self._number_format)
        return extra | {
            "generator": self.generator_identity,
            "features": describe(features or VAEFeatures()),
            "features_weights": identity_of(getattr(features, "model", "none")),
            "prompt": self.prompt_template,
        }
