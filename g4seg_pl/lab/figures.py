"""``g4seg paper fig-3`` and the like: the paper's picture grids, drawn on what is at hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from g4seg_pl.callbacks.run_record import write_text_atomically
from g4seg_pl.core.background import BackgroundRule, Threshold
from g4seg_pl.lab.compare import WAYS, read_ways, ways_of
from g4seg_pl.lab.panels import Row, Trace, trace
from g4seg_pl.lab.paper_table import PaperTable
from g4seg_pl.lab.sources import SeedKind, Source, mask_iou
from g4seg_pl.lab.stages import Masks, Way
from g4seg_pl.report import pictures
from g4seg_pl.types import ConfigurationError, Sample

BATCH = 8
CANDIDATES = 24
WRITTEN = "configs/paper/ways.yaml"
# Columns that show one mask; with any of them a row shows its own class alone.
OF_ONE_MASK = ("soft", "generated", "partner", "points", "stars")
HOW_CHOSEN = {
    "first": "the first of {count}",
    "spread": "of {count}, half those that gained most, then half those that lost most",
    "over": "of {count}, the masks whose seed takes in most background",
    "under": "of {count}, the masks whose seed misses most of the object",
}


@dataclass(frozen=True)
class Choice:
    """One row of the sheet before it is drawn.

    Attributes:
        row: to be drawn.
        label: written above it.
    """

    row: Row
    label: str


class PaperFigure:
    """One figure: its YAML, drawn.

    Args:
        table: the command's options with the figure's plan; its rows are a table's, with
            ``scenes``, ``choose`` and, for the sheet, ``columns``, ``shows`` and ``side``.
    """

    def __init__(self, table: PaperTable) -> None:
        self.table, self.plan, self.options = table, table.plan, table.options
        self.columns: dict[str, str] = dict(table.here(table.plan, "columns"))
        self.side = int(self.plan.get("side", 160))
        self.chosen = self.options.chosen.is_file()

    def write(self, out: Path) -> str:
        """Draw what can be drawn; write ``<figure>.png`` and ``<figure>.md``; return the latter."""
        out.mkdir(parents=True, exist_ok=True)
        choices: list[Choice] = []
        told: list[str] = []
        for row in self.table.rows:
            reason = row.get("not_here") if self.options.world else row.get("needs")
            if reason:
                told.append(f"{row['row']}: not drawn; {reason}.")
                continue
            drawn, how = self._choose(row)
            choices += drawn
            told.append(f"{row['row']}: {how}.")
        name = self.options.table
        if choices:
            self._sheet(choices, out / f"{name}.png")
        text = self._caption(bool(choices), told)
        write_text_atomically(out / f"{name}.md", text)
        return text

    def _sheet(self, choices: Sequence[Choice], path: Path) -> None:
        rows = [[choice.row.panel(column) for column in self.columns] for choice in choices]
        labels = [choice.label for choice in choices]
        sheet = pictures.grid(rows, tuple(self.columns.values()), self.side, labels)
        temporary = path.with_suffix(".tmp")
        sheet.save(temporary, format="PNG")
        temporary.replace(path)

    def _choose(self, row: Mapping[str, Any]) -> tuple[list[Choice], str]:
        source, rule = self._source(row)
        count = self.options.images or int(row.get("candidates", CANDIDATES))
        ids = source.ids[:count]
        samples = [sample for sample in source.samples(ids) if sample.class_names]
        if not samples:
            message = f"row {row['row']!r}: none of {len(ids)} images has seed and truth"
            raise ConfigurationError(message)
        how, wanted = str(row.get("choose", "first")), int(row.get("scenes", 4))
        if how not in HOW_CHOSEN:
            message = f"choose is {how!r}; give one of {', '.join(HOW_CHOSEN)}"
            raise ConfigurationError(message)
        ways = self._ways(row)
        if how == "spread":
            rows = self._rows(samples, ways, rule, [None] * len(samples))
            rows = spread(rows, wanted)
        elif how == "first":
            samples = samples[:wanted]
            rows = self._rows(samples, ways, rule, [largest(sample) for sample in samples])
        else:
            pairs = one_a_sample(most_wrong(samples, rule, over=how == "over"))[:wanted]
            chosen, masks = [samples[place] for place, _ in pairs], [mask for _, mask in pairs]
            rows = self._rows(chosen, ways, rule, masks)
        text = HOW_CHOSEN[how].format(count=f"{len(ids)} images ({source.split})")
        return [Choice(each, f"{row['row']}: {_what(each)}") for each in rows], text

    def _rows(
        self,
        samples: Sequence[Sample],
        ways: Sequence[Way],
        rule: BackgroundRule,
        masks: Sequence[int | None],
    ) -> list[Row]:
        refiner = self.table.lab.models.refiner(self.table.features)
        single = any(column.split(" ")[0] in OF_ONE_MASK for column in self.columns)
        threshold = Masks((), rule).threshold
        rows: list[Row] = []
        for start in range(0, len(samples), BATCH):
            part = samples[start : start + BATCH]
            seeds = trace(refiner, Way("seed"), part, rule)
            every = {way.name: trace(refiner, way, part, rule) for way in ways}
            for index, sample in enumerate(part):
                traces: dict[str, Trace] = {name: each[index] for name, each in every.items()}
                mask = masks[start + index] if single else None
                rows.append(Row(sample, seeds[index], traces, threshold, mask, self.side))
        return rows

    def _source(self, row: Mapping[str, Any]) -> tuple[Source, BackgroundRule]:
        if self.options.world and not self.chosen:
            kind: SeedKind = row["world"]
            return self.table.lab.source(kind), Threshold()
        return self.table.source(row)

    def _ways(self, row: Mapping[str, Any]) -> list[Way]:
        if self.options.world and self.chosen:
            return self.table.ways(row)
        names = [name for name in self.table.here(row, "ways") if name != "seed"]
        return ways_of(names, read_ways(WAYS))

    def _caption(self, drawn: bool, told: Sequence[str]) -> str:
        name = self.options.table
        lines = [f"### {self.plan['title']}", "", f"The paper's figure: {self.plan['shows']}", ""]
        if drawn:
            lines += [f"This one: {self._where()}", "", f"![{name}]({name}.png)", ""]
        else:
            lines += ["No picture was drawn.", ""]
        notes = (*told, *(self.plan.get("notes", ()) if drawn else ()))
        return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"

    def _where(self) -> str:
        """What the picture was drawn from, in sentences."""
        if not self.options.world:
            model = self.options.model.model or "the embedded generator"
            return f"drawn on {self.options.data.root} with {model}, at the settings of {WRITTEN}."
        settings = "chosen on validation scenes" if self.chosen else f"those of {WRITTEN}"
        return (
            "drawn in the embedded world, whose scenes, seeds and small generator stand in for the "
            "paper's. It shows what the figure is about, not what the paper found. "
            f"Settings: {settings}."
        )


def _what(row: Row) -> str:
    if row.mask is None:
        return f"{row.sample.image_id} ({', '.join(row.sample.class_names)})"
    return f"{row.sample.image_id}, {row.sample.class_names[row.mask]}"


def largest(sample: Sample) -> int:
    """Return which of a sample's coarse masks covers most."""
    return int(sample.seed.scores.flatten(1).sum(1).argmax())


