"""Class lists and the words of their prompts."""

from pathlib import Path

import pytest

from datamodules.classes import BUNDLED, read_class_list
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


def test_a_list_with_a_name_twice(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    for content in ("cat\ncat\n", "# none\n", "|cat\n"):
        path.write_text(content)
        with pytest.raises(ConfigurationError, match=r"names\.txt"):
            read_class_list(path)
