"""The restricted reader: what honest files hold, and that hostile files execute nothing."""

import codecs
import collections
import copyreg
import io
import os
import pickle
import struct
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from datamodules.npy import read_npy, read_npz
from datamodules.unpickle import unpickle
from g4seg_pl.types import BadItemError


def npy_of(pickled: bytes) -> bytes:
    """A `.npy` file that claims one object and holds the given pickle."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|O", "fortran_order": False, "shape": ()}
    )
    return stream.getvalue() + pickled


class Calls:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, self.args


class WithState:
    """Pickles as an object whose `__setstate__` runs code."""

    ran = False

    def __setstate__(self, state: object) -> None:
        WithState.ran = True

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}


def shell(mark: Path) -> str:
    return f"touch {mark}"


def raw(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def torch_storage_with(mark: Path) -> bytes:
    stream = io.BytesIO()
    torch.save(Calls(os.system, shell(mark)), stream, _use_new_zipfile_serialization=False)
    return pickle.dumps(Calls(torch.storage._load_from_bytes, stream.getvalue()), 4)


def torch_zip_with(mark: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"a": Calls(os.system, shell(mark))}, stream)
    return pickle.dumps(Calls(torch.storage._load_from_bytes, stream.getvalue()), 4)


def extension_code(mark: Path) -> bytes:
    """EXT1 takes from copyreg's cache without asking find_class."""
    code = 240
    if code not in copyreg._inverted_registry:
        copyreg.add_extension("posix", "system", code)
        pickle.loads(raw(b"\x82" + bytes([code])))
    return raw(b"\x82" + bytes([code]), text(shell(mark)), b"\x85R")


def forged_array(dtype_state: bytes, data: bytes) -> bytes:
    return raw(
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R",
        b"(K\x01K\x01\x85",
        b"cnumpy\ndtype\n" + dtype_state,
        b"\x89" + data + b"tb",
    )


O8 = text("O8") + b"\x89\x88\x87R"
STRUCTURED = (
    text("V8") + b"\x89\x88\x87R"
    b"(K\x03" + text("|") + b"N" + text("f") + b"\x85}" + b"K\x08K\x01K\x00tb"
)

HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda mark: pickle.dumps(Calls(os.system, shell(mark)), 4),
    "os.system, protocol 0": lambda mark: pickle.dumps(Calls(os.system, shell(mark)), 0),
    "builtins.eval": lambda mark: pickle.dumps(Calls(eval, f"open({str(mark)!r}, 'w')"), 4),
    "builtins.exec": lambda mark: pickle.dumps(Calls(exec, f"open({str(mark)!r}, 'w')"), 2),
    "subprocess.Popen": lambda mark: pickle.dumps(Calls(subprocess.Popen, ["touch", str(mark)]), 4),
    "nested in an array": lambda mark: pickle.dumps(
        np.array({"keys": [Calls(os.system, shell(mark))]}, dtype=object), 4
    ),
    "nested in a torch storage": torch_storage_with,
    "nested in a torch zip file": torch_zip_with,
    "numpy.load": lambda mark: pickle.dumps(Calls(np.load, str(mark), None, True), 4),
    "numpy.save": lambda mark: pickle.dumps(Calls(np.save, str(mark), 1), 4),
    "numpy's test runner": lambda mark: raw(
        b"cnumpy.testing._private.utils\nrunstring\n",
        text(f"open({str(mark)!r}, 'w')") + b"}\x86R",
    ),
    "getattr chain": lambda mark: raw(
        b"c__builtin__\ngetattr\ncposix\n_exit\n" + text("__self__") + b"\x86R"
    ),
    "dotted name": lambda mark: (
        b"\x80\x04\x8c\x05numpy\x8c\x18ndarray.__class__.__new__\x93" + text(str(mark)) + b"\x85R."
    ),
    "codecs": lambda mark: pickle.dumps(Calls(codecs.decode, b"x", "bz2"), 4),
    "_codecs.encode with another codec": lambda mark: raw(
        b"c_codecs\nencode\n" + text("x") + text("punycode") + b"\x86R"
    ),
    "object with __setstate__": lambda mark: pickle.dumps(WithState(), 4),
    "INST": lambda mark: b"(S'touch " + str(mark).encode() + b"'\niposix\nsystem\n.",
    "OBJ": lambda mark: raw(b"(cposix\nsystem\n" + text(shell(mark)) + b"o"),
    "NEWOBJ": lambda mark: raw(b"cnumpy\ndtype\n" + text("f4") + b"\x85\x81"),
    "copyreg extension code": extension_code,
    "persistent id": lambda mark: b"Px\n.",
    "setting attributes of a function": lambda mark: raw(
        b"ccollections\nOrderedDict\nN}" + text("_call") + b"cnumpy\ndtype\ns\x86b"
    ),
    "bytes as object pointers": lambda mark: forged_array(O8, b"C\x08AAAAAAAA"),
    "structured dtype over bytes": lambda mark: forged_array(STRUCTURED, b"C\x08AAAAAAAA"),
    "huge memo index": lambda mark: raw(b"Nr\xff\xff\xff\x7f"),
    "huge byte string": lambda mark: b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
    "contains itself": lambda mark: raw(b"]q\x00h\x00a"),
    "deep nesting": lambda mark: raw(b"]" * 100_000 + b"a" * 99_999),
    "truncated": lambda mark: pickle.dumps({"a": np.zeros(9)}, 4)[:-20],
    "a bare function": lambda mark: raw(b"cnumpy\ndtype\n"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_execute_nothing_and_name_the_file(name: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / "2007_000032.npy"
    path.write_bytes(npy_of(HOSTILE[name](mark)))
    WithState.ran = False
    with pytest.raises(BadItemError, match=r"2007_000032\.npy"):
        read_npy(path)
    assert not mark.exists()
    assert not WithState.ran


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "subprocess.Popen", "INST"])
def test_the_hostile_files_are_live(name: str, tmp_path: Path) -> None:
    """Plain unpickling does execute them, so that the test above tests something."""
    mark = tmp_path / "executed"
    result = pickle.loads(HOSTILE[name](mark))
    if isinstance(result, subprocess.Popen):
        result.wait()
    if isinstance(result, io.IOBase):
        result.close()
    assert mark.exists()


