"""The demo's settings: defaults until they are chosen on validation scenes (`g4seg_pl.lab`)."""

from g4seg_pl.core.affinity import Affinity
from g4seg_pl.core.background import Threshold
from g4seg_pl.core.gradient import Gradient
from g4seg_pl.core.steps import Blur, Correspondence, UpdateStep

# Said beside every number made with them.
PROVENANCE = "defaults; nothing has been chosen on validation scenes yet"
SEED_BACKGROUND = Threshold(0.5)

RECIPES: dict[str, tuple[UpdateStep, ...]] = {
    "g4seg": (Correspondence(),),
    "g4seg-best": (Affinity(), Gradient()),
    "no-injection": (Correspondence(injection_weight=0.0),),
    "feature-nn": (Correspondence(matching="self"),),
    "blur": (Blur(),),
}

# Where each row's labels begin, chosen with its steps.
BACKGROUNDS: dict[str, Threshold] = dict.fromkeys(("seed", *RECIPES), SEED_BACKGROUND)
