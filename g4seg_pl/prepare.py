"""``g4seg prepare``: data sets on disk, one function each."""

from collections.abc import Sequence
from itertools import pairwise


def main(words: Sequence[str]) -> int:
    """Run ``coco`` or ``scenes``.

    Args:
        words: the name and its arguments.

    Returns:
        the exit status.
    """
    from jsonargparse import auto_cli

    from datamodules.prepare_coco import coco
    from g4seg_pl.world.prepare import scenes

    status: int = auto_cli(
        {"coco": coco, "scenes": scenes},
        args=_with_values(words),
        prog="g4seg prepare",
        as_positional=False,
    )
    return status


def _with_values(words: Sequence[str]) -> list[str]:
    """The words with ``--override`` standing alone, as a flag does, given its value."""
    # jsonargparse wants a value for every bool of a signature.
    return [
        "--override=true" if word == "--override" and after.startswith("-") else word
        for word, after in pairwise([*words, "--"])
    ]
