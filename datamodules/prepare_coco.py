"""`g4seg prepare coco`: label images of 81 classes from COCO's instances JSON.

COCO gives instances, whose masks overlap; a label image has one class a pixel. Smaller instances
lie on top of larger ones, so that a cup stays visible on its table, or the order of the file
decides, as in COCO's own `cocostuffhelper`.
"""

import json as json_format
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

# Only typing here: the command line's help must not wait for NumPy.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from datamodules.seed_files.coco import CocoFile


@dataclass(frozen=True)
class Painting:
    """How instances become one label image.

    Attributes:
        on_top: which of two overlapping instances is seen: the `smaller`, or the one that comes
            `later` in the file.
        crowd: regions of many things that were not told apart count as their class, or are
            ignored (255).
    """

    on_top: Literal["smaller", "later"] = "smaller"
    crowd: Literal["class", "ignore"] = "class"


def coco(
    instances: Path,
    out: Path,
    split: str | None = None,
    layout: Literal["semantic", "object"] = "semantic",
    on_top: Literal["smaller", "later"] = "smaller",
    crowd: Literal["class", "ignore"] = "class",
    override: bool = False,
) -> int:
    """Write label images of 81 classes (0 the background, 1 to 80 COCO's things in order).

    They lie in OUT/SegmentationClass/SPLIT/<id>.png, or as COCO-Object's ground truth in
    OUT/annotations/SPLIT/<id>_instanceTrainIds.png. OUT/ImageLabels/SPLIT.txt lists the 0-based
    classes of each image that has any. What exists is kept, so that an interrupted run goes on.

    Args:
        instances: COCO's JSON, such as annotations/instances_val2017.json.
        out: root of the data set, as COCODataModule takes it.
        split: name of the split; by default what follows instances_ in the file's name.
        layout: where the label images lie and how they are named.
        on_top: which of two overlapping instances is seen.
        crowd: whether crowd regions count as their class or are ignored.
        override: write existing files again; those of other options are removed first.

    Returns:
        exit status: 0 if every image was written, 1 otherwise.

    Raises:
        ConfigurationError: no such file, no COCO JSON, pycocotools is missing, or OUT was made with
            other options.
    """
    from datamodules.classes import read_class_list
    from datamodules.seed_files.coco import CocoFile
    from datamodules.seed_files.maps import ReadOptions
    from g4seg_pl.types import BadItemError

    file = CocoFile(instances, read_class_list("coco"), ReadOptions())
    split = split or instances.stem.removeprefix("instances_")
    object_layout = layout == "object"
    folder = out / ("annotations" if object_layout else "SegmentationClass") / split
    suffix = "_instanceTrainIds.png" if object_layout else ".png"
    painting = Painting(on_top, crowd)
    _record(folder / "prepared.json", asdict(painting), override)
    written = kept = skipped = 0
    lines: list[str] = []
    for image_id, size in file.images.items():
        try:
            kept += (done := (folder / f"{image_id}{suffix}").is_file() and not override)
            if not done:
                _write(folder / f"{image_id}{suffix}", paint(file, image_id, size, painting))
                written += 1
            lines += _labels(file, image_id)
        except (BadItemError, OSError, ValueError) as error:
            print(f"skipped {image_id}: {error}")
            skipped += 1
    _write_text(out / "ImageLabels" / f"{split}.txt", "".join(f"{line}\n" for line in lines))
    print(f"{folder}: wrote {written}, kept {kept}, skipped {skipped}")
    return 1 if skipped else 0


def paint(
    file: "CocoFile", image_id: str, size: tuple[int, int], painting: Painting
) -> "NDArray[np.uint8]":
    """The label image ``(H, W)`` of one image.

    Raises:
        BadItemError: an unknown class or an unreadable segmentation.
    """
    import numpy as np

    from g4seg_pl.types import IGNORE_INDEX

    layers = file.class_masks(image_id, size)
    if painting.on_top == "smaller":
        # Stable: of two equally large ones the later stays on top.
        layers.sort(key=lambda layer: -int(layer[2].sum()))
    label = np.zeros(size, dtype=np.uint8)
    for class_id, entry, mask in layers:
        ignored = entry.crowd and painting.crowd == "ignore"
        label[mask] = IGNORE_INDEX if ignored else class_id
    return label


def _labels(file: "CocoFile", image_id: str) -> Iterator[str]:
    """The image's line in the list of labels, 0-based, crowds included; none without classes."""
    if classes := sorted({file.class_id(category) - 1 for category in file.categories(image_id)}):
        yield " ".join([image_id, *map(str, classes)])


def _record(path: Path, options: dict[str, str], override: bool) -> None:
    """Keeps the options beside the label images, and refuses to mix two kinds."""
    from g4seg_pl.types import ConfigurationError

    text = json_format.dumps(options)
    found = path.read_text(encoding="utf-8").strip() if path.is_file() else text
    if found != text and not override:
        message = (
            f"{path.parent} was made with {found}, not with {text}: give another out, the same "
            "options, or --override"
        )
        raise ConfigurationError(message)
    if found != text:
        # Once the record tells of the new options, a run that goes on would keep these as its own.
        for old in path.parent.glob("*.png"):
            old.unlink()
    _write_text(path, text + "\n")


def _write(path: Path, label: "NDArray[np.uint8]") -> None:
    from datamodules.seed_files import label_png
    from datamodules.seed_files.writing import write_atomically

    write_atomically(path, lambda stream: label_png.write(stream, label))


def _write_text(path: Path, text: str) -> None:
    from datamodules.seed_files.writing import write_atomically

    def write(stream: object) -> None:
        stream.write(text.encode())  # type: ignore[attr-defined]

    write_atomically(path, write)
