"""The contestant ``floor``: the bare networks that the method cannot do without."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.bench.timing import Spent, Stopwatch
from g4seg_pl.features.transformers_clip import TransformersClipFeatures


class Floor:
    """VAE encode and CLIP once an image; U-Net, VAE decode and CLIP once a mask.

    The networks are those of the stage, their inputs random and already in place: no files, no
    text, no attention but the networks' own, nothing between one network and the next.

    Attributes:
        batch: masks that enter a network at once.
    """

    def __init__(
        self, generator: StableDiffusion, features: TransformersClipFeatures, batch: int
    ) -> None:
        """Make inputs.

        Args:
            generator: whose networks are run.
            features: whose network is run.
            batch: masks at once.
        """
        self.generator, self.clip, self.batch = generator, features.network, batch
        self.patch = int(self.clip.config.patch_size)

    @property
    def device(self) -> torch.device:
        """Of the networks."""
        return self.generator.alphas_cumprod.device

    def image(self, masks: int) -> None:
        """What one image with so many masks costs."""
        self.images(1, masks)

    def images(self, count: int, masks: int) -> None:
        """What so many images cost that have so many masks together."""
        with torch.inference_mode():
            for forward in self.once_an_image():
                forward(count)
            for begin in range(0, masks, self.batch):
                for forward in self.once_a_mask():
                    forward(min(self.batch, masks - begin))

    def once_an_image(self) -> tuple[Callable[[int], object], ...]:
        """The forwards of an image, by the number of images."""
        return (self.encode, self.features)

    def once_a_mask(self) -> tuple[Callable[[int], object], ...]:
        """The forwards of a mask, by the number of masks."""
        return (self.unet, self.decode, self.features)

    def encode(self, count: int) -> Tensor:
        """VAE encoder."""
        vae = self.generator.vae
        latents: Tensor = vae.encode(self._picture(count, vae)).latent_dist.mode()
        return latents

    def decode(self, count: int) -> Tensor:
        """VAE decoder."""
        vae = self.generator.vae
        return torch.as_tensor(vae.decode(self._latent(count, vae)).sample)

    def unet(self, count: int) -> Tensor:
        """U-Net with its own attention."""
        unet, text = self.generator.unet, self.generator.text_encoder.config
        shape = (count, text.max_position_embeddings, text.hidden_size)
        told = torch.zeros(shape, device=self.device, dtype=unet.dtype)
        return torch.as_tensor(unet(self._latent(count, unet), 400, told).sample)

    def features(self, count: int) -> Tensor:
        """CLIP's image encoder at the working size."""
        picture = self._picture(count, self.clip)
        states = self.clip.vision_model(picture, interpolate_pos_encoding=True)
        return torch.as_tensor(states.last_hidden_state)

    def best_batch(self, candidates: tuple[int, ...]) -> tuple[int, dict[int, float]]:
        """The batch at which a mask takes least time, with the seconds a mask of each."""
        found: dict[int, float] = {}
        for batch in candidates:
            found[batch] = self._seconds_a_mask(batch)
        return min(found, key=found.__getitem__), found

    def timed_image(self, masks: int) -> Spent:
        """Time ``image``."""
        with Stopwatch(self.device) as watch:
            self.image(masks)
        return watch.spent

    def _seconds_a_mask(self, batch: int) -> float:
        with torch.inference_mode():
            if self.device.type == "cuda":  # kernels are chosen at the first pass of each shape
                self._masks(batch)
            with Stopwatch(self.device) as watch:
                self._masks(batch)
        return watch.spent.seconds / batch

    def _masks(self, batch: int) -> None:
        for forward in self.once_a_mask():
            forward(batch)

    def _picture(self, count: int, network: nn.Module) -> Tensor:
        side = self.generator.image_size
        if network is self.clip:
            side = side // self.patch * self.patch
        return _random((count, 3, side, side), network)

    def _latent(self, count: int, network: nn.Module) -> Tensor:
        unet = self.generator.unet.config
        return _random((count, unet.in_channels, unet.sample_size, unet.sample_size), network)


def _random(shape: tuple[int, ...], network: nn.Module) -> Tensor:
    weight = next(network.parameters())
    values = torch.empty(shape, device=weight.device, dtype=weight.dtype).uniform_(-1, 1)
    return values.contiguous(memory_format=torch.channels_last)
