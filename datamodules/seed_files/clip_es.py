"""CLIP-ES (linyq2117/CLIP-ES): `{keys: 0-based ids, attn_highres: float16 (K, H, W)}`."""

from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datamodules.files import File
from datamodules.seed_files.maps import SeedMaps, as_ids, as_maps

FIELDS = ("attn_highres", "highres")


def matches(content: Mapping[object, object]) -> bool:
    """Whether a dictionary is of this dialect; `highres` is the map before attention affinity."""
    return "keys" in content and any(field in content for field in FIELDS)


def read(content: Mapping[object, object], path: File) -> SeedMaps:
    """Reads the dictionary; the refined map is taken where both maps are there."""
    field = next(field for field in FIELDS if field in content)
    return SeedMaps(
        "clip_es",
        as_ids(content["keys"], path, "keys", first=0),
        as_maps(content[field], path, field),
    )


def write(stream: BinaryIO, class_ids: tuple[int, ...], scores: NDArray[np.floating[Any]]) -> None:
    """Writes what CLIP-ES's `eval_cam.py` and `eval_cam_with_crf.py` read.

    Args:
        stream: a file opened for writing bytes.
        class_ids: label values, 1-based.
        scores: probabilities ``(K, H, W)`` at the image's size.
    """
    content = {
        "keys": np.array(class_ids, dtype=np.int64) - 1,
        "attn_highres": scores.astype(np.float16),
    }
    np.save(stream, content, allow_pickle=True)  # type: ignore[arg-type]
