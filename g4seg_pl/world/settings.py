"""What was chosen on the validation scenes (by `g4seg_pl.world.choose`), and nowhere else."""

from g4seg_pl.core.background import Threshold
from g4seg_pl.core.steps import Blur, Correspondence, UpdateStep

SEED_BACKGROUND = Threshold(0.5)

RECIPES: dict[str, tuple[UpdateStep, ...]] = {
    "g4seg": (Correspondence(),),
    "no-injection": (Correspondence(injection_weight=0.0),),
    "feature-nn": (Correspondence(matching="self"),),
    "blur": (Blur(),),
}
