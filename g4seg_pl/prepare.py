"""``g4seg prepare``: data sets on disk, one function each."""

from collections.abc import Sequence


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
        args=list(words),
        prog="g4seg prepare",
        as_positional=False,
    )
    return status
