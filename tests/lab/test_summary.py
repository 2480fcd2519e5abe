"""The short table at the head of the results."""

from typing import Any

from g4seg_pl.lab.summary import short_text


def row(seeds: str, way: str, gain: float) -> dict[str, Any]:
    return {"seeds": seeds, "way": way, "mIoU": 40 + gain, "gain": gain, "gain_se": 0.26}


def test_the_strongest_control_is_shown_even_where_it_wins() -> None:
    gains = {"seed": 0.0, "g4seg": -0.4, "dcrf": 2.0, "blur": 1.0, "best": 3.0}
    rows = [row("gradcam", way, gain) for way, gain in gains.items()]
    rows += [row("degraded", way, gain + 5 * (way == "blur")) for way, gain in gains.items()]
    text = short_text(rows).splitlines()
    assert text[-2] == "| gradcam | 40.0 | -0.4 ± 0.3 | +2.0 ± 0.3 | dcrf +2.0 ± 0.3 | +3.0 ± 0.3 |"
    assert text[-1].split(" | ")[-2:] == ["blur +6.0 ± 0.3", "+3.0 ± 0.3 |"]
