"""Unpickling seed files without executing anything they contain.

Seed files of this field are NumPy files that hold a pickled dictionary, and unpickling runs
whatever a pickle names. Here a pickle may name a handful of reconstructors only, and even those
are replaced by stand-ins that check their arguments: NumPy's own `__setstate__` methods trust
their input (a forged dtype makes raw bytes pass for object pointers), so no NumPy object is built
from a state. The arrays are made afterwards from plain bytes.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import bad_item
from datamodules.files import File

if TYPE_CHECKING:
    from torch.storage import TypedStorage

ByteOrder = Literal["<", ">", "|", "="]

# What pickle itself writes for the admitted types under protocols 2 to 4. Left out on purpose:
# INST, OBJ, NEWOBJ (build objects), EXT1/2/4 (copyreg codes skip find_class), PERSID (callbacks).
_OPCODE_NAMES = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG "
    "LONG1 LONG4 FLOAT BINFLOAT BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 "
    "TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET PUT BINPUT LONG_BINPUT "
    "GET BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD"
)
_OPCODES = frozenset(_OPCODE_NAMES.split())
_NUMBERS = re.compile(r"[<>=|]?(b1|\?|[iu][1248]|f[248])")
_BYTE_ORDERS = ("<", ">", "|", "=")
REMEDY = "Write the file again as plain NumPy arrays, or leave it out"


class _Admitted:
    """A callable that a pickle may name; it can be called, and neither changed nor subclassed."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *args: object) -> object:
        return self._call(*args)

    def __setstate__(self, state: object) -> None:
        message = "it sets attributes of a function"
        raise pickle.UnpicklingError(message)


class _Dtype:
    """Stand-in for `numpy.dtype`: a type code and, set by BUILD, a byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: object) -> None:
        self.code = str(code)
        self.order: ByteOrder = "|"

    def __setstate__(self, state: object) -> None:
        version, order, subarray, names, fields, *_ = cast("tuple[object, ...]", state)
        if (subarray, names, fields) != (None, None, None) or order not in _BYTE_ORDERS:
            message = f"it contains a structured array (dtype state version {version})"
            raise pickle.UnpicklingError(message)
        self.order = cast("ByteOrder", order)

    def number(self) -> np.dtype[np.generic]:
        """The dtype of an array of numbers or booleans."""
        if not _NUMBERS.fullmatch(self.code):
            message = f"it contains an array of dtype {self.code[:40]!r}"
            raise pickle.UnpicklingError(message)
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """Stand-in for `numpy.ndarray`: keeps the pickled state until the array is made from it."""

    __slots__ = ("data", "dtype", "fortran", "shape")

    def __setstate__(self, state: object) -> None:
        _, shape, dtype, fortran, data = cast("tuple[object, ...]", state)
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | list):
            message = "it contains an array with a forged state"
            raise pickle.UnpicklingError(message)
        self.shape = tuple(int(side) for side in cast("tuple[int, ...]", shape))
        self.dtype, self.fortran, self.data = dtype, bool(fortran), data

    def numbers(self) -> NDArray[np.generic]:
        """The array, copied out of the bytes; ValueError if they do not fill the shape."""
        flat = np.frombuffer(cast("bytes", self.data), dtype=self.dtype.number())
        return flat.reshape(self.shape, order="F" if self.fortran else "C").copy()


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _NDARRAY:
        message = "it reconstructs something that is not an array"
        raise pickle.UnpicklingError(message)
    return _Array()


def _scalar(dtype: object, data: object = None) -> np.generic:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        message = "it contains a scalar with a forged state"
        raise pickle.UnpicklingError(message)
    return cast("np.generic", np.frombuffer(data, dtype=dtype.number(), count=1)[0])


def _encode(text: object, encoding: object) -> bytes:
    """What protocol 2 uses for bytes; no other codec is reachable."""
    if not isinstance(text, str) or encoding != "latin1":
        message = f"it asks for the codec {encoding!r:.40}"
        raise pickle.UnpicklingError(message)
    return text.encode("latin1")


class _Storage:
    """A torch storage on its way into a tensor; a pickle cannot touch its attributes."""

    __slots__ = ("typed",)

    def __init__(self, typed: "TypedStorage") -> None:
        self.typed = typed

    def __setstate__(self, state: object) -> None:
        message = "it sets attributes of a torch storage"
        raise pickle.UnpicklingError(message)


def _torch_storage(data: object) -> _Storage:
    """A torch storage; its bytes are a pickle again, which torch's own restricted reader takes."""
    import torch

    if not isinstance(data, bytes):
        message = "it contains a torch storage that is not made of bytes"
        raise pickle.UnpicklingError(message)
    storage = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    if not isinstance(storage, torch.storage.TypedStorage):
        message = f"it contains a {type(storage).__name__} where a torch storage is expected"
        raise pickle.UnpicklingError(message)
    return _Storage(storage)


