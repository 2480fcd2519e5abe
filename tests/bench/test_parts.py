"""Each part at the tiny size, and the command around them."""

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch

from g4seg_pl.bench import cache, command, decoder, resume, scaling, stage, throughput, timing
from g4seg_pl.bench.allocation import peak_allocated
from g4seg_pl.bench.compile import compile_blocks
from g4seg_pl.bench.injection import injection
from g4seg_pl.bench.match import dense_match, match
from g4seg_pl.bench.memory import memory, resident_bytes
from g4seg_pl.bench.processes import processes
from g4seg_pl.bench.rows import Bar, Row
from g4seg_pl.bench.setting import Setting, available_cores
from g4seg_pl.bench.steps import STEPS, steps
from g4seg_pl.bench.waiting import waiting
from g4seg_pl.callbacks.writer import MaskWriter
from g4seg_pl.core.correspondence import nearest_neighbours
from g4seg_pl.core.steps import UpdateStep
from g4seg_pl.main import main
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.types import Sample


def test_match_keeps_within_its_memory_on_a_large_grid() -> None:
    queries, references = torch.randn(2, 1, 32, 96, 96)
    found: list[torch.Tensor] = []
    peak = peak_allocated(
        lambda: found.append(nearest_neighbours(queries, references)), torch.device("cpu")
    )
    # All similarities at once would take 340 MB; a strip of them takes 16.
    assert peak < 24e6
    assert torch.equal(found[-1], dense_match(queries, references))


def test_match_has_its_bar(setting: Setting) -> None:
    rows = {row.name: row for row in match(setting)}
    assert rows["match: extra memory"].ok
    assert rows["match: time / bare matrix product"].value


def test_injection_adds_little_memory(setting: Setting) -> None:
    rows = {row.name: row.value for row in injection(setting)}
    assert rows["injection: 20 classes / 1 class"]
    assert rows["injection: extra memory"] is not None
    assert 0 <= rows["injection: extra memory"] < 50


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="compiling needs a C++ compiler")
def test_compiled_blocks_are_timed_against_plain_ones(setting: Setting) -> None:
    plain = setting.generator.unet
    rows = {row.name: row.value for row in compile_blocks(replace(setting, rounds=1))}
    assert set(rows) == {"compile: blocks / plain", "compile: once"}
    assert all(value is not None and value > 0 for value in rows.values())
    assert setting.generator.unet is plain
    assert "compile" not in command.parts_of(None)
    assert command.parts_of(["compile: once"]) == ["compile"]


def test_only_what_is_asked_for_of_the_steps_is_run(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, int]] = []
    names = {id(update): name for name, update in STEPS.items()}

    def note(_: Setting, update: tuple[UpdateStep, ...], sample: Sample) -> None:
        ran.append((names[id(update)], len(sample.class_names)))

    monkeypatch.setattr("g4seg_pl.bench.steps.refine_once", note)
    found = list(steps(replace(setting, only=("steps: affinity / paper",), rounds=1)))
    assert set(ran) == {("affinity", 1), ("paper", 1)}
    assert "steps: affinity / paper" in {row.name for row in found}
    ran.clear()
    found = list(steps(replace(setting, only=("steps: gradient, memory",), rounds=1)))
    assert ran == [("gradient", 1)]
    assert [row.name for row in found] == ["steps: gradient, memory"]


@pytest.mark.slow
def test_every_step_has_its_rows(setting: Setting) -> None:
    rows = {row.name: row for row in steps(setting)}
    assert all(f"steps: {name}, memory" in rows for name in STEPS)
    assert all(f"steps: {name} / paper" in rows for name in STEPS if name != "paper")
    assert all(row.value is not None and row.value > 0 for row in rows.values())


