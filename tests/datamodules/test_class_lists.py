"""Class lists and the words of their prompts."""

import json
from pathlib import Path

import pytest

from datamodules.classes import BUNDLED, read_class_list, require_same_classes
from datamodules.items import read_list
from datamodules.labels import FileLabels
from g4seg_pl.types import ConfigurationError

CLASS_COUNTS = {
    "voc": 20,
    "voc_clip_es": 20,
    "coco": 80,
    "coco_clip_es": 80,
    "context": 59,
    "context459": 459,
    "ade20k": 150,
    "nightcity": 19,
    "scenes": 12,
}


@pytest.mark.parametrize(("name", "count"), CLASS_COUNTS.items())
def test_bundled_lists(name: str, count: int) -> None:
    classes = read_class_list(name)
    assert len(classes) == len(classes.names) == len(classes.prompts) == count
    for class_id, word in enumerate(classes.names, start=1):
        assert classes.find(word.upper()) == class_id
        assert classes.find(classes.prompt(class_id)) == class_id


def test_contexts_frequent_classes_are_numbered_as_among_all() -> None:
    # The ids that mmsegmentation's converter keeps of the 459, in ascending order, are 1 to 59.
    kept = """
        2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162
        187 189 207 220 232 258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415
        416 420 424 427 440 445 454 458
    """
    every = read_class_list("context459").names
    assert read_class_list("context").names == tuple(every[int(i) - 1] for i in kept.split())


def test_every_bundled_list_is_tested() -> None:
    assert {path.stem for path in BUNDLED.glob("*.txt")} == set(CLASS_COUNTS)


def test_synonyms() -> None:
    voc = read_class_list("voc")
    assert voc.prompt(20) == "television"
    assert voc.find("TV_Monitor") == voc.find("screen") == 20
    assert voc.find("dragon") is None


def test_a_list_that_begins_with_the_background(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("Background\ncat\ndog\n")
    with pytest.raises(ConfigurationError, match="begins with Background"):
        read_class_list(path)


def test_files_as_windows_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeff# ours\r\ncat\r\ndog\r\n".encode())
    classes = read_class_list(path)
    assert classes.names == ("cat", "dog")
    path.write_bytes("\ufeff2007_000032\r\n".encode())
    assert [line.image_id for line in read_list(path)] == ["2007_000032"]
    path.write_bytes("\ufeffa dog\r\n".encode())
    assert FileLabels(path, classes).read("a") == (2,)
    path.write_bytes("cat\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"class_names: .*classes\.txt is not a text file"):
        read_class_list(path)


def test_a_list_with_a_name_twice(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    for content in ("cat\ncat\n", "# none\n", "|cat\n"):
        path.write_text(content)
        with pytest.raises(ConfigurationError, match=r"names\.txt"):
            read_class_list(path)


@pytest.mark.parametrize("folder", ["seeds", "seeds/soft"])
def test_seeds_made_with_another_list_are_refused(tmp_path: Path, folder: str) -> None:
    seeds = tmp_path / folder
    seeds.mkdir(parents=True)
    record = tmp_path / "seeds" / "run.json"
    voc = read_class_list("voc")

    def write(names: list[str] | None) -> None:
        record.write_text(json.dumps({"config": {}, "class_names": names}))

    write([*voc.names])
    require_same_classes(voc, seeds)
    require_same_classes(read_class_list("voc_clip_es"), seeds)  # other words for the same things
    with pytest.raises(ConfigurationError, match=r"class 1 is 'aeroplane' by .*run\.json and"):
        require_same_classes(read_class_list("coco"), seeds)
    write([*voc.names[:8], voc.names[9], voc.names[8]])
    with pytest.raises(ConfigurationError, match=r"class 9 is 'cow' by .* and 'chair' here"):
        require_same_classes(voc, seeds)
    write([*voc.names, "dragon"])
    with pytest.raises(ConfigurationError, match=r"class 21 is 'dragon' by .* and 'nothing' here"):
        require_same_classes(voc, seeds)
    own = tmp_path / "own.txt"
    own.write_text("cat\nfeline | feline | cat\n")  # a synonym that is another class's name
    write(["cat", "feline"])
    require_same_classes(read_class_list(own), seeds)
    for unknown in (json.dumps([1]), "{}", "no JSON"):
        record.write_text(unknown)
        require_same_classes(voc, seeds)
