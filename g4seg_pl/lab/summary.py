"""The first lines of docs/results.md: who gains what, in one table a reader can hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from g4seg_pl.lab.tables.refinement import CONTROLS

Row = Mapping[str, Any]


def short_text(rows: Sequence[Row]) -> str:
    """The paper's update, dCRF, the best control and the best recipe on each kind of seeds.

    Args:
        rows: those of the table ``refiners``: ``seeds``, ``way``, ``mIoU``, ``gain``, ``gain_se``.
    """
    lines = [
        "### In short",
        "",
        "Gain over the coarse mask in mIoU, percent, from the table of refiners below. The control",
        f"is that one of {len(CONTROLS)} which gains most on these very scenes, in its favour.",
        "",
        "| coarse masks | mIoU | the paper's update | dCRF | strongest control | best recipe |",
        "|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(str(row["seeds"]) for row in rows):
        ways = {str(row["way"]): row for row in rows if row["seeds"] == kind}
        strongest = max((ways[name] for name in CONTROLS if name in ways), key=_gain)
        cells = [kind, f"{ways['seed']['mIoU']:.1f}"]
        cells += [_signed(ways[name]) for name in ("g4seg", "dcrf")]
        cells += [f"{strongest['way']} {_signed(strongest)}", _signed(ways["best"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gain(row: Row) -> float:
    return float(row["gain"])


def _signed(row: Row) -> str:
    return f"{row['gain']:+.1f} ± {row['gain_se']:.1f}"
