"""Ground truth from label images, whatever the data set's numbering."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import bad_item
from datamodules.files import File
from datamodules.images import read_label
from datamodules.seed_files.maps import COCO_CATEGORY_IDS, CategoryIds
from g4seg_pl.types import IGNORE_INDEX


@dataclass(frozen=True)
class TruthOptions:
    """How the values of ground-truth images become label values (0 background, 255 ignored).

    Attributes:
        label_offset: subtracted: -1 for trainIds, which start at 0 without a background.
        zero_is_ignored: 0 means "not labelled" (ADE20K, Context-59).
        category_ids: `coco91` if values are COCO's category ids, 1 to 90.
    """

    label_offset: int = 0
    zero_is_ignored: bool = False
    category_ids: CategoryIds = "contiguous"


def _table(options: TruthOptions) -> NDArray[np.int64]:
    """Label value of every raw value, 0 to 255; -1 where a raw value has no meaning."""
    table = np.arange(256) - options.label_offset
    if options.category_ids == "coco91":
        contiguous = np.full(256, -1)
        contiguous[[0, *COCO_CATEGORY_IDS]] = np.arange(len(COCO_CATEGORY_IDS) + 1)
        table = contiguous
    if options.zero_is_ignored:
        table[0] = IGNORE_INDEX
    table[IGNORE_INDEX] = IGNORE_INDEX
    return table


def read_truth(path: File, classes: int, options: TruthOptions) -> NDArray[np.uint8]:
    """Reads ground truth as label values ``(H, W)``: 0 background, 255 ignored.

    Args:
        path: an image of mode P or L, read by index.
        classes: number of foreground classes.
        options: the numbering of the data set.

    Raises:
        BadItemError: missing, truncated, in colours, or with values beyond the classes.
    """
    raw = read_label(path)
    values = np.take(_table(options), raw.astype(np.int64), mode="clip")
    strange = (values < 0) | ((values > classes) & (values != IGNORE_INDEX)) | (raw > IGNORE_INDEX)
    if strange.any():
        problem = f"label values {np.unique(raw[strange])[:5].tolist()} beyond {classes} classes"
        raise bad_item(path, problem, "Check class_names and the numbering of this ground truth")
    return values.astype(np.uint8)
