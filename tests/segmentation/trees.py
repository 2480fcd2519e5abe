"""A VOC tree of three images with a folder of masks as `g4seg predict` writes it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fake_voc import IDS, write_voc
from PIL import Image

from datamodules import PseudoLabelDataModule, VOCDataModule
from g4seg_pl.callbacks.output_folder import OutputFolder
from g4seg_pl.core.background import PowerBackground, compose_label
from g4seg_pl.segmentation.augmentation import Augmentation
from g4seg_pl.types import RefinedMask

RULE = {
    "class_path": "g4seg_pl.core.background.PowerBackground",
    "init_args": {"power": 1.0},
}


def write_tree(root: Path, ids: Sequence[str] = IDS) -> Path:
    """Write `VOCdevkit` (splits train and val are the same images) and `refined`."""
    voc = write_voc(root, ids)
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "val.txt").write_text((lists / "train.txt").read_text())
    write_labels(root / "refined", root / "cam_out", ids)
    return voc


def write_labels(out: Path, seeds: Path, ids: Sequence[str] = IDS) -> None:
    """Write masks, soft maps and run.json from CLIP-ES seeds."""
    folder = OutputFolder(out, "npz")
    folder.make()
    for image_id in ids:
        content = np.load(seeds / f"{image_id}.npy", allow_pickle=True).item()
        maps = torch.from_numpy(content["attn_highres"].astype(np.float32))
        classes = tuple(int(key) + 1 for key in content["keys"])
        label = compose_label(maps, classes, PowerBackground(1.0))
        folder.save(RefinedMask(image_id, classes, maps, label))
    record = {"config": {"model": {"init_args": {"background": RULE}}}, "split": "train"}
    folder.run_json.write_text(json.dumps(record))


def data_module(root: Path, **changes: Any) -> PseudoLabelDataModule:
    """The data of a tree, with small crops, read in this process."""
    settings: dict[str, Any] = {
        "labels": root / "refined",
        "augmentation": Augmentation(crop_size=32, colour=0.2),
        "batch_size": 2,
        "num_workers": 0,
    }
    return PseudoLabelDataModule(VOCDataModule(root, split="train"), **(settings | changes))


def label_file(path: Path) -> np.ndarray:
    """The label values in a PNG file."""
    return np.array(Image.open(path))
