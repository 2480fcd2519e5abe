"""Shards and processes share the items: each once, whatever is finished already."""

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules import VOCDataModule
from datamodules.items import Item, parse_line, take_shard
from datamodules.sampling import ProcessSampler
from g4seg_pl.callbacks.output_folder import OutputFolder, summarise
from g4seg_pl.types import ConfigurationError

counts = st.integers(0, 60)
shard_counts = st.integers(1, 12)


def items(count: int) -> list[Item]:
    return [Item(f"{index:03}", Path(f"{index:03}.jpg")) for index in range(count)]


@given(count=counts, shards=shard_counts, first=st.sampled_from([0, 1]))
def test_shards_partition_the_ids_evenly(count: int, shards: int, first: int) -> None:
    whole = items(count)
    parts = [take_shard(whole, f"{first + index}/{shards}") for index in range(shards)]
    assert sorted(itertools.chain(*parts), key=lambda item: item.image_id) == whole
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(part == sorted(part, key=lambda item: item.image_id) for part in parts)


@given(
    count=counts,
    shards=shard_counts,
    processes=st.integers(1, 5),
    finished=st.sets(st.integers(0, 59)),
)
def test_processes_of_resumed_shards_do_what_is_left_once(
    count: int, shards: int, processes: int, finished: set[int]
) -> None:
    done: list[str] = []
    for shard in range(1, shards + 1):
        part = take_shard(items(count), f"{shard}/{shards}")
        left = [item for item in part if int(item.image_id) not in finished]
        samplers = [ProcessSampler(left, processes, rank) for rank in range(processes)]
        sizes = [len(sampler) for sampler in samplers]
        assert max(sizes) - min(sizes) <= 1
        done += [left[index].image_id for sampler in samplers for index in sampler]
    wanted = {item.image_id for item in items(count) if int(item.image_id) not in finished}
    assert Counter(done) == Counter(wanted)


def test_zero_names_the_last_shard() -> None:
    assert take_shard(items(9), "0/4") == take_shard(items(9), "4/4")


@pytest.mark.parametrize("shard", ["", "1", "5/4", "-1/4", "1/0", "0/0", "1/4/2", "1.0/4", "1 /4"])
def test_other_words_are_refused_with_an_example(shard: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^shard: .*give shards 1/4 to 4/4"):
        take_shard(items(9), shard)


def test_quick_reading_of_a_line_is_the_thorough_one() -> None:
    assert parse_line("2007_000032").image_id == "2007_000032"
    assert parse_line("a.b").image_id == "a.b"
    assert parse_line("a.jpg").image_id == "a"


def looks_at_files(count: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often files are looked at to resume a run over ``count`` finished images."""
    voc = root / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "seeds", "masks"):
        (voc / folder).mkdir(parents=True)
    ids = [f"{index:04}" for index in range(count)]
    for image_id in ids:
        (voc / "JPEGImages" / f"{image_id}.jpg").touch()
        (voc / "masks" / f"{image_id}.png").touch()
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(ids))
    looked = Counter[str]()

    def counted(name: str) -> None:
        plain = getattr(os, name)

        def count_and_call(*args: object, **kwargs: object) -> object:
            looked[name] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(os, name, count_and_call)

    with monkeypatch.context():
        for name in ("stat", "lstat", "scandir", "listdir", "open"):
            counted(name)
        data = VOCDataModule(voc, voc / "seeds")
        data.setup("predict")
        folder = OutputFolder(voc)
        finished = folder.finished()
        data.exclude(finished)
        assert data.items == ()
        assert str(summarise(folder, ids, finished)).startswith(f"done 0 / skipped {count}")
    monkeypatch.undo()
    assert looked["stat"] > 0
    return looked.total()


def test_cost_of_a_resumed_start_has_no_look_at_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = looks_at_files(20, tmp_path / "few", monkeypatch)
    many = looks_at_files(200, tmp_path / "many", monkeypatch)
    assert many == few
