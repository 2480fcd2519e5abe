"""The two sizes of the benchmark's models: a few channels, and Stable Diffusion 2.1's."""

from dataclasses import dataclass
from typing import Any, Literal

SizeName = Literal["tiny", "sd21"]


@dataclass(frozen=True)
class Size:
    """Configurations of a random-weight model; nothing in it is learned.

    Attributes:
        name: of the size.
        side: working size of images in pixels.
        native: height and width of the image files.
        unet: arguments of diffusers' ``UNet2DConditionModel``.
        vae: arguments of diffusers' ``AutoencoderKL``.
        tiny: arguments of diffusers' ``AutoencoderTiny``, which decodes the same latents.
        text: arguments of transformers' ``CLIPTextConfig``.
        clip: arguments of transformers' ``CLIPVisionConfig``, the image encoder F.
        half: whether weights are stored in bfloat16, to halve the files.
    """

    name: SizeName
    side: int
    native: tuple[int, int]
    unet: dict[str, Any]
    vae: dict[str, Any]
    tiny: dict[str, Any]
    text: dict[str, Any]
    clip: dict[str, Any]
    half: bool

    @property
    def full(self) -> bool:
        """Whether bars on ratios apply: in tiny networks, overhead is all there is."""
        return self.name == "sd21"


TINY = Size(
    name="tiny",
    side=128,
    native=(96, 128),
    unet={
        "sample_size": 32,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
        "attention_head_dim": (1, 2, 2),
        "use_linear_projection": True,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    vae={
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 128,
    },
    tiny={
        "encoder_block_out_channels": (4, 4, 4),
        "num_encoder_blocks": (0, 0, 0),
        "decoder_block_out_channels": (4, 4, 4),
        "num_decoder_blocks": (1, 1, 1),
    },
    text={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 1024,
    },
    clip={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "projection_dim": 16,
    },
    half=False,
)

# As the published configurations of Stable Diffusion 2.1 base and of CLIP ViT-B/16 have them.
SD21 = Size(
    name="sd21",
    side=512,
    native=(375, 500),
    unet={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    },
    # TAESD's: diffusers' own defaults, named here.
    tiny={
        "encoder_block_out_channels": (64, 64, 64, 64),
        "num_encoder_blocks": (1, 3, 3, 3),
        "decoder_block_out_channels": (64, 64, 64, 64),
        "num_decoder_blocks": (3, 3, 3, 1),
    },
    text={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "vocab_size": 49408,
        "hidden_act": "gelu",
    },
    clip={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "projection_dim": 512,
    },
    half=True,
)

SIZES: dict[SizeName, Size] = {"tiny": TINY, "sd21": SD21}
