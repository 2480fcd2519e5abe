"""What update steps share about a batch of images: everything is computed on first use, once."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from g4seg_pl.core.diffusion import seeded_noise
from g4seg_pl.core.protocols import FeatureExtractor, Generator, ImageCache

_NAME = "{}"
_KEPT_PROMPTS = 512  # all classes of Context; 160 MB for SDXL


@dataclass
class RefinementContext:
    """A batch of images at the generator's working size and what is known about them.

    Whatever depends on an image alone (latent, reference features), or on a prompt alone
    (embedding), is computed on first use and kept. It is computed outside inference mode and
    without a gradient, so that steps of either kind can use it.

    Attributes:
        images: ``(B, 3, H, W)`` in [-1, 1], on the generator's device.
        image_ids: the name of each image; noise depends on it.
        class_names: the name of each mask's class, as it is put into the prompt.
        owner: ``(M,)``, the index of each mask's image, on the generator's device.
        generator: the text-to-image model.
        features: F of Eq. 8; None if no step of the run compares images.
        seed: the run's seed, from which all noise derives.
        prompt_template: the prompt, with one ``{}`` for the class.
        masks_per_pass: how many masks, or images, at most enter the U-Net, the autoencoder or
            the feature extractor at once: the bound on memory.
        prompt_embeddings: embeddings by prompt; give the same dictionary to the next batch, and
            no prompt is embedded twice in a run, unless hundreds of others lie between.
        first_draw: added to the number of every draw of noise, so that the same steps can be run
            again under other noise.
        cache: keeps latents and reference features from run to run, of just this generator and
            these features; None keeps nothing.
    """

    images: Float[Tensor, "B 3 H W"]
    image_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    owner: Int[Tensor, " M"]
    generator: Generator
    features: FeatureExtractor | None = None
    seed: int = 0
    prompt_template: str = "A photo of {}"
    masks_per_pass: int = 8
    prompt_embeddings: dict[str, Tensor] = field(default_factory=dict)
    first_draw: int = 0
    cache: ImageCache | None = None
    _lasting: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _artifacts: dict[str, Tensor] | None = field(default=None, init=False, repr=False)
    _origin: "RefinementContext | None" = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse fields that contradict each other."""
        if len(self.image_ids) != len(self.images):
            message = f"{len(self.image_ids)} image_ids for {len(self.images)} images"
            raise ValueError(message)
        if len(self.class_names) != len(self.owner):
            message = f"{len(self.class_names)} class_names for {len(self.owner)} owners"
            raise ValueError(message)
        if self.prompt_template.count(_NAME) != 1:
            message = f"prompt_template is {self.prompt_template!r}; it needs exactly one {{}}"
            raise ValueError(message)
        if self.masks_per_pass < 1:
            message = f"masks_per_pass is {self.masks_per_pass}; give 1 or more"
            raise ValueError(message)

    @cached_property
    def latents(self) -> Float[Tensor, "B c h w"]:
        """z₀ of every image, scaled, float32."""
        return self._of_images("latents", self.generator.encode)

    @cached_property
    def reference_features(self) -> Float[Tensor, "B c h w"]:
        """F(x₀) of every image, float32.

        Raises:
            ValueError: the context has no feature extractor.
            FloatingPointError: features are not finite; names the first image.
        """
        if self._origin is not None:
            return self._origin.reference_features
        features = self._of_images("reference_features", self.extract)
        finite = torch.isfinite(features).flatten(1).all(1).tolist()
        if not all(finite):
            # Matches of such features would be found all the same, at the first places.
            message = (
                f"the features of image {self.image_ids[finite.index(False)]} are not finite; "
                "a float16 model overflows, load it in bfloat16 or float32"
            )
            raise FloatingPointError(message)
        return features

    def _of_images(self, name: str, network: Callable[[Tensor], Tensor]) -> Tensor:
        def compute(images: Tensor) -> Tensor:
            return torch.cat([network(images[part]) for part in self.parts(len(images))])

        with torch.inference_mode(mode=False), torch.no_grad():
            images = self.images.clone()
            if self.cache is None:
                return compute(images)
            return self.cache.fetch(name, images, compute)

    def extract(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return F of generated images.

        Raises:
            ValueError: the context has no feature extractor.
        """
        if self.features is None:
            message = "this update step compares images; set `features` to a feature extractor"
            raise ValueError(message)
        return self.features(images)

    def parts(self, count: int) -> Iterator[slice]:
        """Yield slices that cover ``count`` rows, none above the memory bound."""
        for begin in range(0, count, self.masks_per_pass):
            yield slice(begin, min(begin + self.masks_per_pass, count))

    def embed(self, prompts: tuple[str, ...]) -> Float[Tensor, "b l d"]:
        """Return the embeddings of prompts; those of the last few hundred are kept."""
        missing = tuple(dict.fromkeys(p for p in prompts if p not in self.prompt_embeddings))
        for part in self.parts(len(missing)):
            with torch.inference_mode(mode=False), torch.no_grad():
                embeddings = self.generator.embed(missing[part])
            self.prompt_embeddings.update(zip(missing[part], embeddings, strict=True))
        # Those used last stand last; prompts that name sets of classes would otherwise pile up.
        for prompt in dict.fromkeys(prompts):
            self.prompt_embeddings[prompt] = self.prompt_embeddings.pop(prompt)
        # They may be older than the models' last move to another device.
        device = self.images.device
        found = torch.stack([self.prompt_embeddings[prompt].to(device) for prompt in prompts])
        for prompt in list(self.prompt_embeddings)[:-_KEPT_PROMPTS]:
            del self.prompt_embeddings[prompt]
        return found

    def prompt(self, names: tuple[str, ...]) -> tuple[str, Bool[Tensor, "c l"]]:
        """Return the prompt that names the given classes, and where each name's tokens are.

        Args:
            names: one class or several, joined by "and".
        """
        start = self.prompt_template.index(_NAME)
        text = self.prompt_template.replace(_NAME, " and ".join(names))
        masks = []
        for name in names:
            masks.append(self.generator.token_mask(text, name, start))
            start += len(name) + len(" and ")
        return text, torch.stack(masks)

    def noise(
        self, image_ids: tuple[str, ...], names: tuple[str, ...], draw: int = 0
    ) -> Float[Tensor, "b c h w"]:
        """Return ε of the given images and classes, whatever batch they are in.

        Args:
            image_ids: one image a row.
            names: one class a row; empty for noise shared by all classes of the image.
            draw: counts independent draws.
        """
        shape = self.latents.shape[1:]
        pairs = zip(image_ids, names, strict=True)
        number = self.first_draw + draw
        drawn = [seeded_noise(shape, self.seed, image, name, number) for image, name in pairs]
        return torch.stack(drawn).to(self.latents)

    def variant(
        self,
        *,
        class_names: tuple[str, ...] | None = None,
        latents: Float[Tensor, "B c h w"] | None = None,
        first_draw: int | None = None,
    ) -> "RefinementContext":
        """Return the same context but for what is given; caches and records stay shared.

        Args:
            class_names: other names for the masks.
            latents: other latents for the images.
            first_draw: another first draw of noise.
        """
        latents = self.latents if latents is None else latents
        other = copy.copy(self)
        other._origin = self._origin or self
        other.__dict__["latents"] = latents
        if class_names is not None:
            other.class_names = class_names
        if first_draw is not None:
            other.first_draw = first_draw
        return other

    def with_own_findings(self) -> "RefinementContext":
        """Return the same context whose findings, the present ones at first, are its own."""
        other = self.variant()
        other._lasting = self.kept
        return other

    def start_recording(self, *, enabled: bool) -> None:
        """Forget what the last step recorded, and keep what the next one does if enabled."""
        self._artifacts = {} if enabled else None

    def record(self, name: str, tensor: Tensor) -> None:
        """Keep a by-product of a step for the caller's callback, if there is one."""
        if self._artifacts is not None:
            self._artifacts[name] = tensor

    def keep(self, name: str, tensor: Tensor) -> None:
        """Keep a finding about the masks for the run's output, until another step replaces it.

        Args:
            name: ``confidence``, ``score``, ``score_error`` or ``pixel_weights``, for instance.
            tensor: one row a mask.
        """
        self._lasting[name] = tensor
        self.record(name, tensor)

    @property
    def kept(self) -> dict[str, Tensor]:
        """What steps found out about the masks, by name, recorded or not."""
        return dict(self._lasting)

    @property
    def recorded(self) -> dict[str, Tensor]:
        """What the step recorded, by name."""
        return dict(self._artifacts or {})


def resize_features(
    features: Float[Tensor, "b c h w"], side: int | None
) -> Float[Tensor, "b c h2 w2"]:
    """Return features interpolated to a grid whose shorter side is ``side``; None leaves them."""
    if side is None:
        return features
    height, width = features.shape[2:]
    scale = side / min(height, width)
    grid = (round(height * scale), round(width * scale))
    return functional.interpolate(features, grid, mode="bilinear", align_corners=False)
