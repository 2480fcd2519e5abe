"""What depends on an image alone, kept on disk for the next run over the same images.

A file is named by a hash of the image as the networks see it and of the networks themselves, so
neither a changed image nor another model, size or number format finds it.
"""

import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

from g4seg_pl.callbacks.run_record import class_path
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.types import ConfigurationError

# To be raised when a change of code changes what networks make of an image.
_FORMAT = 1
_PROBE = bytes(2**16)  # more than a full disk may still have in a block begun
_PLAIN = (str, int, float, type(None), Enum, Path, np.generic, np.dtype, torch.dtype)
# What every module has, and diffusers' configuration, in which the model's folder is named.
_NO_SETTINGS = {*vars(nn.Module()), "_internal_dict"} - {"training"}
_DECODING = ("decoder", "post_quant_conv")
# What numpy and zipfile raise about a file that is cut short, flipped, or of another kind.
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
    BadZipFile,
    zlib.error,
)


class FeatureCache:
    """A folder of float16 arrays, one file an image and kind; any number of processes may share it.

    What is computed is rounded to float16 before it is used, so that a run that fills the folder
    and one that reads it get the same masks.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Remember where and for which networks.

        Args:
            folder: made when something is kept.
            identity: of the networks, as ``identity_of`` returns it.
        """
        self.folder = folder
        self.identity = identity
        self._writable = True

    def fetch(
        self,
        name: str,
        images: Float[Tensor, "b 3 H W"],
        compute: Callable[[Float[Tensor, "m 3 H W"]], Float[Tensor, "m c h w"]],
    ) -> Float[Tensor, "b c h w"]:
        """Return what ``compute`` makes of images, float32, computing only what is not kept.

        A file that is damaged or was put there by something else is written anew. What float16
        cannot hold is not kept. If the disk refuses a file, standard error says so once,
        and nothing more is kept.

        Args:
            name: of the quantity.
            images: in [-1, 1], as the networks see them.
            compute: is given the images that are missing, in order.
        """
        keys = [self._key(name, image) for image in images.float().cpu()]
        rows = {
            index: row for index, key in enumerate(keys) if (row := self._read(key)) is not None
        }
        missing = [index for index in range(len(keys)) if index not in rows]
        if missing:
            for index, row in zip(missing, compute(images[missing]), strict=True):
                rows[index] = self._keep(keys[index], row.float().cpu())
        return torch.stack([rows[index] for index in range(len(keys))]).to(images.device)

    def _key(self, name: str, image: Tensor) -> str:
        digest = sha256(f"{_FORMAT} {self.identity} {name} {tuple(image.shape)} ".encode())
        digest.update(_bytes(image))
        return digest.hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"

    def _read(self, key: str) -> Tensor | None:
        try:
            # Opened here: np.load leaves a file that it cannot read open.
            with (
                self._path(key).open("rb") as stream,
                np.load(stream, allow_pickle=False) as content,
            ):
                if str(content["key"]) != key or content["values"].dtype != np.float16:
                    return None
                return torch.from_numpy(content["values"]).float()
        except _UNREADABLE:
            return None  # as if it were not there: it is computed, and written over this

    def _keep(self, key: str, row: Tensor) -> Tensor:
        half = row.half()
        if not half.isfinite().all():
            return row
        if self._writable:
            try:
                self._write(key, half)
            except OSError as error:  # it only costs the next run time
                self._writable = False
                problem = f"cache_features {self.folder} cannot be written ({error})"
                print(f"{problem}: no more is kept, and the run goes on", file=sys.stderr)
        return half.float()

    def _write(self, key: str, half: Tensor) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: another process may be writing the same image.
        temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as stream:
                np.savez(stream, key=np.str_(key), values=half.numpy())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def open_cache(folder: str, vae: AutoencoderKL, features: DenseFeatures) -> FeatureCache:
    """Return the cache of loaded networks.

    Args:
        folder: of the files.
        vae: the generator's autoencoder.
        features: the extractor, loaded.
    """
    return FeatureCache(Path(folder).expanduser(), identity_of(vae, features))


def check_folder(folder: str) -> None:
    """Make the folder, or refuse one that cannot be made or written to.

    One that holds something is taken all the same: it can be read.

    Raises:
        ConfigurationError: names it.
    """
    place, what = Path(folder).expanduser(), "made"
    try:
        place.mkdir(parents=True, exist_ok=True)
        what = "written"
        with TemporaryFile(dir=place) as probe:  # it is gone when it is closed, or after a kill
            probe.write(_PROBE)
    except OSError as error:
        if place.is_dir() and any(place.iterdir()):
            return
        message = f"cache_features {folder} cannot be {what} ({error}); give a folder to write to"
        raise ConfigurationError(message) from error


def identity_of(vae: AutoencoderKL, features: DenseFeatures) -> str:
    """Return a hash of all that decides what is made of an image: weights and settings.

    Args:
        vae: the generator's autoencoder; its decoder does not count.
        features: the extractor, loaded.
    """
    scale = (vae.config.scaling_factor, vae.config.shift_factor)
    digest = sha256(f"{scale} ".encode())
    for network, left_out in ((vae, _DECODING), (features, ())):
        for part in _described(network, left_out):
            digest.update(part)
    return digest.hexdigest()


def _described(network: nn.Module, left_out: tuple[str, ...]) -> Iterator[bytes]:
    for name, part in network.named_modules():
        if not name.startswith(left_out):
            # Settings beside the weights: normalisation, activations, heads, a chosen layer.
            settings = {key: each for key, each in vars(part).items() if key not in _NO_SETTINGS}
            yield f"{name} {class_path(part)} {_text(settings)} ".encode()
    for name, weight in network.state_dict().items():
        if not name.startswith(left_out):
            yield f"{name} {weight.dtype} {tuple(weight.shape)} ".encode()
            yield _bytes(weight)


def _text(value: object) -> str:
    """A setting in words that are the same in every process; of other objects, their class."""
    match value:
        case dict():
            return f"{{{', '.join(sorted(f'{key}: {_text(it)}' for key, it in value.items()))}}}"
        case list() | tuple():
            return f"({', '.join(map(_text, value))})"
        case set() | frozenset():
            return f"({', '.join(sorted(map(_text, value)))})"
        case torch.Tensor():
            return f"{value.dtype} {tuple(value.shape)} {sha256(_bytes(value)).hexdigest()}"
        case np.ndarray():
            return f"{value.dtype} {value.shape} {sha256(value.tobytes()).hexdigest()}"
        case _ if is_dataclass(value) and not isinstance(value, type):
            return _text({each.name: getattr(value, each.name) for each in fields(value)})
    return repr(value) if isinstance(value, _PLAIN) else class_path(value)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