def test_a_hostile_pickle_leaves_the_reader_unchanged(tmp_path: Path) -> None:
    """A pickle that tried to change an admitted function does not affect the next file."""
    for pickled in (HOSTILE["setting attributes of a function"](tmp_path),):
        with pytest.raises(BadItemError):
            unpickle(pickled, "bad.npy")
    assert unpickle(pickle.dumps(collections.OrderedDict(a=1)), "good.npy") == {"a": 1}


@pytest.mark.parametrize(
    ("shape", "descr"), [((10**6, 10**6), "<f4"), ((2**62, 2**62), "<f8"), ((-1,), "<f4")]
)
def test_a_header_that_lies_is_refused_before_allocation(
    shape: tuple[int, ...], descr: str, tmp_path: Path
) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    path = tmp_path / "huge.npy"
    path.write_bytes(stream.getvalue() + b"1234")
    with pytest.raises(BadItemError, match=r"huge\.npy"):
        read_npy(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x10\x00{__import__", b"junk" * 99],
)
def test_files_that_are_no_arrays(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.npy"
    path.write_bytes(content)
    with pytest.raises(BadItemError, match=r"bad\.npy"):
        read_npy(path)
    with pytest.raises(BadItemError, match=r"bad\.npy"):
        read_npz(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadItemError, match=r"none\.npy"):
        read_npy(tmp_path / "none.npy")


def test_truncated_array(tmp_path: Path) -> None:
    path = tmp_path / "cut.npy"
    np.save(path, np.ones((3, 4, 5)))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BadItemError, match=r"cut\.npy"):
        read_npy(path)


def test_hostile_member_of_an_archive(tmp_path: Path) -> None:
    path, mark = tmp_path / "a.npz", tmp_path / "executed"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy_of(HOSTILE["os.system"](mark)))
    with pytest.raises(BadItemError, match=r"a\.npz \[x\.npy\]"):
        read_npz(path)
    assert not mark.exists()


@given(
    array=hnp.arrays(
        st.sampled_from(["<f2", "<f4", ">f8", "|u1", "<i8", ">i4", "|b1"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    protocol=st.integers(2, 4),
)
def test_arrays_survive(array: np.ndarray, protocol: int) -> None:
    content = {"keys": array, 3: [array.T, (1.5, None, "x", b"y", True)], np.int64(4): "z"}
    read = unpickle(pickle.dumps(content, protocol), "x")
    assert isinstance(read, dict)
    np.testing.assert_array_equal(read["keys"], array)
    np.testing.assert_array_equal(read[3][0], array.T)
    assert read["keys"].dtype == array.dtype
    assert read[3][1] == (1.5, None, "x", b"y", True)
    assert read[4] == "z"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([3, 14]),
        torch.rand(2, 5, 7),
        torch.rand(2, 5, 7).half(),
        torch.rand(4, 6).T[1:4, ::2],
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.rand(3).requires_grad_(),
    ],
)
def test_torch_tensors_become_arrays(tensor: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "irn.npy"
    np.save(path, {"keys": tensor, "again": tensor}, allow_pickle=True)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = read_npy(path)
    assert isinstance(content, dict)
    for value in content.values():
        assert isinstance(value, np.ndarray)
        np.testing.assert_array_equal(value, tensor.detach().numpy())


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    tensor = torch.rand(3, 4).bfloat16()
    np.save(tmp_path / "b.npy", {"cam": tensor}, allow_pickle=True)  # type: ignore[arg-type]
    content = read_npy(tmp_path / "b.npy")
    assert isinstance(content, dict)
    np.testing.assert_array_equal(content["cam"], tensor.float().numpy())


def test_a_tensor_larger_than_its_storage_is_refused() -> None:
    class Forged:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            storage = torch.rand(4)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, 2, (10**6, 3), (1, 1), False, {})

    with pytest.raises(BadItemError, match="storage does not hold"):
        unpickle(pickle.dumps(Forged(), 4), "forged.npy")


def test_shared_parts_are_resolved_once() -> None:
    """Sixty doublings would be 2**60 lists if each were copied out."""
    nested: list[object] = [0]
    for _ in range(60):
        nested = [nested, nested]
    assert isinstance(unpickle(pickle.dumps(nested, 4), "x"), list)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(content: bytes) -> None:
    try:
        unpickle(content, "fuzz.npy")
    except BadItemError as error:
        assert "fuzz.npy" in str(error)  # noqa: PT017 - most random bytes fail, a few are valid


@given(st.data())
def test_damaged_honest_files(data: st.DataObject) -> None:
    stream = io.BytesIO()
    np.save(stream, {"keys": np.arange(2), "cam": np.ones((2, 2, 2))}, allow_pickle=True)  # type: ignore[arg-type]
    content = bytearray(stream.getvalue()[stream.getvalue().index(b"\n") + 1 :])
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        unpickle(bytes(content), "fuzz.npy")
    except BadItemError as error:
        assert "fuzz.npy" in str(error)  # noqa: PT017 - some damage hits only the values


def test_archives_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, foreground=np.ones((2, 3, 4)), class_ids=np.array([1, 2]))
    content = read_npz(path)
    assert set(content) == {"foreground", "class_ids"}
    np.testing.assert_array_equal(content["foreground"], np.ones((2, 3, 4)))
