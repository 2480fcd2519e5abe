"""Samples in tars: other readers find them, ids survive, and torn ends are told from whole ones."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g4seg_pl.callbacks.tar_samples import END_OF_TAR, id_of, key_of, pack, whole_samples

IDS = ["a", "a.b", "v1.2/frame.03", "__x__/y", "per%2Ecent", "猫 with space", "x" * 150]


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_keys_are_reversible_and_webdataset_does_not_split_them(image_id: str) -> None:
    key = key_of(image_id)
    assert id_of(key) == image_id
    assert not set("./\\\n ") & set(key)
    assert key.isascii()


def test_name_that_is_no_text_survives() -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")  # Latin-1 on a disk read as UTF-8
    assert id_of(key_of(name)) == name


def packed_tar(path: Path) -> list[int]:
    """Write a tar of one sample an id; returns where each begins, and where the last ends."""
    content, begins = b"", [0]
    for number, image_id in enumerate(IDS):
        packed, sample = pack(image_id, {"png": bytes([number]) * (500 * number), "json": b"{}"})
        assert sample.end == len(packed)
        content += packed
        begins.append(len(content))
    path.write_bytes(content + END_OF_TAR)
    return begins


def test_other_programs_read_what_was_packed(tmp_path: Path) -> None:
    packed_tar(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as tar:
        names = tar.getnames()
        assert names == [f"{key_of(each)}.{suffix}" for each in IDS for suffix in ("png", "json")]
        for number, name in enumerate(names[::2]):
            stream = tar.extractfile(name)
            assert isinstance(stream, io.BufferedReader)
            assert stream.read() == bytes([number]) * (500 * number)


def test_places_are_where_the_contents_lie(tmp_path: Path) -> None:
    begins = packed_tar(tmp_path / "x.tar")
    content = (tmp_path / "x.tar").read_bytes()
    samples = list(whole_samples(tmp_path / "x.tar"))
    assert [sample.image_id for sample in samples] == IDS
    assert [sample.begin for sample in samples] == begins[:-1]
    assert samples[-1].end == begins[-1]
    for number, sample in enumerate(samples):
        place = sample.members["png"]
        assert content[place.offset :][: place.size] == bytes([number]) * (500 * number)


def test_torn_tar_has_the_samples_before_the_tear(tmp_path: Path) -> None:
    begins = packed_tar(tmp_path / "x.tar")
    content = (tmp_path / "x.tar").read_bytes()
    for cut in range(0, begins[-1] + 1, 100):
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        whole = sum(end <= cut for end in begins[1:])
        assert len(list(whole_samples(tmp_path / "cut.tar"))) == whole


def test_record_is_always_last() -> None:
    with pytest.raises(ValueError, match="ends with json"):
        pack("a", {"json": b"", "png": b""})
