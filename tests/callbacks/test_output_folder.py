"""Files of a run: palette, atomic writing, soft formats, records and the run record."""

import copy
import json
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from g4seg_pl.callbacks.crf import DenseCRF
from g4seg_pl.callbacks.output_folder import OutputFolder, SoftFormat, summarise
from g4seg_pl.callbacks.palette import voc_palette
from g4seg_pl.callbacks.records import RecordFile, read_records
from g4seg_pl.callbacks.resume import refuse_own_inputs
from g4seg_pl.callbacks.run_record import describe, differing_keys
from g4seg_pl.core.steps import Correspondence
from g4seg_pl.features.vae import VAEFeatures
from g4seg_pl.module import G4SegModule
from g4seg_pl.segmentation.label_folder import LabelFolder
from g4seg_pl.types import BadItemError, ConfigurationError, G4SegError, RefinedMask


def refined(image_id: str = "a.b") -> RefinedMask:
    """A mask of two classes."""
    label = torch.tensor([[0, 2, 5], [255, 2, 0]], dtype=torch.uint8)
    return RefinedMask(image_id, (2, 5), torch.rand(2, 2, 3), label)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """A disk on which every file breaks off after ``size`` bytes, however it is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_below(folder: Path) -> set[str]:
    """The names of all files, wherever they lie."""
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_palette_begins_as_voc_publishes_it() -> None:
    first = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    palette = voc_palette()
    assert [tuple(palette[3 * i : 3 * i + 3]) for i in range(6)] == first
    assert palette[-3:] == [224, 224, 192]


def test_label_file_is_indexed_and_named_by_the_id(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    folder.save(refined())
    with Image.open(tmp_path / "masks" / "a.b.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), refined().label)
    assert folder.finished() == {"a.b"}
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["a.b.png"]


def test_soft_maps_keep_half_precision(tmp_path: Path) -> None:
    mask = refined()
    OutputFolder(tmp_path, "npz").save(mask)
    with np.load(tmp_path / "soft" / "a.b.npz") as content:
        assert content["foreground"].dtype == np.float16
        np.testing.assert_allclose(content["foreground"], mask.foreground, atol=1e-3)
        np.testing.assert_array_equal(content["class_ids"], (2, 5))


def test_clip_es_soft_maps_are_read_as_that_project_reads_them(tmp_path: Path) -> None:
    OutputFolder(tmp_path, "clip_es").save(refined())
    content = np.load(tmp_path / "soft" / "a.b.npy", allow_pickle=True).item()
    np.testing.assert_array_equal(content["keys"] + 1, (2, 5))
    assert content["attn_highres"].shape == (2, 2, 3)


def test_irn_soft_maps_are_read_as_that_project_reads_them(tmp_path: Path) -> None:
    mask = replace(refined(), foreground=torch.rand(2, 9, 13), label=torch.zeros(9, 13).byte())
    OutputFolder(tmp_path, "irn").save(mask)
    content = np.load(tmp_path / "soft" / "a.b.npy", allow_pickle=True).item()
    assert (content["keys"] + 1).tolist() == [2, 5]
    assert content["high_res"].shape == (2, 9, 13)
    assert content["cam"].shape == (2, 3, 4)  # a quarter of the size, rounded up
    np.testing.assert_allclose(content["high_res"], mask.foreground, atol=1e-3)


def test_findings_lie_beside_the_soft_maps(tmp_path: Path) -> None:
    found = {"confidence": torch.rand(2, 2, 3), "score": torch.tensor([0.5, -1.25])}
    OutputFolder(tmp_path, "npz").save(replace(refined(), **found))
    with np.load(tmp_path / "soft" / "a.b.npz") as content:
        assert set(content) == {"foreground", "class_ids", *found}
        assert content["confidence"].dtype == np.float16
        np.testing.assert_array_equal(content["score"], found["score"])


@pytest.mark.parametrize("name", ["root", "seeds", "truth"])
@pytest.mark.parametrize("part", ["masks", "soft", "masks/deeper"])
def test_masks_do_not_go_where_anything_is_read(tmp_path: Path, name: str, part: str) -> None:
    folder = OutputFolder(tmp_path / "out")
    places = {each: tmp_path / each for each in ("root", "seeds", "truth")}
    refuse_own_inputs(folder, SimpleNamespace(**places))
    places[name] = tmp_path / "out" / part
    with pytest.raises(ConfigurationError, match=rf"data\.{name} is .*out/{part}"):
        refuse_own_inputs(folder, SimpleNamespace(**places))


@pytest.mark.parametrize("image_id", ["", "..", "../a", "a/../b", "/a", "a\\b"])
def test_id_that_leads_out_of_the_folder_is_refused(tmp_path: Path, image_id: str) -> None:
    with pytest.raises(BadItemError, match="plain file name"):
        OutputFolder(tmp_path / "out").save(refined(image_id))
    assert not list(tmp_path.rglob("*.png"))


def test_half_a_file_does_not_count_as_finished(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / ".a.png.tmp").write_bytes(b"half")
    assert OutputFolder(tmp_path).finished() == set()


@pytest.mark.parametrize("soft", ["none", "npz", "irn"])
def test_write_that_breaks_off_leaves_no_file_under_its_name(
    tmp_path: Path, soft: SoftFormat
) -> None:
    folder = OutputFolder(tmp_path, soft)
    with room_for(20), pytest.raises(OSError, match="too large"):
        folder.save(refined())
    # Some of it did reach the disk: only the name keeps it from passing for the whole.
    assert [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()] == [20]
    whole = {"a.b.png"} if soft == "none" else {"a.b.png", f"a.b.{folder.soft_suffix}"}
    assert not whole & files_below(tmp_path)
    assert folder.finished() == set()
    # The next run writes over what was left.
    folder.save(refined())
    assert files_below(tmp_path) == whole
    with Image.open(folder.mask_path("a.b")) as image:
        np.testing.assert_array_equal(np.asarray(image), refined().label)


def test_write_that_breaks_off_spares_the_file_of_before(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    folder.save(refined())
    before = folder.mask_path("a.b").read_bytes()
    with room_for(20), pytest.raises(OSError, match="too large"):
        folder.save(replace(refined(), label=torch.zeros(2, 3, dtype=torch.uint8)))
    assert folder.mask_path("a.b").read_bytes() == before


@pytest.mark.parametrize("soft", [name for name in get_args(SoftFormat) if name != "none"])
def test_image_whose_soft_maps_cannot_be_written_is_not_finished(
    tmp_path: Path, soft: SoftFormat
) -> None:
    """The label file marks an image as finished, so it comes after all else."""
    folder = OutputFolder(tmp_path, soft)
    (tmp_path / "soft").write_bytes(b"a file where the folder should be")
    with pytest.raises(OSError, match="soft"):
        folder.save(refined())
    assert folder.finished() == set()
    # A tar's members keep this order too.
    assert list(folder.contents(refined())) == [folder.soft_suffix, "png"]


def test_image_half_forgotten_is_not_finished(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path, "npz")
    folder.save(refined())
    folder.soft_path("a.b").unlink()
    folder.soft_path("a.b").mkdir()  # cannot be removed as a file
    with pytest.raises(OSError, match="soft"):
        folder.forget(["a.b"])
    assert folder.finished() == set()


def test_clearing_removes_what_a_kill_left_before_its_mask(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path, "npz")
    for image_id in ("a.b", "c/d"):
        folder.save(refined(image_id))
        folder.mask_path(image_id).unlink()
    with room_for(20), pytest.raises(OSError, match="too large"):
        folder.save(refined("e"))
    with room_for(20), pytest.raises(OSError, match="too large"):
        OutputFolder(tmp_path).save(refined("e"))
    (tmp_path / "soft" / "notes.txt").touch()
    folder.clear()
    assert files_below(tmp_path) == {"notes.txt"}


@pytest.mark.parametrize(("before", "after"), [("npz", "irn"), ("irn", "npz")])
def test_soft_maps_in_another_form_are_not_left_beside_the_new_ones(
    tmp_path: Path, before: SoftFormat, after: SoftFormat
) -> None:
    for form in (before, after):
        OutputFolder(tmp_path, form).save(refined())
    assert LabelFolder(tmp_path).soft_file("a.b") == OutputFolder(tmp_path, after).soft_path("a.b")


def test_summary_takes_the_last_record_of_each_image(tmp_path: Path) -> None:
    folder, records = OutputFolder(tmp_path), RecordFile(tmp_path / "records.rank0.jsonl")
    records.add("a.b", error="unreadable")
    folder.save(refined())
    records.add("a.b")
    records.add("c", error="missing")
    with records.path.open("a") as file:
        file.write('{"id": "d", "st')
    summary = summarise(folder, ["a.b", "c", "e"], skipped=[])
    assert [record["id"] for record in read_records(tmp_path)] == ["a.b", "a.b", "c"]
    assert summary.failed == {"c": "missing"}
    assert str(summary) == "done 1 / skipped 0 / failed 1 / total 3 (1 not tried)"


def test_record_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    records = RecordFile(tmp_path / "records.rank0.jsonl")
    with room_for(20), pytest.raises(G4SegError, match=r"records\.rank0\.jsonl cannot be written"):
        records.add("a.b", error="unreadable")


def test_differences_are_named_and_speed_does_not_count() -> None:
    ours = {"update": describe(Correspondence(beta=0.8)), "batch_size": 4, "new": 1}
    theirs = {"update": describe(Correspondence()), "batch_size": 1}
    assert differing_keys(ours, theirs) == ["update.init_args.beta", "new"]


def test_what_stands_in_lists_is_compared_like_all_else() -> None:
    ours = {"changed_by": [describe(DenseCRF(processes=0))], "classes": ["cat", "dog", "cow"]}
    theirs = {"changed_by": [describe(DenseCRF(processes=4))], "classes": ["cat", "dog", "cow"]}
    assert differing_keys(ours, theirs) == []
    theirs = {"changed_by": [describe(DenseCRF("irn"))], "classes": ["dog", "cat", "cow"]}
    assert differing_keys(ours, theirs)[1:] == ["classes"]
    assert differing_keys(ours, theirs)[0].startswith("changed_by[0].init_args.")
    assert differing_keys(ours, {"changed_by": [], "classes": ours["classes"]}) == ["changed_by"]


def test_soft_maps_are_read_back_as_seeds(tmp_path: Path) -> None:
    """What one run writes, the next takes as its seeds."""
    from datamodules.seed_files import read_seed

    foreground = torch.rand(2, 6, 5)
    mask = RefinedMask("a", (3, 7), foreground, torch.zeros(6, 5, dtype=torch.uint8))
    OutputFolder(tmp_path, "npz").save(mask)
    seed = read_seed(tmp_path / "soft" / "a.npz", (6, 5), 20)
    assert seed.class_ids == (3, 7)
    torch.testing.assert_close(seed.scores, foreground, atol=1e-3, rtol=0)


class Scale:
    """A step of somebody's own that keeps its argument under another name."""

    def __init__(self, factor: float, num_workers: int = 0) -> None:
        self._factor = factor

    def scaled(self, foreground: torch.Tensor, _: Any) -> torch.Tensor:
        return foreground * self._factor


