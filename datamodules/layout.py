"""Finding a data set under the folder the user gave, and complaining about what is not there."""

import os
from collections.abc import Sequence
from pathlib import Path

from g4seg_pl.types import ConfigurationError


def find_root(root: Path, below: Sequence[str], markers: Sequence[str]) -> Path:
    """The folder that has one of the markers: `root` itself or one of the folders below it.

    Args:
        root: as given by the user.
        below: places where it may lie under `root`, such as `VOCdevkit/VOC2012`.
        markers: folders of which it must have at least one.

    Raises:
        ConfigurationError: none of them; names every place that was looked at.
    """
    places = [root, *(root / name for name in below)]
    for place in places:
        if any((place / marker).is_dir() for marker in markers):
            return place
    looked = ", ".join(str(place) for place in places)
    message = f"root: no folder {' or '.join(markers)} in any of {looked}"
    raise ConfigurationError(message)


def first_folder(argument: str, places: Sequence[Path]) -> Path:
    """The first of several folders that is there.

    Raises:
        ConfigurationError: none is; names the argument and all places.
    """
    for place in places:
        if place.is_dir():
            return place
    looked = ", ".join(str(place) for place in places)
    message = f"{argument}: found none of the folders {looked}"
    raise ConfigurationError(message)


def ids_in(folder: Path, suffix: str) -> list[str]:
    """Sorted names, without `suffix`, of the files in a folder that end with it."""
    with os.scandir(folder) as entries:  # which knows files from folders without a look at each
        names = [entry.name for entry in entries if entry.is_file()]
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))
