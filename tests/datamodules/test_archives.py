"""Members of tars: by every kind of address, from every process, and what is wrong by name."""

import io
import multiprocessing
import pickle
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from datamodules.archives import TarArchive
from g4seg_pl.types import BadItemError, ConfigurationError

rng = np.random.default_rng(0)
CONTENTS = {f"{index:06d}.jpg": rng.bytes(700 + 311 * index) for index in range(6)}


def tar_of(contents: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "images-000.tar"
    path.write_bytes(tar_of(CONTENTS))
    return path


@pytest.fixture
def memory() -> Iterator[str]:
    address = "memory://bucket/images-000.tar"
    with fsspec.open(address, "wb") as file:
        file.write(tar_of(CONTENTS))
    yield address
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def contents_of(archive: TarArchive) -> dict[str, bytes]:
    return {name: archive.read(name) for name in archive.names()}


def test_members_of_a_local_tar(local: Path) -> None:
    assert list(contents_of(TarArchive(local)).items()) == list(CONTENTS.items())


def test_members_of_a_tar_elsewhere(memory: str) -> None:
    assert list(contents_of(TarArchive(memory)).items()) == list(CONTENTS.items())


def test_members_in_any_order(local: Path) -> None:
    archive = TarArchive(local)
    for name in reversed(CONTENTS):
        assert archive.read(name) == CONTENTS[name]
        assert archive.size(name) == len(CONTENTS[name])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, format: int) -> None:
    contents = {f"{'folder/' * 20}é.jpg": b"1", "./b.jpg": b"", "c.jpg": b"x" * 512}
    (tmp_path / "a.tar").write_bytes(tar_of(contents, format))
    assert contents_of(TarArchive(tmp_path / "a.tar")) == contents


def test_only_files_count_and_the_last_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    (tmp_path / "folder").mkdir()
    for name, content in (("a.txt", b"old"), ("b.txt", b"b"), ("new.txt", b"new")):
        (tmp_path / "folder" / name).write_bytes(content)
    (tmp_path / "folder" / "link").symlink_to("a.txt")
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "folder", "folder")
    with tarfile.open(path, "a") as tar:
        tar.add(tmp_path / "folder" / "new.txt", "folder/a.txt")
    found = contents_of(TarArchive(path))
    assert found == {"folder/b.txt": b"b", "folder/new.txt": b"new", "folder/a.txt": b"new"}
    assert list(found)[-1] == "folder/a.txt"


def test_empty_tar_has_no_names(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({}))
    assert TarArchive(tmp_path / "a.tar").names() == ()


def test_pickled_with_its_index_without_its_handle(local: Path) -> None:
    archive = TarArchive(local)
    archive.read("000001.jpg")
    again = pickle.loads(pickle.dumps(archive))
    # Only what the index says of the tar is left to go by: its headers are gone.
    content = local.read_bytes()
    local.write_bytes(b"\0" * 512 + content[512:])
    assert contents_of(again) == CONTENTS


def _read_all(archive: TarArchive, times: int) -> bool:
    return all(contents_of(archive) == CONTENTS for _ in range(times))


def test_processes_and_threads_do_not_move_each_others_place(local: Path) -> None:
    archive = TarArchive(local)
    archive.read("000003.jpg")
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        answers = [pool.apply_async(_read_all, (archive, 50)) for _ in range(2)]
        mine = _read_all(archive, 50)
        assert all(answer.get(60) for answer in answers)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda _: _read_all(archive, 25), range(4)))
    assert mine


class _Hesitant(io.BufferedReader):
    """A file in which every process is met by the others between seeking and reading."""

    def seek(self, *where: int) -> int:
        place = super().seek(*where)
        time.sleep(0.005)
        return place


