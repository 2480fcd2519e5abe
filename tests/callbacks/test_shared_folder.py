"""Several runs in one output folder: who writes run.json, and who is refused."""

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command_line import environment

from g4seg_pl.callbacks.folder_lock import ProcessLock, folder_lock
from g4seg_pl.callbacks.output_folder import OutputFolder
from g4seg_pl.callbacks.records import RecordFile, last_records, new_record, read_records
from g4seg_pl.callbacks.resume import finished_by, open_run
from g4seg_pl.callbacks.run_record import write_text_atomically
from g4seg_pl.types import ConfigurationError, RefinedMask


@dataclass
class Data:
    """What the writer asks of a DataModule."""

    shard: str | None = None
    split: str = "train"


def start(folder: OutputFolder, seed: int, shard: str | None, *, override: bool = False) -> None:
    """Begin a run over images a and b, as the writer does."""
    config = {"model": {"seed": seed}, "data": {"init_args": {"shard": shard}}}
    folder.make()
    if not override:
        finished_by(folder, config, ["a", "b"], shared=shard is not None)
    open_run(folder, config, ["a", "b"], object(), Data(shard), override=override)


def add_mask(folder: OutputFolder, image_id: str) -> None:
    folder.save(RefinedMask(image_id, (1,), torch.rand(1, 2, 2), torch.zeros(2, 2).byte()))


def test_shards_add_themselves_to_one_record(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    for shard in ("1/3", "2/3", "0/3"):
        start(folder, 0, shard)
    record = json.loads(folder.run_json.read_text())
    shards = [record["shard"], *(run["shard"] for run in record["continued"])]
    assert shards == ["1/3", "2/3", "0/3"]


def test_many_shards_at_once_are_all_recorded(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    threads = [
        threading.Thread(target=start, args=(folder, 0, f"{index}/6")) for index in range(1, 7)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = json.loads(folder.run_json.read_text())
    shards = [record["shard"], *(run["shard"] for run in record["continued"])]
    assert sorted(shards) == [f"{index}/6" for index in range(1, 7)]


def test_shard_of_another_configuration_is_refused_before_the_first_mask(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    start(folder, 0, "1/2")
    with pytest.raises(ConfigurationError, match=r"differs in model\.seed"):
        start(folder, 1, "2/2")


def test_record_of_a_run_without_masks_does_not_stand_in_the_way(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    start(folder, 0, None)
    start(folder, 1, None)
    assert json.loads(folder.run_json.read_text())["config"]["model"]["seed"] == 1


def test_overriding_shards_drop_what_another_configuration_made_once(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    start(folder, 0, "1/2")
    add_mask(folder, "c")
    start(folder, 1, "1/2", override=True)
    assert folder.finished() == set()
    add_mask(folder, "c")  # of the other shard, made meanwhile
    add_mask(folder, "a")
    start(folder, 1, "2/2", override=True)
    assert folder.finished() == {"c"}
    record = json.loads(folder.run_json.read_text())
    assert [record["shard"], record["continued"][0]["shard"]] == ["1/2", "2/2"]


def test_overriding_removes_soft_maps_that_a_kill_left_without_masks(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path, "npz")
    folder.make()
    folder.soft_path("a").write_bytes(b"of nobody known")
    start(folder, 0, None, override=True)
    assert folder.soft_path("a").exists()  # no run.json told of it
    start(folder, 1, None, override=True)
    assert not folder.soft_path("a").exists()


def test_lock_is_waited_for_and_then_complained_about(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path),
        pytest.raises(ConfigurationError, match="has held its lock"),
        folder_lock(tmp_path, patience=0.1),
    ):
        pass
    with folder_lock(tmp_path, patience=0):
        assert (tmp_path / ".lock").exists()


def test_one_process_at_a_time_holds_a_part(tmp_path: Path) -> None:
    first, second, other = (ProcessLock(tmp_path / f".lock.rank{rank}") for rank in (0, 0, 1))
    assert first.take(patience=0)
    assert not second.take(patience=0)
    assert other.take(patience=0)
    first.release()
    assert second.take(patience=0)
    second.release()
    other.release()


FORKED = """
import os, sys, time
from pathlib import Path
from g4seg_pl.callbacks.folder_lock import ProcessLock

lock = ProcessLock(Path(sys.argv[1]))
assert lock.take(patience=0)
ready, told = os.pipe()
if (child := os.fork()) == 0:  # as a worker that outlives a killed process
    os.write(told, b"x")
    time.sleep(60)
    os._exit(0)
os.read(ready, 1)
assert not ProcessLock(lock.path).take(patience=0)  # the child did not unlock it
lock.release()
free = ProcessLock(lock.path).take(patience=0)
os.kill(child, 9)
os.waitpid(child, 0)
sys.exit(not free)
"""


def test_workers_do_not_hold_on_to_what_their_process_held(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKED, str(tmp_path / ".lock.rank0")]
    assert subprocess.run(command, env=environment(), check=False).returncode == 0


def test_two_writers_of_one_text_do_not_disturb_each_other(tmp_path: Path) -> None:
    texts = [letter * 20_000 for letter in "ab"]
    target = tmp_path / "config.yaml"
    errors: list[BaseException] = []

    def write(text: str) -> None:
        try:
            for _ in range(30):
                write_text_atomically(target, text)
                assert target.read_text() in texts
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_line_cut_by_a_kill_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "records.rank0.jsonl"
    RecordFile(path).add("a")
    with path.open("a") as file:
        file.write('{"id": "b", "st')
    RecordFile(path).add("c")
    assert [record["id"] for record in read_records(tmp_path)] == ["a", "c"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_last_record_counts_whichever_file_holds_it(tmp_path: Path, order: tuple[int, ...]) -> None:
    for part, second in enumerate(order):
        records = RecordFile(tmp_path / f"records.shard{part + 1}of3.rank0.jsonl")
        time = f"2026-01-01T00:00:0{second}.000+00:00"
        records.write(new_record("a", error=f"of second {second}") | {"time": time})
        records.add("b", error="not asked for")
    found = last_records(tmp_path, {"a", "c"})
    assert {name: record["error"] for name, record in found.items()} == {"a": "of second 2"}
    every = [record["error"] for record in read_records(tmp_path) if record["id"] == "a"]
    assert every == ["of second 0", "of second 1", "of second 2"]
