"""`g4seg check`: everything that is missing, all at once, before a long run starts."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Only typing here: the command line's help must not wait for torch.
if TYPE_CHECKING:
    from datamodules.base import SeedDataModule
    from datamodules.items import Item

FILES = ("-c", "--config")
OF_A_RUN = ("--model", "--writer", "--trainer", "--out", "--override", "--seed_everything")
SHOWN = 20
"""So many complaints are printed; the rest is counted."""


@dataclass(frozen=True)
class CheckReport:
    """What a data set holds and lacks.

    Attributes:
        images: number of items, in this shard.
        with_truth: how many of them have a ground-truth file.
        complaints: what is missing or unreadable, by image id.
        histogram: images per class name; empty where neither labels nor a full check tell.
        dialect: of the seeds: the one that is forced, or that of the first file that has one.
        refused: why no mask could be written, whatever the items hold; empty if one could.
    """

    images: int
    with_truth: int
    complaints: dict[str, tuple[str, ...]]
    histogram: dict[str, int]
    dialect: str | None = None
    refused: str = ""

    def lines(self, seconds_per_image: float | None = None) -> list[str]:
        """The report as text, with the time a run will take where a speed is given."""
        counts = f"{self.images} images, {self.with_truth} with ground truth"
        text = [f"{counts}, {len(self.complaints)} unusable"]
        text += [f"seeds are read as {self.dialect}"] if self.dialect else []
        text += [self.refused] if self.refused else []
        for complaint in [line for lines in self.complaints.values() for line in lines][:SHOWN]:
            text.append(f"  {complaint}")
        if len(self.complaints) > SHOWN:
            text.append(f"  and {len(self.complaints) - SHOWN} more images")
        text += [f"  {count:6d} {name}" for name, count in self.histogram.items()]
        if seconds_per_image is not None:
            hours = self.images * seconds_per_image / 3600
            text.append(f"about {hours:.1f} h at {seconds_per_image:.2g} s per image")
        return text


def inspect(data: "SeedDataModule", *, truth: bool = False, full: bool = False) -> CheckReport:
    """Looks at every item of a data module.

    Args:
        data: the data module; it is set up if it was not.
        truth: also ground truth must be there, and of the image's size.
        full: decodes everything as a run would; otherwise names and headers only.

    Raises:
        ConfigurationError: as `SeedDataModule.setup`.
    """
    data.setup()
    complaints: dict[str, tuple[str, ...]] = {}
    counts: Counter[int] = Counter()
    for item in data.items:
        found, class_ids = _inspect(data, item, truth=truth, full=full)
        counts.update(class_ids)
        if found:
            complaints[item.image_id] = tuple(found)
    names = data.class_list.names
    histogram = {names[class_id - 1]: counts[class_id] for class_id in sorted(counts)}
    truths = sum(item.truth is not None and item.truth.is_file() for item in data.items)
    counted = (len(data.items), truths, complaints, histogram, data.seed_dialect())
    return CheckReport(*counted, refused=_refused(len(names)))


def _refused(classes: int) -> str:
    """What a run says to so many classes."""
    from g4seg_pl.types import ConfigurationError, check_class_count

    try:
        check_class_count("data.class_names", classes)
    except ConfigurationError as error:
        return str(error)
    return ""


def _inspect(
    data: "SeedDataModule", item: "Item", *, truth: bool, full: bool
) -> tuple[list[str], tuple[int, ...]]:
    """Complaints about an item, and the classes known to be in it."""
    from g4seg_pl.types import BadItemError

    if not full:
        return data.reader.check(item, with_truth=truth)
    try:
        return [], data.reader.read(item, with_truth=truth).seed.class_ids
    except (BadItemError, OSError) as error:
        return [str(error)], ()


def data_of_run(words: Sequence[str]) -> list[str]:
    """Return arguments with ``--data`` in place of a run's file, of which nothing else matters.

    Args:
        words: as typed; ``-c FILE`` and ``--config FILE`` may name files of `g4seg predict`, those
            of configs/ or the config.yaml beside its masks; the run's other options are passed
            over.

    Raises:
        ConfigurationError: a file cannot be read, or none names data.
    """
    left, found, files, data = list(words), [], [], []
    while left:
        option, equals, value = left.pop(0).partition("=")
        if option in FILES and (equals or left):
            files.append(Path(value if equals else left.pop(0)))
            data += [section] if (section := _data_of(files[-1])) else []
        elif option in OF_A_RUN or option.startswith(tuple(f"{each}." for each in OF_A_RUN)):
            if not equals and left and not _is_option(left[0]):
                left.pop(0)
        else:
            found.append(option + equals + value)
    if files and not data:
        from g4seg_pl.types import ConfigurationError

        message = f"-c {files[-1]} has no `data`; give a file of g4seg predict, or --data CLASS"
        raise ConfigurationError(message)
    return [*(word for each in data for word in ("--data", json.dumps(each))), *found]


def _is_option(word: str) -> bool:
    """Whether a word begins an option; others, -1 too, are values of the one before."""
    return word.startswith("--") or word.partition("=")[0] in FILES


def _data_of(file: Path) -> object:
    """The data that a run's file names, if any."""
    import yaml

    from g4seg_pl.types import ConfigurationError

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        message = f"-c {file} cannot be read: {error}; give a file of g4seg predict"
        raise ConfigurationError(message) from error
    return content.get("data") if isinstance(content, dict) else None


def check(
    data: "SeedDataModule",
    truth: bool = False,
    full: bool = False,
    seconds_per_image: float | None = None,
) -> int:
    """Prints counts, everything that is missing, and the class histogram.

    -c FILE takes the data section of a run's file, once or several times; options of the run itself
    (--model..., --writer..., --trainer..., --out, --override) are passed over.

    Args:
        data: the data module.
        truth: also ground truth must be there, and of the image's size.
        full: decodes everything as a run would; otherwise names and headers only.
        seconds_per_image: speed of the run to come, to say how long it will take.

    Returns:
        Exit code: 0 if every item can be used and masks can be written, 1 otherwise.
    """
    report = inspect(data, truth=truth, full=full)
    print("\n".join(report.lines(seconds_per_image)))
    return 1 if report.complaints or report.refused or not report.images else 0
