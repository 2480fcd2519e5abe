"""Hidden features of the generator's own autoencoder: no further model is needed."""

from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from g4seg_pl.core.layout import in_slices
from g4seg_pl.features.base import DenseFeatures, fit_to_patches
from g4seg_pl.types import ConfigurationError


class VAEFeatures(DenseFeatures):
    """What the autoencoder's encoder knows before it is squeezed into a latent."""

    def __init__(self, level: int = -1, image_size: int | None = None) -> None:
        """Remember what to read.

        Args:
            level: the encoder's down block whose output is taken, from 0; -1 is the middle
                block, at the latent's resolution.
            image_size: shorter side images are scaled to; None takes them as they are.
        """
        super().__init__()
        self.level = level
        self.image_size = image_size
        # In a tuple, so that the generator's autoencoder is not registered a second time.
        self._shared: tuple[AutoencoderKL, ...] = ()

    def load(self, vae: AutoencoderKL | None = None) -> None:
        """Share the generator's autoencoder.

        Args:
            vae: the autoencoder.

        Raises:
            ConfigurationError: there is none to share, or it has fewer levels.
        """
        if vae is None:
            message = "features: VAEFeatures needs the generator's autoencoder; choose another"
            raise ConfigurationError(message)
        count = len(vae.encoder.down_blocks)
        if not -1 <= self.level < count:
            message = f"features: level is {self.level}; give -1 to {count - 1}"
            raise ConfigurationError(message)
        self._shared = (vae,)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return the encoder's hidden features, float32.

        Args:
            images: in [-1, 1], of any size.
        """
        encoder = self._shared[0].encoder
        factor = 2 ** (len(encoder.down_blocks) - 1)
        fitted = fit_to_patches(images, (factor, factor), self.image_size)
        return in_slices(self._hidden, fitted, fitted.shape[2] * fitted.shape[3])

    def _hidden(self, fitted: Tensor) -> Tensor:
        encoder = self._shared[0].encoder
        hidden: Tensor = encoder.conv_in(fitted.to(encoder.conv_in.weight))
        for level, block in enumerate(encoder.down_blocks):
            hidden = block(hidden)
            if level == self.level:
                return hidden.float()
        middle: Tensor = encoder.mid_block(hidden)
        return middle.float()