def test_forked_processes_read_large_members_each_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger than what is read ahead, so that every one is sought in the file itself."""

    def open_hesitantly(url: str, **_: object) -> _Hesitant:
        return _Hesitant(io.FileIO(url))

    monkeypatch.setattr("datamodules.archives.open_binary", open_hesitantly)
    contents = {str(index): bytes([index]) * 100_000 for index in range(4)}
    (tmp_path / "a.tar").write_bytes(tar_of(contents))
    archive = TarArchive(tmp_path / "a.tar")
    archive.read("0")  # opens the tar before the fork

    def read() -> None:
        for _ in range(10):
            assert contents_of(archive) == contents

    # What a forked process is to run is not pickled: this very archive goes along.
    processes = [multiprocessing.get_context("fork").Process(target=read) for _ in range(2)]
    for process in processes:
        process.start()
    try:
        read()
    finally:
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]


class _Ranges(BaseHTTPRequestHandler):
    """Serves one file, in parts where asked, and counts the bytes."""

    content = b""
    served = 0

    def do_HEAD(self) -> None:
        self._answer(200, len(self.content))

    def do_GET(self) -> None:
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = self.content[int(first) : int(last) + 1]
        self._answer(206, len(part), f"bytes {first}-{last}/{len(self.content)}")
        _Ranges.served += len(part)  # before the other side can go on
        self.wfile.write(part)

    def _answer(self, status: int, length: int, part: str | None = None) -> None:
        self.send_response(status if self.path == "/a.tar" else 404)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(length))
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Ranges)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_over_a_network_only_headers_and_asked_members_travel(server: str) -> None:
    contents = {f"{index}.jpg": rng.bytes(2**20) for index in range(8)}
    _Ranges.content, _Ranges.served = tar_of(contents), 0
    archive = TarArchive(f"{server}/a.tar")
    assert archive.names() == tuple(contents)
    assert _Ranges.served < len(_Ranges.content) / 8
    before = _Ranges.served
    assert archive.read("5.jpg") == contents["5.jpg"]
    assert _Ranges.served - before == len(contents["5.jpg"])
    with pytest.raises(ConfigurationError, match=r"b\.tar: no such tar\. Check"):
        TarArchive(f"{server}/b.tar").names()


def test_missing_tar(tmp_path: Path) -> None:
    for address in (str(tmp_path / "none.tar"), "memory://nowhere/none.tar"):
        with pytest.raises(ConfigurationError, match=r"none\.tar: no such tar\. Check"):
            TarArchive(address).names()


def test_missing_member(local: Path) -> None:
    with pytest.raises(BadItemError, match=r"images-000\.tar \[7\.jpg\]: no such file .*\. Check"):
        TarArchive(local).read("7.jpg")


@pytest.mark.parametrize("kept", ["in a member", "in a header", "before a header", "no end"])
def test_cut_tar_is_refused_and_not_taken_for_a_short_one(local: Path, kept: str) -> None:
    with tarfile.open(local) as tar:
        third = tar.getmembers()[2]
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    sizes = {
        "in a member": third.offset_data + 100,
        "in a header": third.offset + 100,
        "before a header": third.offset,
        "no end": end,
    }
    local.write_bytes(local.read_bytes()[: sizes[kept]])
    with pytest.raises(ConfigurationError, match=r"000\.tar: cut short.* again") as caught:
        TarArchive(local).names()
    reached = {"in a member": "000002", "no end": "000005"}.get(kept, "000001")
    assert f"after {reached}.jpg" in str(caught.value)


def test_damaged_header_does_not_end_the_tar(local: Path) -> None:
    with tarfile.open(local) as tar:
        offset = tar.getmembers()[2].offset
    content = bytearray(local.read_bytes())
    content[offset : offset + 100] = b"?" * 100
    local.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"after 000001\.jpg"):
        TarArchive(local).names()


def test_tar_cut_after_it_was_listed(local: Path) -> None:
    archive = TarArchive(local)
    names = archive.names()
    local.write_bytes(local.read_bytes()[:-11_000])
    problem = r"images-000\.tar \[000005\.jpg\]: the tar ends after \d+ of its 2255 bytes\. Fetch"
    with pytest.raises(BadItemError, match=problem):
        archive.read(names[-1])
    assert archive.read(names[0]) == CONTENTS[names[0]]


def test_tar_removed_after_it_was_listed(local: Path) -> None:
    archive = TarArchive(local)
    archive.names()
    local.unlink()
    with pytest.raises(BadItemError, match=r"\[000000\.jpg\]: cannot be read: FileNotFoundError"):
        archive.read("000000.jpg")


@pytest.mark.parametrize("content", [b"", b"text", b"\x1f\x8b\x08" + bytes(2000), b"?" * 4000])
def test_what_is_no_plain_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"a\.tar: .*decompress"):
        TarArchive(tmp_path / "a.tar").names()


def test_unknown_protocol() -> None:
    with pytest.raises(ConfigurationError, match=r"nonsense://a\.tar: .*\. Give a local path"):
        TarArchive("nonsense://a.tar").names()
