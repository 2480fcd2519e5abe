"""`g4seg evaluate`: score a folder of label files against the ground truth.

The protocol is printed and saved beside the number, because a mIoU without its split, background
rule and treatment of 255 cannot be compared with another.
"""

import json as json_format
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from datamodules.files import File, openable
from datamodules.items import read_list
from datamodules.truth import TruthOptions, read_truth
from g4seg_pl.evaluation.bootstrap import bootstrap_overlaps
from g4seg_pl.evaluation.boundary import boundary_counts, mean_band_iou, trimap
from g4seg_pl.evaluation.confusion import (
    Counts,
    Fractions,
    Prediction255,
    confusion_matrix,
    divide,
    in_mean,
    mean_overlap,
    overlaps_of,
)
from g4seg_pl.segmentation.label_folder import LabelFolder
from g4seg_pl.types import BadItemError, ConfigurationError, check_counts

SHOWN_PROBLEMS = 20
TRIMAP_WIDTH = 5


@dataclass(frozen=True)
class ImageScore:
    """The counts of one image.

    Attributes:
        overlap: of each class intersection, union and pixels in truth, ``(3, C)``.
        pixels: how many were counted.
        boundary: intersection and union of the boundary bands ``(2, C)``; None if not asked for.
        trimap: as ``overlap``, within the trimap; None if not asked for.
    """

    overlap: Counts
    pixels: int
    boundary: Counts | None = None
    trimap: Counts | None = None


def evaluate(
    pred: Path,
    gt: Path,
    num_classes: int,
    json: Path | None = None,
    split_list: Path | None = None,
    pred_255: Literal["background", "exclude"] = "background",
    boundary: bool = False,
    gt_suffix: str = ".png",
    gt_offset: int = 0,
    gt_zero: Literal["background", "ignore"] = "background",
    resamples: int = 1000,
    threads: int = 4,
) -> None:
    """Score label files by the data-set confusion matrix and print the protocol with the number.

    Args:
        pred: folder of predicted label files <id>.png, or of tars of them; an output folder of
            predict works too.
        gt: folder of ground-truth label files; 255 in them is ignored.
        num_classes: number of labels, 0 included also where no truth has it (21 for VOC, 151 for
            ADE20K, 60 for Context with and without background, 20 for NightCity).
        json: file for the scores; all of them are in percent.
        split_list: file with the ids to score, or with lines as a split's, such as
            /JPEGImages/x.jpg /SegmentationClass/x.png; without it every file in gt.
        pred_255: a predicted 255 counts as background, or its pixels are excluded.
        boundary: also score boundary IoU and the IoU within 5 pixels of a boundary.
        gt_suffix: what follows the id in a ground-truth file's name.
        gt_offset: subtracted from the values of ground truth other than 255; -1 for labels that
            start at 0 without a background, such as NightCity's trainIds.
        gt_zero: what 0 in the ground-truth files is: background, a value like the others, or ignore
            where it means not labelled (ADE20K, Context-59), whatever gt_offset says.
        resamples: bootstrap resamples of the images behind the standard error.
        threads: files read at a time.
    """
    check_counts(1, threads=threads)
    check_counts(2, resamples=resamples)  # of one there is no deviation
    _require_folder(pred, "pred")
    _require_folder(gt, "gt")
    labels = LabelFolder(pred, "pred")
    ids = _ids_to_score(gt, gt_suffix, split_list)
    numbering = TruthOptions(label_offset=gt_offset, zero_is_ignored=gt_zero == "ignore")
    score = partial(
        _score_files,
        num_classes=num_classes,
        prediction_255=pred_255,
        boundary=boundary,
        numbering=numbering,
    )
    pairs = [(labels.mask_file(name), gt / f"{name}{gt_suffix}") for name in ids]
    scores = _score_all(score, pairs, threads, split_list)
    report = {
        **_protocol(labels.masks, split_list, pred_255, num_classes, numbering),
        **summarise(scores, resamples),
    }
    print(format_report(report))
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_format.dumps(report, indent=2) + "\n", encoding="utf-8")


