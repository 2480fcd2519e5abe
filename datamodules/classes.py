"""Class lists: data-set names, the names put into prompts, and synonyms, from small text files."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datamodules.items import read_lines
from g4seg_pl.types import ConfigurationError

BUNDLED = Path(__file__).parent / "class_names"


@dataclass(frozen=True)
class ClassList:
    """The foreground classes of a data set; class id 1 is the first, 0 is the background.

    Attributes:
        names: as the data set writes them, in annotations and reports.
        prompts: as put into the prompt, one per class.
        synonyms: other names accepted for each class when annotations are read.
    """

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        """The number of foreground classes."""
        return len(self.names)

    @cached_property
    def _ids(self) -> dict[str, int]:
        every = zip(self.names, self.prompts, self.synonyms, strict=True)
        return {
            _folded(name): class_id
            for class_id, (name, prompt, synonyms) in enumerate(every, start=1)
            for name in (*synonyms, prompt, name)
        }

    def prompt(self, class_id: int) -> str:
        """The name put into the prompt for a class id (1-based)."""
        return self.prompts[class_id - 1]

    def find(self, name: str) -> int | None:
        """The class id (1-based) of a name, prompt name or synonym; None if it is unknown.

        Case, underscores and hyphens do not count.
        """
        return self._ids.get(_folded(name))


def require_same_classes(classes: ClassList, masks: Path | str) -> None:
    """Refuses masks whose run.json, in their folder or the one above, counts classes otherwise.

    Seeds and labels only number their classes: with another list they go by wrong names.

    Args:
        classes: the class list of the data set.
        masks: where they lie; only a local folder is looked into.

    Raises:
        ConfigurationError: a class id stands for something else there.
    """
    if not isinstance(masks, Path):
        return
    for record in (masks / "run.json", masks.parent / "run.json"):
        theirs = _recorded_names(record)
        for class_id, name in enumerate(theirs, start=1):
            same = classes.names[class_id - 1 : class_id] == (name,)
            # Another spelling of the thing will do; a name may also be another class's synonym.
            if not same and classes.find(name) != class_id:
                ours = classes.names[class_id - 1] if class_id <= len(classes) else "nothing"
                message = (
                    f"class_names: class {class_id} is {name!r} by {record} and {ours!r} here; "
                    "give the class list that those masks were made with"
                )
                raise ConfigurationError(message)
        if theirs:
            return


def _recorded_names(record: Path) -> list[str]:
    """The class names in a run.json of g4seg; none if it is missing, or another program's."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    names = content.get("class_names") if isinstance(content, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _folded(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _locate(source: str | Path) -> Path:
    """A bundled list by its bare name, otherwise a file."""
    bundled = BUNDLED / f"{source}.txt"
    if len(Path(source).parts) == 1 and bundled.is_file():
        return bundled
    path = Path(source).expanduser()
    if path.is_file():
        return path
    known = ", ".join(sorted(path.stem for path in BUNDLED.glob("*.txt")))
    message = f"class_names: no file {source} and no bundled list of that name (known: {known})"
    raise ConfigurationError(message)


def read_class_list(source: str | Path) -> ClassList:
    """Reads a class list.

    One class a line in the order of the label values, from 1 and without the background:
    `name | prompt name | synonym | ...`; the prompt name is the name where it is left out. Empty
    lines and lines that start with `#` are skipped.

    Args:
        source: a text file, or the name of a bundled list, such as `voc`.

    Raises:
        ConfigurationError: there is no such file, it lists no class, or one name twice.
    """
    path = _locate(source)
    lines = [line.strip() for line in read_lines(path, "class_names")]
    rows = [
        [field.strip() for field in line.split("|")]
        for line in lines
        if line and not line.startswith("#")
    ]
    names = tuple(row[0] for row in rows)
    if not names or "" in names or len({_folded(name) for name in names}) < len(names):
        message = f"class_names: {path} must list at least one class, each name once"
        raise ConfigurationError(message)
    if _folded(names[0]) == "background":
        message = f"class_names: {path} begins with {names[0]}; list the classes after it alone"
        raise ConfigurationError(message)
    prompts = tuple(row[1] if len(row) > 1 and row[1] else row[0] for row in rows)
    return ClassList(names, prompts, tuple(tuple(filter(None, row[2:])) for row in rows))