def test_decoders_are_both_weighed_and_the_models_own_is_put_back(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[bool] = []
    refine = decoder.refine_once

    def watched(*arguments: Any) -> None:
        used.append(setting.generator.decoder is not None)
        refine(*arguments)

    monkeypatch.setattr(decoder, "refine_once", watched)
    rows = {row.name: row.value for row in decoder.decoder(setting)}
    assert used == [False, True] * 3  # to warm up, for memory, for time
    assert list(rows) == [
        "decoder: full, memory",
        "decoder: tiny, memory",
        "decoder: tiny / full, the paper's update",
        "decoder: tiny / full, decoding alone",
    ]
    assert all(value is not None and value >= 0 for value in rows.values())
    assert setting.generator.decoder is None


def test_cache_is_warm_when_it_is_timed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = setting.generator.encode
    monkeypatch.setattr(
        setting.generator, "encode", lambda images: encoded.append("image") or encode(images)
    )
    rows = {row.name: row.value for row in cache.cache(setting)}
    # Warming up: once with each; then once more without.
    assert len(encoded) == 3
    assert rows["cache: warm / none, the paper's update"]
    latent, tokens = 4 * 32 * 32, 16 * 16 * 16
    assert rows["cache: an image on disk"] == pytest.approx(2e-6 * (latent + tokens), rel=0.2)


def test_waiting_is_a_share(setting: Setting) -> None:
    rows = list(waiting(setting))
    assert len(rows) == 2
    assert all(row.value is not None and 0 <= row.value < 100 for row in rows)


def test_resumed_run_is_timed_until_the_model_would_load(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "IMAGES", 50)
    monkeypatch.setattr(resume, "IMAGES_A_TAR", 20)
    rows = list(resume.resume(setting))
    assert [row.ok for row in rows] == [True, True]
    assert len(list((setting.out("resumed") / "masks").iterdir())) == 50
    assert len(list((setting.out("resumed_tars") / "masks").glob("*.tar"))) == 3


on_linux = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux")


def fresh_memory(size: int) -> mmap.mmap:
    """So many resident bytes that were not so before.

    Of the system itself: memory of the heap may be what earlier tests have freed and left resident,
    and then nothing grows.
    """
    held = mmap.mmap(-1, size)
    held.write(b"\1" * size)
    return held


@on_linux
def test_resident_memory_is_what_is_in_use() -> None:
    before = resident_bytes(os.getpid())
    held = fresh_memory(2**25)
    assert resident_bytes(os.getpid()) - before > 0.9 * len(held)


@pytest.mark.slow
@on_linux
def test_memory_is_flat_and_a_leak_would_be_seen(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = replace(setting, memory_images=160)
    (row,) = memory(many)
    assert row.ok, row.detail
    hoard: list[mmap.mmap] = []
    save = MaskWriter.write_on_batch_end

    def leak(self: MaskWriter, *args: Any, **kwargs: Any) -> None:
        hoard.append(fresh_memory(2**21))  # a batch
        save(self, *args, **kwargs)

    monkeypatch.setattr(MaskWriter, "write_on_batch_end", leak)
    (row,) = memory(many)
    assert row.ok is False, row.detail


@pytest.mark.slow
def test_two_processes_need_two_cores(setting: Setting) -> None:
    (row,) = processes(setting)
    if available_cores() < 2:
        assert row.ok is None
    else:
        assert row.value is not None
        assert row.value > 0


def fake_parts(setting: Setting) -> Iterator[Row]:
    """A bar that holds, one that fails and is then mended, and one that fails."""
    yield Row("fake: good", 1.0, "×", Bar(2))
    yield Row("fake: mended", 3.0, "×", Bar(2))
    yield Row("fake: mended", 1.0, "×", Bar(2))
    yield Row("fake: bad", 3.0, "×", Bar(2))


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    load = command._load
    monkeypatch.setattr(command, "PARTS", {"fake": "fake"})
    monkeypatch.setattr(command, "_load", lambda t: fake_parts if t == "fake" else load(t))


@pytest.mark.usefixtures("_fake")
def test_status_says_whether_a_bar_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    assert main(["bench", "--json", str(file)]) == 1
    rows = json.loads(file.read_text())["rows"]
    assert [(row["name"], row["ok"]) for row in rows] == [
        ("fake: good", True),
        ("fake: mended", True),
        ("fake: bad", False),
    ]
    assert "bars that fail: fake: bad" in capsys.readouterr().err
    assert main(["bench", "--only", "fake: good", "fake: mended", "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())["rows"]) == 2


def test_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--only", "speed"]) == 1
    assert "no part speed; give injection" in capsys.readouterr().err


@pytest.mark.slow
def test_scaling_and_profile_say_what_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "CLASSES", (1, 2))
    monkeypatch.setattr(scaling, "GRIDS", (8,))
    monkeypatch.setattr(scaling, "SCALES", (0.5, 1.0))
    monkeypatch.setattr(scaling, "BATCHES", (1, 2))
    monkeypatch.setattr(scaling, "processes", lambda setting: [])
    file, work = tmp_path / "rows.json", str(tmp_path / "work")
    assert main(["bench", "scaling", "--rounds", "1", "--json", str(file), "--work", work]) == 0
    names = [row["name"] for row in json.loads(file.read_text())["rows"]]
    assert len(names) == len(set(names)) == 3 * 2 + 1 + 3 + 2 + 2
    assert main(["bench", "profile", "--lines", "3", "--work", work]) == 0
    assert "Self CPU" in capsys.readouterr().out


def test_scaling_by_classes_runs_the_steps_it_names(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "CLASSES", (1,))
    ran: list[tuple[str, bool]] = []

    def note(refiner: G4SegRefiner, _: Sample) -> None:
        (step,) = refiner.steps
        ran.append((type(step).__name__, getattr(step, "all_classes_at_once", False)))

    monkeypatch.setattr(scaling, "_refine", note)
    rows = [row.name for row in scaling.by_classes(replace(setting, rounds=1))]
    names = ("paper", "paper, classes at once", "affinity")
    assert rows == [f"scaling: {name}, an image by classes: 1" for name in names]
    steps = [("Correspondence", False), ("Correspondence", True), ("Affinity", False)]
    assert list(dict.fromkeys(ran)) == steps


def test_throughput_counts_from_the_second_batch_to_the_last_file(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "BATCHES", 3)
    masks = setting.out("throughput") / "masks"
    files: list[int] = []

    class Counted(timing.Stopwatch):
        def start(self) -> None:
            files.append(len(list(masks.glob("*.png"))))
            super().start()

    monkeypatch.setattr(stage, "Stopwatch", Counted)
    rows = {row.name: row for row in throughput.throughput(setting)}
    first = throughput.IMAGES_A_BATCH
    # Run by run, the files of the one before are there until they are replaced.
    assert files[:2] == [0, first]
    assert len(list(masks.glob("*.png"))) == 3 * first
    assert rows["throughput: g4seg / floor"].value > 0
    assert "24 masks" in rows["throughput: g4seg, a mask"].detail
    assert all(row.bar is None for row in rows.values())
