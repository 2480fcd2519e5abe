"""DiffSegmenter (VCG-team/DiffSegmenter): `.mat` with `{str(0-based id): (H, W) in 0-255}`."""

from importlib import import_module
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import bad_item
from datamodules.files import File, openable
from datamodules.seed_files.maps import SeedMaps, as_array, as_maps


def _load(path: File) -> dict[str, object]:
    stream = openable(path)
    try:
        # Imported here: most runs never see a .mat file.
        loadmat = import_module("scipy.io").loadmat
        content: dict[str, object] = loadmat(stream)
    except Exception as error:  # SciPy's parser raises whatever the damage leads to
        raise bad_item(path, f"no readable .mat file: {error}", "Write it again") from error
    return {name: value for name, value in content.items() if not name.startswith("__")}


def read(path: File) -> SeedMaps:
    """Reads the maps and divides them by 255.

    Raises:
        BadItemError: not a MATLAB 5 file, or a variable that is not a class id.
    """
    content = _load(path)
    if strange := [name for name in content if not name.isdecimal()]:
        problem = f"variables {strange[:5]} are not class ids"
        raise bad_item(path, problem, "Expected one map per class named by its 0-based id")
    arrays = [as_array(value, path, f"variable {name}") for name, value in content.items()]
    if len({array.shape for array in arrays}) > 1:
        raise bad_item(path, "maps of several shapes", "Make the seed of this image again")
    stacked = np.stack(arrays) if arrays else np.empty((0, 1, 1))
    maps = as_maps(stacked.astype(np.float32) / 255, path, "the stacked maps")
    return SeedMaps("mat", tuple(int(name) + 1 for name in content), maps)


def write(stream: BinaryIO, class_ids: tuple[int, ...], scores: NDArray[np.floating[Any]]) -> None:
    """Writes what DiffSegmenter's `evaluation_*.py` reads, in steps of 1/255.

    Args:
        stream: a file opened for writing bytes.
        class_ids: label values, 1-based.
        scores: probabilities ``(K, H, W)`` at the image's size.
    """
    maps = np.rint(scores.astype(np.float32) * 255).astype(np.uint8)
    content = {str(class_id - 1): maps[index] for index, class_id in enumerate(class_ids)}
    import_module("scipy.io").savemat(stream, content, do_compression=True)
