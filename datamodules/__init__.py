"""Data sets and coarse masks: VOC, COCO, Context, ADE20K, NightCity, scenes, any folder."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datamodules.ade20k import ADE20KDataModule
    from datamodules.base import SeedDataModule
    from datamodules.coco import COCODataModule
    from datamodules.context import ContextDataModule
    from datamodules.folder import FolderDataModule
    from datamodules.nightcity import NightCityDataModule
    from datamodules.pseudo_labels import PseudoLabelDataModule
    from datamodules.scenes import ScenesDataModule
    from datamodules.voc import VOCDataModule

__all__ = [
    "ADE20KDataModule",
    "COCODataModule",
    "ContextDataModule",
    "FolderDataModule",
    "NightCityDataModule",
    "PseudoLabelDataModule",
    "ScenesDataModule",
    "SeedDataModule",
    "VOCDataModule",
]

_HOMES = {
    "ADE20KDataModule": "ade20k",
    "COCODataModule": "coco",
    "ContextDataModule": "context",
    "FolderDataModule": "folder",
    "NightCityDataModule": "nightcity",
    "PseudoLabelDataModule": "pseudo_labels",
    "ScenesDataModule": "scenes",
    "SeedDataModule": "base",
    "VOCDataModule": "voc",
}


def __getattr__(name: str) -> object:
    # Lazily, so that the command line's help does not wait for torch.
    if name in _HOMES:
        return getattr(import_module(f"datamodules.{_HOMES[name]}"), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
