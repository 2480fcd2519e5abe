"""Two processes: every image once, the same masks and scores as one, and none waits for ever."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
from command_line import environment, kill_when, masks, records, scores, tar_masks, words
from fake_voc import write_voc

from g4seg_pl.callbacks.processes import ProcessFiles
from g4seg_pl.main import main
from g4seg_pl.termination import EndRequest, status_of_end, wait_for_started

IDS = [f"image{index}" for index in range(5)]


@dataclass(frozen=True)
class Runs:
    """Runs of one and of two processes over the same tree.

    Attributes:
        root: where they ran.
        said: what each of the two processes printed.
    """

    root: Path
    said: tuple[str, str]


def run_pair(folder: Path, runs: list[list[str]]) -> tuple[str, str]:
    """Run the command lines one after the other in two processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (folder / "runs.json").write_text(json.dumps(runs))
    script = str(Path(__file__).with_name("several_runs.py"))
    shared = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, "runs.json"],
            cwd=folder,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return said[0], said[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path) -> Runs:
    root = tmp_path_factory.mktemp("distributed")
    write_voc(root, IDS)
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]
    left = root / "few" / "masks"
    pair = [
        words("predict", sd1_folder, "two", *two),
        words("predict", sd1_folder, "few", *two),
        words("predict", sd1_folder, "few", *two),
        words("predict", sd1_folder, "tars", *two, "--writer.tar", "100"),
        words("test", sd1_folder, "two_scores", *two),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("one", "few"):
            assert main(words("predict", sd1_folder, name)) == 0
        (left / "image1.png").unlink()
        assert main(words("test", sd1_folder, "one_scores")) == 0
    return Runs(root, run_pair(root, pair))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(runs: Runs) -> None:
    assert masks(runs.root / "one") == masks(runs.root / "two")
    assert sorted(record["id"] for record in records(runs.root / "two")) == IDS
    ranks = {path.name for path in (runs.root / "two").glob("records.*")}
    assert ranks == {"records.rank0.jsonl", "records.rank1.jsonl"}
    assert "done 5 / skipped 0 / failed 0 / total 5" in runs.said[0]
    assert "done" not in runs.said[1]
    assert not list((runs.root / "two").glob(".finished*"))


@pytest.mark.slow
def test_fewer_images_left_than_processes_are_done_all_the_same(runs: Runs) -> None:
    assert "images left: 1; of 2 processes 1 will have nothing to do" in runs.said[0]
    assert "done 1 / skipped 4 / failed 0 / total 5" in runs.said[0]
    assert masks(runs.root / "few") == masks(runs.root / "one")


@pytest.mark.slow
def test_no_image_left_is_said_and_is_no_error(runs: Runs) -> None:
    assert "nothing left to do: every image is finished" in runs.said[0]
    assert [said.count("status 0") for said in runs.said] == [5, 5]


@pytest.mark.slow
def test_each_process_fills_tars_of_its_own(runs: Runs) -> None:
    assert tar_masks(runs.root / "tars") == masks(runs.root / "one")
    found = {path.name for path in (runs.root / "tars" / "masks").iterdir()}
    assert found == {
        f"rank{rank}-000000.{suffix}" for rank in (0, 1) for suffix in ("tar", "jsonl")
    }


@pytest.mark.slow
def test_scores_of_two_processes_are_those_of_one(runs: Runs) -> None:
    one, two = (scores(runs.root / name) for name in ("one_scores", "two_scores"))
    assert one["test/n_images"] == 5
    assert one == two


LATE = """
import threading
from lightning.pytorch import Callback

class Late(Callback):
    def on_predict_batch_end(self, trainer, *_):
        for thread in threading.enumerate() if trainer.is_global_zero else ():
            if thread.name == "child-process-observer":
                thread.join()
"""
"""Rank 0 ends its batch when Lightning has seen the other process end, and found it well."""


@pytest.mark.slow
def test_processes_that_are_asked_to_end_do_so_behind_their_batches(
    tmp_path: Path, sd1_folder: Path
) -> None:
    write_voc(tmp_path, [f"image{index:03}" for index in range(60)])
    (tmp_path / "late.py").write_text(LATE)
    more = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "1"]
    arguments = words("predict", sd1_folder, "out", *more, "--trainer.callbacks", "late.Late")
    out = tmp_path / "out"
    status = kill_when(lambda: bool(masks(out)), tmp_path, arguments, signal.SIGTERM)
    assert status == 143
    assert records(out)[0]["id"] == "image000", "rank 0's batch in work"
    assert sorted(f"{record['id']}.png" for record in records(out)) == list(masks(out))
    assert 2 <= len(masks(out)) < 60


