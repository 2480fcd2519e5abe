"""IRN, ReCAM, ToCo: `{keys: 0-based ids, cam: (K, H/4, W/4), high_res: (K, H, W)}`.

ToCo leaves `cam` out; IRN writes `keys` and `cam` as torch tensors.
"""

from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datamodules.files import File
from datamodules.seed_files.maps import SeedMaps, as_ids, as_maps

STRIDE = 4


def matches(content: Mapping[object, object]) -> bool:
    """Whether a dictionary is of this dialect."""
    return "keys" in content and ("high_res" in content or "cam" in content)


def read(content: Mapping[object, object], path: File) -> SeedMaps:
    """Reads the dictionary; the small `cam` is used only where there is no `high_res`."""
    small = "high_res" not in content
    field = "cam" if small else "high_res"
    return SeedMaps(
        "irn",
        as_ids(content["keys"], path, "keys", first=0),
        as_maps(content[field], path, field),
        resizable=small,
    )


def write(stream: BinaryIO, class_ids: tuple[int, ...], scores: NDArray[np.floating[Any]]) -> None:
    """Writes what IRN's `eval_cam`, `cam_to_ir_label` and `make_sem_seg_labels` read.

    Args:
        stream: a file opened for writing bytes.
        class_ids: label values, 1-based.
        scores: probabilities ``(K, H, W)`` at the image's size.
    """
    import torch
    from torch.nn.functional import interpolate

    full = torch.from_numpy(np.ascontiguousarray(scores, dtype=np.float32))
    height, width = ((side - 1) // STRIDE + 1 for side in scores.shape[1:])
    small = full.new_zeros(0, height, width)
    if len(full):
        small = interpolate(full[None], (height, width), mode="bilinear", align_corners=False)[0]
    content = {
        "keys": torch.tensor(class_ids, dtype=torch.int64) - 1,
        # A float32 tensor, because IRN calls `.cuda()` on it and multiplies it with float32.
        "cam": small.contiguous(),
        "high_res": scores.astype(np.float16),
    }
    np.save(stream, content, allow_pickle=True)  # type: ignore[arg-type]