def _torch_tensor(
    storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> NDArray[np.generic]:
    """The tensor as an array; bounds are checked since `set_` would enlarge a short storage."""
    import torch

    if not isinstance(storage, _Storage):
        message = "it contains a torch tensor without a storage"
        raise pickle.UnpicklingError(message)
    # Private, because the public accessors of typed storages give deprecation warnings.
    values, dtype = storage.typed._untyped_storage, storage.typed.dtype
    sizes, strides = [int(n) for n in size], [int(n) for n in stride]
    last = int(offset) + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    elements = int(np.prod(sizes, dtype=object))
    numel = values.nbytes() // dtype.itemsize
    if (
        min([0, int(offset), *sizes, *strides]) < 0
        or elements > numel
        or (elements and last >= numel)
    ):
        message = f"it contains a torch tensor of {sizes} that its storage does not hold"
        raise pickle.UnpicklingError(message)
    tensor = torch.empty(0, dtype=dtype)
    tensor.set_(values, int(offset), torch.Size(sizes), tuple(strides))
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return cast("NDArray[np.generic]", tensor.numpy().copy())


_NDARRAY = _Admitted(_Array)
_RECONSTRUCTORS: dict[tuple[str, str], _Admitted] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Admitted(_Dtype),
    ("_codecs", "encode"): _Admitted(_encode),
    ("__builtin__", "bytes"): _Admitted(lambda: b""),  # empty bytes under protocol 2
    ("collections", "OrderedDict"): _Admitted(lambda *args: dict(*args)),
    ("torch.storage", "_load_from_bytes"): _Admitted(_torch_storage),
    ("torch._utils", "_rebuild_tensor_v2"): _Admitted(_torch_tensor),
} | {
    (f"numpy.{core}.multiarray", name): _Admitted(call)
    for core in ("core", "_core")  # renamed in NumPy 2
    for name, call in (("_reconstruct", _reconstruct), ("scalar", _scalar))
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Admitted:
        try:
            return _RECONSTRUCTORS[module, name]
        except KeyError:
            message = f"it calls {module}.{name}"
            raise pickle.UnpicklingError(message) from None


def _check_opcodes(data: bytes) -> None:
    """Refuses, before anything is loaded, opcodes and memo sizes that no honest file has."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            message = f"it contains the pickle opcode {opcode.name}"
            raise pickle.UnpicklingError(message)
        # The C unpickler allocates its memo up to the index named.
        if opcode.name.endswith("PUT") and cast("int", argument) > len(data):
            message = "it contains a memo index beyond its own size"
            raise pickle.UnpicklingError(message)


def _plain(value: object, done: dict[int, object], inside: frozenset[int]) -> object:
    """Replaces stand-ins by arrays, and object arrays by lists, throughout plain containers."""
    if isinstance(value, np.ndarray | np.generic | str | bytes | int | float | None):
        return value
    if id(value) in inside:
        message = "it contains itself"
        raise pickle.UnpicklingError(message)
    # Shared parts are resolved once: nested doubling would otherwise grow without bound.
    if id(value) not in done:
        done[id(value)] = _resolve(value, done, inside | {id(value)})
    return done[id(value)]


def _resolve(value: object, done: dict[int, object], inside: frozenset[int]) -> object:
    match value:
        case _Array(data=list(items)):
            return [_plain(item, done, inside) for item in items]
        case _Array():
            return value.numbers()
        case dict():
            return {_key(key): _plain(item, done, inside) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return type(value)([_plain(item, done, inside) for item in value])
    message = f"it contains a bare {type(value).__name__.strip('_')}"
    raise pickle.UnpicklingError(message)


def _key(key: object) -> object:
    if isinstance(key, str | bytes | int | float | np.generic):
        return key
    message = "it contains a dictionary key that is neither text nor number"
    raise pickle.UnpicklingError(message)


def unpickle(data: bytes, name: File | str) -> object:
    """Unpickles arrays, torch tensors, numbers, text and plain containers, and nothing else.

    Args:
        data: the pickle.
        name: the file it comes from, for the error.

    Returns:
        Plain Python containers; arrays and torch tensors as NumPy arrays, arrays of objects as
        lists.

    Raises:
        BadItemError: anything else is in it, or it is damaged. Nothing has been executed.
    """
    try:
        _check_opcodes(data)
        return _plain(_RestrictedUnpickler(io.BytesIO(data)).load(), {}, frozenset())
    except Exception as error:  # a forged pickle can make the unpickler raise anything
        raise bad_item(name, f"unsafe or damaged pickle: {error}", REMEDY) from error