class WiderScale(Scale):
    """What it does not name it passes on."""

    def __init__(self, power: float, **options: Any) -> None:
        super().__init__(**options)
        self.power = power


def scaling(factor: float) -> Callable[..., torch.Tensor]:
    return lambda foreground, _: foreground * factor


def halved(foreground: torch.Tensor, _: Any) -> torch.Tensor:
    return foreground / 2


def doubled(foreground: torch.Tensor, _: Any) -> torch.Tensor:
    return foreground * 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Scale(0.5), Scale(0.7)),
        (Scale(0.5).scaled, Scale(0.7).scaled),
        (WiderScale(1, factor=0.5), WiderScale(1, factor=0.7)),
        (halved, doubled),
        (scaling(0.5), scaling(0.7)),
        (lambda soft, _: soft * 0.5, lambda soft, _: soft * 0.7),
        (partial(pow, exp=2), partial(pow, exp=3)),
        (np.float32(0.5), np.float32(0.7)),
        (torch.tensor(0.5), torch.tensor(0.7)),
        (torch.tensor([0.5, 1]), torch.tensor([0.7, 1])),
        (np.array([0.5, 1]), np.array([0.7, 1])),
        (torch.float16, torch.bfloat16),
        (torch.device("cpu"), torch.device("meta")),
        (re.compile("a"), re.compile("b")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_distinguishes_two_values_is_described(one: object, other: object) -> None:
    described = describe(one)
    assert described == describe(copy.copy(one)) == json.loads(json.dumps(described))
    assert described != describe(other)


def test_numbers_are_described_as_numbers() -> None:
    described = describe([np.float32(0.5), np.int64(3), torch.tensor([2.0]), np.array(True)])
    assert described == [0.5, 3, 2.0, True]
    assert describe(halved) == f"{__name__}.halved"


def test_random_weights_are_not_the_description_of_a_network() -> None:
    assert describe(torch.nn.Conv2d(3, 4, 1)) == describe(torch.nn.Conv2d(3, 4, 1))


def test_an_argument_that_cannot_be_read_back_is_refused_by_name() -> None:
    class Forgetful:
        def __init__(self, factor: float, num_workers: int = 0) -> None:
            self.by = factor

    class Greedy:
        def __init__(self, **options: float) -> None:
            self.by = options["factor"]

    class Told(Forgetful):
        def configuration(self) -> dict[str, float]:
            return {"factor": self.by}

    with pytest.raises(ConfigurationError, match=r"Forgetful: its argument factor .* attribute"):
        describe([Forgetful(0.5)])
    with pytest.raises(ConfigurationError, match="Greedy: its argument options"):
        describe(Greedy(factor=0.5))
    with pytest.raises(ConfigurationError, match="Generator does not tell"):
        describe(torch.Generator())
    assert describe(Told(0.5))["init_args"] == {"factor": 0.5}


def test_an_extractor_keeps_its_arguments_and_a_network_need_not() -> None:
    class Network(torch.nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.head = torch.nn.Linear(2, classes)

    class Own(VAEFeatures):
        def __init__(self, cell: int) -> None:
            super().__init__()
            self.size = cell

    assert describe(Network(2))["init_args"] == {}
    with pytest.raises(ConfigurationError, match="Own: its argument cell"):
        describe(Own(2))


def test_what_a_module_s_configuration_does_not_tell_is_added() -> None:
    class Stronger(G4SegModule):
        def __init__(self, strength: float, **options: Any) -> None:
            super().__init__(**options)
            self.strength = strength

    described = describe(Stronger(0.5, model="sd", seed=3))["init_args"]
    assert described["strength"] == 0.5
    assert described["seed"] == 3