def summarise(scores: Sequence[ImageScore], resamples: int = 1000) -> dict[str, Any]:
    """Every score of N images, in percent (None where a class does not occur).

    Args:
        scores: one an image.
        resamples: bootstrap resamples of the images.

    Returns:
        ``miou``, ``miou_se``, ``iou`` (a list over labels), ``pixel_accuracy``, ``n_images`` and,
        where they were counted, ``boundary_iou`` and ``trimap_miou`` (None where no image has a
        boundary).
    """
    overlaps = np.stack([score.overlap for score in scores])
    estimate = bootstrap_overlaps(overlaps, resamples)
    summed = overlaps.sum(axis=0)
    iou = np.where(in_mean(summed), divide(summed[0], summed[1]), np.nan)
    pixels = sum(score.pixels for score in scores)
    result = {
        "miou": 100 * estimate.value,
        "miou_se": 100 * estimate.standard_error,
        "iou": _percentages(iou),
        "pixel_accuracy": 100 * float(divide(summed[0].sum(), pixels)),
        "n_images": len(scores),
    }
    bands = [score.boundary for score in scores if score.boundary is not None]
    if bands:
        result["boundary_iou"] = _percentage(mean_band_iou(np.sum(bands, axis=0), summed))
    trimaps = [score.trimap for score in scores if score.trimap is not None]
    if trimaps:
        within = np.sum(trimaps, axis=0)
        result["trimap_miou"] = 100 * mean_overlap(within) if in_mean(within).any() else None
    return result


def format_report(report: dict[str, Any]) -> str:
    """The scores and their protocol as lines of text."""
    values = [f"{label}: {_text(iou)}" for label, iou in enumerate(report["iou"])]
    lines = [
        f"mIoU {report['miou']:.2f} ± {report['miou_se']:.2f} % "
        f"(data-set confusion matrix, standard error over images)",
        f"pixel accuracy {report['pixel_accuracy']:.2f} %",
        *(
            f"{name} {_text(report[key])} %"
            for key, name in (("boundary_iou", "boundary IoU"), ("trimap_miou", "trimap mIoU"))
            if key in report
        ),
        "IoU by label: " + ", ".join(values),
        f"split: {report['split']}",
        f"images: {report['n_images']}",
        f"background rule: {report['background_rule']}",
        f"masks changed by: {report['changed_by']}",
        f"{_truth_rules(report)}; 255 in predictions: {report['prediction_255']}",
    ]
    return "\n".join(lines)


def _truth_rules(report: dict[str, Any]) -> str:
    """How the values of truth were understood; what is usual goes without saying."""
    rules = [f"255 in truth: {report['truth_255']}"]
    if "truth_zero" in report:
        rules.append(f"0 in truth: {report['truth_zero']}")
    if "truth_offset" in report:
        rules.append(f"subtracted from its other values: {report['truth_offset']}")
    return "; ".join(rules)


def score_image(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    num_classes: int,
    prediction_255: Prediction255 = "background",
    boundary: bool = False,
) -> ImageScore:
    """Count one image; the arguments are those of :func:`confusion_matrix`."""
    count = partial(
        confusion_matrix, prediction, num_classes=num_classes, prediction_255=prediction_255
    )
    confusion = count(truth)
    overlap, pixels = overlaps_of(confusion), int(confusion.sum())
    if not boundary:
        return ImageScore(overlap, pixels)
    filled = np.where(prediction == 255, 0, prediction)
    scored = truth if prediction_255 == "background" else np.where(prediction == 255, 255, truth)
    bands = np.stack(boundary_counts(filled, scored, num_classes))
    within = overlaps_of(count(trimap(truth, TRIMAP_WIDTH)))
    return ImageScore(overlap, pixels, bands, within)


def read_labels(path: File) -> NDArray[np.uint8]:
    """Label values ``(H, W)`` of an indexed or 8-bit gray PNG.

    Raises:
        BadItemError: if the file is missing, unreadable or holds colours instead of labels.
    """
    try:
        with Image.open(openable(path)) as image:
            if image.mode not in ("P", "L"):
                msg = f"{path} has mode {image.mode}: labels are read from indexed or gray PNG only"
                raise BadItemError(msg)
            return np.asarray(image)
    except FileNotFoundError as error:
        msg = f"{path} is missing"
        raise BadItemError(msg) from error
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        msg = f"{path} cannot be read: {error}"
        raise BadItemError(msg) from error


