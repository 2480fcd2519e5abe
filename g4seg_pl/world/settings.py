"""The demo's settings, chosen on validation scenes by `python -m g4seg_pl.lab choose`.

They are those of docs/results/chosen.json for Grad-CAM seeds; a test holds the two together.
"""

from dataclasses import replace

from g4seg_pl.core.background import Threshold
from g4seg_pl.core.controls import ColourAffinity, EdgeFilter
from g4seg_pl.core.grounding import Grounding
from g4seg_pl.core.steps import Blur, Correspondence, UpdateStep
from g4seg_pl.features.vae import VAEFeatures

# Said beside every number made with them.
PROVENANCE = "chosen on 64 validation scenes (docs/results/chosen.json), labels' threshold included"
SEED_BACKGROUND = Threshold(0.1)

_PAPER = Correspondence(
    timestep=100,
    injection_weight=30.0,
    beta=0.5,
    confidence_range=None,
    binarise_at=SEED_BACKGROUND.value,
)
RECIPES: dict[str, tuple[UpdateStep, ...]] = {
    "g4seg": (_PAPER,),
    "g4seg-best": (
        EdgeFilter(kind="guided", radius=12, epsilon=1e-4),
        Grounding(
            mixing=0.5,
            timestep=50,
            draws=3,
            upsampling="joint_bilateral",
            threshold=SEED_BACKGROUND.value,
        ),
        ColourAffinity(
            mixing=0.5,
            size=32,
            sigma_colour=0.05,
            sigma_position=0.2,
            norm="range",
            upsampling="joint_bilateral",
            threshold=SEED_BACKGROUND.value,
        ),
    ),
    "no-injection": (replace(_PAPER, injection_weight=0.0),),
    "feature-nn": (
        Correspondence(
            matching="self",
            beta=0.3,
            confidence_range=None,
            exclude_radius=2.5,
            binarise_at=SEED_BACKGROUND.value,
        ),
    ),
    "blur": (Blur(sigma=6.0),),
    # The best recipe without the generator.
    "guided+colour-affinity": (
        EdgeFilter(kind="guided", radius=12, epsilon=1e-4),
        ColourAffinity(
            size=32,
            sigma_colour=0.03,
            sigma_position=0.2,
            norm="range",
            upsampling="joint_bilateral",
            threshold=SEED_BACKGROUND.value,
        ),
    ),
    # The generator's word map without the coarse mask: what would a mask be needed for?
    "word": (
        Grounding(
            mixing=1.0,
            timestep=100,
            upsampling="joint_bilateral",
            threshold=SEED_BACKGROUND.value,
        ),
    ),
}


def chosen_features() -> VAEFeatures:
    """F of Eq. 8: the third block of the autoencoder's encoder, on images of twice the size."""
    return VAEFeatures(level=2, image_size=128)


# Where each row's labels begin, chosen with its steps.
BACKGROUNDS: dict[str, Threshold] = dict.fromkeys(("seed", *RECIPES), SEED_BACKGROUND) | {
    "g4seg-best": Threshold(0.2),
    "guided+colour-affinity": Threshold(0.3),
    "word": Threshold(0.3),
}
