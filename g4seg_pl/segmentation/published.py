"""Names of published DeepLab checkpoints, put into those of torchvision's ResNet.

Two families are in use, both converted from the authors' caffe models: kazuto1011/deeplab-pytorch
(``layer2.block1.reduce.conv.weight``; ``base.`` before it in whole networks) and
isht7/pytorch-deeplab-resnet with its many descendants (torchvision's own names behind ``Scale.``,
the classifier in ``layer5.conv2d_list``). Checkpoints of torchvision's classifiers and of its
segmentation networks (``backbone.`` before the names) pass through.
"""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from g4seg_pl.types import ConfigurationError

Weights = dict[str, Tensor]

_BRANCHES = {"reduce": 1, "conv3x3": 2, "increase": 3}
_WRAPPERS = re.compile(r"^(module\.|base\.|backbone\.|Scale\.|scale\.)+")
_SHORTCUTS = {"conv": "0", "bn": "1"}


def read_weights(path: Path) -> Weights:
    """Read a checkpoint file of tensors; nothing else in it is unpickled.

    Args:
        path: a ``.pth`` file: a state dict, or a dictionary with one under ``state_dict``.

    Raises:
        ConfigurationError: there is no such file, or it holds no weights.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        msg = f"weights: no file {path}; give imagenet, random, or the path of a checkpoint"
        raise ConfigurationError(msg) from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        msg = f"weights: {path} cannot be read as a file of tensors: {error}"
        raise ConfigurationError(msg) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        msg = f"weights: {path} holds no tensors by name; give a state dict"
        raise ConfigurationError(msg)
    return weights


def is_caffe(weights: Weights) -> bool:
    """Whether weights stem from caffe: pictures in BGR from 0 to 255, stride in the first 1x1."""
    marks = (".block1.", "Scale.", "layer5.conv2d_list")
    return any(mark in name for name in weights for mark in marks)


def backbone_weights(weights: Weights) -> Weights:
    """Return the weights of the ResNet under torchvision's names; heads are left out."""
    renamed = {_resnet_name(name): value for name, value in weights.items()}
    return {name: value for name, value in renamed.items() if name is not None}


def head_weights(weights: Weights) -> Weights:
    """Return the weights of the four classifiers as ``branches.<i>.weight`` and ``.bias``."""
    found: Weights = {}
    for name, value in weights.items():
        match = re.fullmatch(
            r"(?:aspp\.c|layer5\.conv2d_list\.)(\d)\.(weight|bias)", _WRAPPERS.sub("", name)
        )
        if match:
            found[f"branches.{match[1]}.{match[2]}"] = value
    return found


def _resnet_name(name: str) -> str | None:
    """The torchvision name of a weight; None if it does not belong to the ResNet."""
    name = _WRAPPERS.sub("", name)
    if stem := re.fullmatch(r"layer1\.conv1\.(conv|bn)\.(\w+)", name):
        return f"{'conv1' if stem[1] == 'conv' else 'bn1'}.{stem[2]}"
    pattern = r"layer(\d)\.block(\d+)\.(reduce|conv3x3|increase|shortcut)\.(conv|bn)\.(\w+)"
    if block := re.fullmatch(pattern, name):
        place = f"layer{int(block[1]) - 1}.{int(block[2]) - 1}"
        if block[3] == "shortcut":
            return f"{place}.downsample.{_SHORTCUTS[block[4]]}.{block[5]}"
        return f"{place}.{block[4]}{_BRANCHES[block[3]]}.{block[5]}"
    return name if re.match(r"conv1\.|bn1\.|layer[1-4]\.\d+\.", name) else None