def spread(rows: Sequence[Row], wanted: int) -> list[Row]:
    """Return the rows whose last way gained most, then those it lost most, half of each."""
    change = [_score(row, list(row.ways.values())[-1]) - _score(row, row.seed) for row in rows]
    order = np.argsort(-np.asarray(change), kind="stable")
    best = order[: -(-wanted // 2)]
    worst = [place for place in order[::-1][: wanted // 2] if place not in best]
    return [rows[place] for place in [*best, *worst]]


def one_a_sample(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return each sample's first pair of sample and mask, in the order given."""
    first: dict[int, tuple[int, int]] = {}
    for place, mask in pairs:
        first.setdefault(place, (place, mask))
    return list(first.values())


def _score(row: Row, found: Trace) -> float:
    """Mean IoU of the classes of a picture."""
    assert row.sample.truth is not None
    truth, label = row.sample.truth.numpy(), found.label.numpy()
    known = truth != 255
    ious = [mask_iou((label == c) & known, truth == c) for c in row.sample.seed.class_ids]
    return float(np.mean(ious))


def most_wrong(
    samples: Sequence[Sample], rule: BackgroundRule, *, over: bool
) -> list[tuple[int, int]]:
    """Return sample and mask of every coarse mask, the most over- or under-segmented first.

    A mask is over-segmented by the share of its union with the truth that is background, less the
    share that it misses; both are measured at the rule's threshold.
    """
    threshold = Masks((), rule).threshold
    ranked = []
    for place, sample in enumerate(samples):
        assert sample.truth is not None
        truth = sample.truth.numpy()
        for mask, own in enumerate(sample.seed.class_ids):
            taken = (sample.seed.scores[mask].numpy() >= threshold) & (truth != 255)
            exact = truth == own
            union = max(1, int((taken | exact).sum()))
            excess = (int((taken & ~exact).sum()) - int((exact & ~taken).sum())) / union
            if exact.any() and (taken & exact).any():
                ranked.append((-excess if over else excess, place, mask))
    return [(place, mask) for _, place, mask in sorted(ranked)]