def _read_truth(path: Path, num_classes: int, numbering: TruthOptions) -> NDArray[np.uint8]:
    """Label values ``(H, W)`` of ground truth as the data modules number it, 255 ignored.

    Raises:
        BadItemError: as :func:`read_labels`, or a value is beyond the labels once it is renumbered.
    """
    if numbering == TruthOptions():
        return read_labels(path)
    try:
        return read_truth(path, num_classes - 1, numbering)
    except BadItemError as error:
        read_labels(path)  # a file that cannot be read is told as any other
        msg = (
            f"{error}: --num-classes is {num_classes} (0 counts too), --gt-offset "
            f"{numbering.label_offset}; --gt-zero ignore leaves out 0"
        )
        raise BadItemError(msg) from error


def _score_files(
    files: tuple[File, Path],
    num_classes: int,
    prediction_255: Prediction255,
    boundary: bool,
    numbering: TruthOptions,
) -> ImageScore | str:
    """The counts of one pair of files, or what is wrong with it."""
    predicted, true = files
    try:
        prediction, truth = read_labels(predicted), _read_truth(true, num_classes, numbering)
        return score_image(prediction, truth, num_classes, prediction_255, boundary)
    except BadItemError as error:
        return str(error)
    except ValueError as error:
        return f"{predicted} against {true}: {error}"


def _score_all(
    score: Callable[[tuple[File, Path]], ImageScore | str],
    pairs: Sequence[tuple[File, Path]],
    threads: int,
    split_list: Path | None,
) -> list[ImageScore]:
    """Score every pair; raise one error that names all the pairs which cannot be scored."""
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(score, pairs))
    problems = [result for result in results if isinstance(result, str)]
    if not problems:
        return [result for result in results if isinstance(result, ImageScore)]
    more = len(problems) - SHOWN_PROBLEMS
    shown = problems[:SHOWN_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
    hint = "" if split_list else " (to score part of the ground truth give --split-list)"
    msg = f"{len(problems)} of {len(pairs)} images cannot be scored{hint}:\n" + "\n".join(shown)
    raise BadItemError(msg)


def _ids_to_score(gt: Path, gt_suffix: str, split_list: Path | None) -> list[str]:
    """The ids of the list, or of every ground-truth file."""
    if split_list is not None:
        return list(dict.fromkeys(line.image_id for line in read_list(split_list, "split_list")))
    ids = sorted(path.name.removesuffix(gt_suffix) for path in gt.glob(f"*{gt_suffix}"))
    if not ids:
        msg = f"gt {gt} holds no *{gt_suffix} file: give the folder of label files"
        raise ConfigurationError(msg)
    return ids


def _require_folder(path: Path, name: str) -> None:
    """Raise if an argument is not a folder."""
    if not path.is_dir():
        msg = f"{name} {path} is not a folder"
        raise ConfigurationError(msg)


def _protocol(
    masks: Path,
    split_list: Path | None,
    prediction_255: str,
    num_classes: int,
    numbering: TruthOptions,
) -> dict[str, Any]:
    """How the number was made, from the arguments and the run's own record."""
    record = _run_record(masks)
    return {
        "unit": "percent",
        "num_classes": num_classes,
        "split": str(split_list) if split_list else "every ground-truth file",
        "background_rule": record.get("background_rule", "not recorded"),
        "changed_by": _changed_by(record),
        "model": record.get("model", "not recorded"),
        "prediction_255": prediction_255,
        "truth_255": "ignored",
        **({"truth_zero": "ignored"} if numbering.zero_is_ignored else {}),
        **({"truth_offset": numbering.label_offset} if numbering.label_offset else {}),
    }


def _run_record(masks: Path) -> dict[str, Any]:
    """run.json of the run that wrote the masks; empty if there is none."""
    for path in (masks / "run.json", masks.parent / "run.json"):
        if path.is_file():
            record: dict[str, Any] = json_format.loads(path.read_text(encoding="utf-8"))
            return record
    return {}


def _changed_by(record: dict[str, Any]) -> str:
    """What changed the masks before they were written, such as a dense CRF."""
    if "config" not in record:
        return "not recorded"
    callbacks = record["config"].get("changed_by", [])
    return ", ".join(each["class_path"].rpartition(".")[2] for each in callbacks) or "nothing"


def _percentages(values: Fractions) -> list[float | None]:
    """Fractions in percent; nan becomes None, which JSON can hold."""
    return [_percentage(value) for value in values]


def _percentage(value: float) -> float | None:
    """A fraction in percent; nan becomes None."""
    return None if np.isnan(value) else 100 * float(value)


def _text(value: float | None) -> str:
    """A percentage, or a dash."""
    return "-" if value is None else f"{value:.2f}"
