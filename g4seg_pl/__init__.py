"""g4seg: refine coarse segmentation masks with a diffusion model, without training anything."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from g4seg_pl.module import G4SegModule
    from g4seg_pl.refiner import G4SegRefiner

__all__ = ["G4SegModule", "G4SegRefiner"]

_HOMES = {"G4SegModule": "module", "G4SegRefiner": "refiner"}


def __getattr__(name: str) -> object:
    # Lazily, so that the command line's help does not wait for torch.
    if name in _HOMES:
        return getattr(import_module(f"g4seg_pl.{_HOMES[name]}"), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
