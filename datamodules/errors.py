"""One form for every complaint about a file: which file, what is wrong, what to do."""

from datamodules.files import File
from g4seg_pl.types import BadItemError


def bad_item(path: File | str, problem: str, remedy: str) -> BadItemError:
    """Returns (does not raise) the error of one unusable file.

    Args:
        path: the file, or the id when there is no file.
        problem: what is wrong, naming the field and the value got.
        remedy: what the reader of the message can do about it.
    """
    return BadItemError(f"{path}: {problem}. {remedy}")