STARTED = {"LOCAL_RANK": "1"}
TORCHRUN = STARTED | {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"}


@pytest.mark.parametrize(
    ("devices", "variables", "status"),
    [(1, {}, 143), (2, {}, 143), (2, STARTED, 0), (2, TORCHRUN, 143)],
)
def test_only_processes_that_lightning_watches_end_as_if_finished(
    monkeypatch: pytest.MonkeyPatch, devices: int, variables: dict[str, str], status: int
) -> None:
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = pl.Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False)
    assert status_of_end(trainer) == status


def test_started_processes_are_asked_to_end_and_waited_for() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    script = "import signal; print('ready', flush=True); signal.sigwait({15}); print('asked')"
    blocked = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {15}); "
    started = subprocess.Popen(
        [sys.executable, "-c", blocked + script], stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    trainer.strategy.launcher.procs.append(started)
    before, end = signal.getsignal(signal.SIGTERM), EndRequest()
    with end.listen(trainer):
        assert not end.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert end.received
    assert signal.getsignal(signal.SIGTERM) == before
    wait_for_started(trainer, 60)
    assert started.returncode == 0
    assert started.communicate()[0] == "asked\n"


def test_nobody_is_waited_for_when_the_machine_is_taken(tmp_path: Path) -> None:
    files = ProcessFiles(tmp_path)
    files.finish(0)
    assert files.wait(2, patience=600, stop=lambda: True) == (1,)


def test_dead_process_is_given_up_by_its_rank(tmp_path: Path) -> None:
    files = ProcessFiles(tmp_path)
    files.finish(0)
    files.finish(2)
    assert files.wait(3, patience=0.1) == (1,)
    assert not list(tmp_path.glob(".finished*"))


class Clock:
    """A clock that only sleeping moves on, by a second each time, whatever is asked for."""

    def __init__(self, every_second: Callable[[int], None]) -> None:
        self.now = 0
        self.every_second = every_second

    def monotonic(self) -> float:
        """The time."""
        return float(self.now)

    def sleep(self, _: float) -> None:
        """Let a second pass."""
        self.now += 1
        self.every_second(self.now)


def test_failed_process_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(now: int) -> None:
        raise AssertionError

    monkeypatch.setattr("g4seg_pl.callbacks.processes.time", Clock(never))
    files = ProcessFiles(tmp_path)
    files.finish(0)
    files.finish(1, failed=True)
    assert files.wait(2, patience=60) == (1,)


@pytest.mark.parametrize(("pause", "given_up"), [(3, ()), (6, (1,))])
def test_slow_process_is_waited_for_while_it_writes(
    tmp_path: Path, pause: int, given_up: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ProcessFiles(tmp_path)
    files.finish(0)

    def work(now: int) -> None:
        if now % pause == 0:
            with files.record(1).open("a") as file:
                file.write("image\n")
        if now == 8 * pause:
            files.finish(1)

    monkeypatch.setattr("g4seg_pl.callbacks.processes.time", Clock(work))
    assert files.wait(2, patience=4) == given_up
    assert given_up or len(files.record(1).read_text().splitlines()) == 8


def test_runs_over_other_shards_do_not_touch_our_markers(tmp_path: Path) -> None:
    ours, others = (ProcessFiles(tmp_path, shard) for shard in ("1/2", "2/2"))
    ours.finish(0)
    others.begin(0)
    assert ours.wait(1, patience=0) == ()
    assert ours.record(0) != others.record(0)
