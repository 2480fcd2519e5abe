"""Seed files as their projects write them."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import savemat

SIZE = (13, 18)
IDS = (3, 15)
CLASSES = 20
Maps = NDArray[np.float32]


def save(path: Path, content: object) -> Path:
    np.save(path, content, allow_pickle=True)  # type: ignore[arg-type]
    return path


def clip_es(path: Path, maps: Maps) -> Path:
    keys = np.array([2, 14])
    return save(path / "a.npy", {"keys": keys, "attn_highres": maps.astype(np.float16)})


def irn(path: Path, maps: Maps) -> Path:
    cam = torch.from_numpy(maps)[:, ::4, ::4]
    return save(path / "a.npy", {"keys": torch.tensor([2, 14]), "cam": cam, "high_res": maps})


def toco(path: Path, maps: Maps) -> Path:
    return save(path / "a.npy", {"keys": np.array([2, 14]), "high_res": maps})


def seam(path: Path, maps: Maps) -> Path:
    return save(path / "a.npy", {2: maps[0], 14: maps[1]})


def seam_crf(path: Path, maps: Maps) -> Path:
    full = np.concatenate([np.ones((1, *SIZE), np.float32), maps])
    full = full / full.sum(axis=0)
    return save(path / "a.npy", {0: full[0], 3: full[1], 15: full[2]})


def weaktr(path: Path, maps: Maps) -> Path:
    full = np.concatenate([np.ones((1, *SIZE), np.float32), maps])
    return save(path / "a.npy", {"prob": full / full.sum(axis=0), "keys": np.array([0, 3, 15])})


def diffsegmenter(path: Path, maps: Maps) -> Path:
    savemat(path / "a.mat", {"2": maps[0] * 255, "14": maps[1] * 255})
    return path / "a.mat"


def named_npz(path: Path, maps: Maps) -> Path:
    np.savez(path / "a.npz", class_ids=np.array(IDS), foreground=maps)
    return path / "a.npz"


def all_classes(path: Path, maps: Maps) -> Path:
    full = np.zeros((CLASSES, *SIZE), np.float32)
    full[[2, 14]] = maps
    return save(path / "a.npy", full)


def with_background(path: Path, maps: Maps) -> Path:
    full = np.zeros((CLASSES + 1, *SIZE), np.float32)
    full[[3, 15]] = maps
    return save(path / "a.npy", full)
