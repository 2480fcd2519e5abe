"""Runs ways on sources; what is on disk is not computed again."""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from g4seg_pl.callbacks.run_record import Json
from g4seg_pl.core.background import BackgroundRule
from g4seg_pl.core.steps import every_step
from g4seg_pl.evaluation.confusion import mean_overlap
from g4seg_pl.features.base import DenseFeatures
from g4seg_pl.lab.cache import Store, key_of
from g4seg_pl.lab.chain import ChainRunner, State, labels_of, make_batch
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.scores import THRESHOLDS, Scores, join, score_image
from g4seg_pl.lab.sources import Source
from g4seg_pl.lab.stages import Batch, Masks, ReadsFiles, Way
from g4seg_pl.types import ConfigurationError, Sample

BATCH = 16
SAVE_EVERY = 4


@dataclass(frozen=True)
class Run:
    """One way on one source under one noise seed.

    Attributes:
        way: the stages.
        noise_seed: from which all noise derives.
        description: what determines the result.
    """

    way: Way
    noise_seed: int
    description: Json


@dataclass
class Prepared:
    """Images ready to be refined, with what ways have begun on them.

    Attributes:
        samples: as they were read.
        usable: those of them that have a class.
        batch: of these; None until a way needs it.
        chains: what ways have in common, by noise seed.
    """

    samples: Sequence[Sample]
    usable: Sequence[Sample]
    batch: Batch | None = None
    chains: dict[int, ChainRunner] = field(default_factory=dict)


@dataclass
class Runner:
    """Computes what is missing and keeps it.

    Attributes:
        models: the generator.
        store: the results' folder.
        features: F of Eq. 8; the generator's autoencoder if None.
        quiet: print no progress.
        computed: how many images were refined, over all runs; what was on disk does not count.
    """

    models: Models
    store: Store
    features: DenseFeatures | None = None
    quiet: bool = True
    computed: int = field(default=0, init=False)
    _kept: dict[str, Prepared] | None = field(default=None, init=False, repr=False)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep images, and what ways began on them, in memory from one run to the next."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def run(
        self,
        ways: Sequence[Way],
        source: Source,
        background: BackgroundRule,
        noise_seeds: Sequence[int] = (0,),
        *,
        curve: bool = False,
    ) -> dict[str, list[Scores]]:
        """Return the scores of every way, one a noise seed.

        Args:
            ways: with different names.
            source: the images.
            background: of the seeds.
            noise_seeds: at least one.
            curve: score every threshold too, to choose one.

        Raises:
            ConfigurationError: two ways have one name, or no image could be used.
        """
        names = [way.name for way in ways]
        if len(set(names)) < len(names):
            message = f"ways are named {names}; give each its own name"
            raise ConfigurationError(message)
        runs = [
            Run(way, seed, self.description(way, source, background, seed, curve=curve))
            for way in ways
            for seed in noise_seeds
        ]
        done = self._complete(runs, source, background, curve=curve)
        readable = set(source.ids).intersection(*(set(each.ids) for each in done))
        ids = [name for name in source.ids if name in readable]
        if not ids:
            message = f"no image of {source.kind} could be read with seed and truth"
            raise ConfigurationError(message)
        results: dict[str, list[Scores]] = {name: [] for name in names}
        for run, scores in zip(runs, done, strict=True):
            results[run.way.name].append(scores.select(ids))
        return results

    def description(
        self,
        way: Way,
        source: Source,
        background: BackgroundRule,
        noise_seed: int,
        *,
        curve: bool = False,
    ) -> Json:
        """Everything that determines the scores of any image, but its id."""
        # What stages read from files: another tool's masks, another extractor's weights.
        held = [each for each in every_step(way.stages) if isinstance(each, ReadsFiles)]
        read = {"read": [each.identity() for each in held]} if held else {}
        return read | {
            "way": way.describe(),
            "source": source.describe(),
            "split": source.split,
            "background": repr(background),
            "noise_seed": noise_seed,
            "models": self.models.identity(self.features),
            "curve": THRESHOLDS if curve else False,
        }

    def _complete(
        self, runs: Sequence[Run], source: Source, background: BackgroundRule, *, curve: bool
    ) -> list[Scores]:
        parts: dict[str, list[Scores]] = {}
        missing: dict[str, set[str]] = {}
        for run in runs:
            key = key_of(run.description)
            saved = self.store.load("runs", run.description)
            parts[key] = [] if saved is None else [Scores.from_arrays(saved)]
            known = set(parts[key][0].ids) if saved is not None else set()
            missing[key] = set(source.ids) - known
        # Of equal runs, as a sweep has them where it meets the chosen value, one is made.
        todo = {key_of(run.description): run for run in runs if missing[key_of(run.description)]}
        if todo:
            self._compute([*todo.values()], source, background, parts, missing, curve=curve)
        if not all(parts.values()):
            message = f"no image of {source.kind} could be read with seed and truth"
            raise ConfigurationError(message)
        return [_joined(parts[key_of(run.description)]) for run in runs]

    def _compute(
        self,
        runs: Sequence[Run],
        source: Source,
        background: BackgroundRule,
        parts: dict[str, list[Scores]],
        missing: Mapping[str, set[str]],
        *,
        curve: bool,
    ) -> None:
        touched: set[str] = set()
        started, total = time.perf_counter(), math.ceil(len(source.ids) / BATCH)
        for index, ids in enumerate(_chunks(source.ids)):
            wanted = [r for r in runs if missing[key_of(r.description)].intersection(ids)]
            prepared = self._prepare(source, ids if wanted else [], background)
            # An image that cannot be read stays missing, and is no reason to compute others.
            readable = {sample.image_id for sample in prepared.samples}
            wanted = [r for r in wanted if missing[key_of(r.description)] & readable]
            if wanted:
                found = self._chunk(wanted, prepared, background, source, curve=curve)
                for run, scores in zip(wanted, found, strict=True):
                    key = key_of(run.description)
                    new = [name for name in scores.ids if name in missing[key]]
                    if new:
                        parts[key].append(scores.select(new))
                        touched.add(key)
            if index + 1 == total or (index + 1) % SAVE_EVERY == 0:
                self._save([r for r in runs if key_of(r.description) in touched], parts)
                touched.clear()
            self._tell(source, len(runs), index + 1, total, time.perf_counter() - started)

    def _prepare(self, source: Source, ids: Sequence[str], background: BackgroundRule) -> Prepared:
        """Read images, unless they were kept."""
        key = key_of([source.describe(), source.split, list(ids), repr(background)])
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        samples = source.samples(ids) if ids else []
        usable = [sample for sample in samples if sample.class_names]
        prepared = Prepared(samples, usable)
        if self._kept is not None:
            self._kept[key] = prepared
        return prepared

    def _chunk(
        self,
        runs: Sequence[Run],
        prepared: Prepared,
        background: BackgroundRule,
        source: Source,
        *,
        curve: bool,
    ) -> list[Scores]:
        """Score all runs on one batch, latents and common beginnings computed once."""
        samples, usable = prepared.samples, prepared.usable
        if not usable:
            empty = [_score_plain(each, source.num_classes, curve=curve) for each in samples]
            return [join(empty, noisy=False) for _ in runs]
        try:
            with torch.no_grad():
                if prepared.batch is None:
                    prepared.batch = make_batch(self.models.refiner(self.features), usable)
                states = self._states(runs, prepared.batch, prepared.chains, background)
        except torch.OutOfMemoryError as error:
            message = f"out of memory: lower masks_per_pass (now {self.models.masks_per_pass})"
            raise ConfigurationError(message) from error
        return [_score(state, samples, usable, source.num_classes, curve=curve) for state in states]

    def _states(
        self,
        runs: Sequence[Run],
        batch: Batch,
        chains: dict[int, ChainRunner],
        background: BackgroundRule,
    ) -> list[State]:
        seeds = Masks(tuple(sample.seed.scores.float() for sample in batch.samples), background)
        noiseless: dict[str, State] = {}
        states = []
        for run in runs:
            name = key_of(run.way.describe())
            if name not in noiseless:
                chain = chains.setdefault(run.noise_seed, ChainRunner(batch, seeds, run.noise_seed))
                state = chain.run(run.way)
                self.computed += len(batch.samples)
                if not state.noisy:
                    # Every noise seed would give the same.
                    noiseless[name] = state
                states.append(state)
            else:
                states.append(noiseless[name])
        return states

    def _save(self, runs: Sequence[Run], parts: dict[str, list[Scores]]) -> None:
        for run in runs:
            key = key_of(run.description)
            scores = _joined(parts[key])
            parts[key] = [scores]
            summary = {
                "name": run.way.name,
                "n_images": len(scores.ids),
                "miou": round(100 * mean_overlap(scores.overlaps), 4),
            }
            self.store.save("runs", run.description, dict(scores.arrays()), summary)

    def _tell(self, source: Source, runs: int, done: int, total: int, seconds: float) -> None:
        if not self.quiet:
            left = seconds / done * (total - done)
            text = f"{source.kind}/{source.split}: {runs} runs, batch {done}/{total}, {left:.0f} s"
            print(text + " left", file=sys.stderr, flush=True)


def _joined(parts: Sequence[Scores]) -> Scores:
    return join(parts, noisy=any(part.noisy for part in parts))


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), BATCH):
        yield ids[start : start + BATCH]


def _score(
    state: State, samples: Sequence[Sample], usable: Sequence[Sample], classes: int, *, curve: bool
) -> Scores:
    labels = dict(zip((s.image_id for s in usable), labels_of(state.masks, usable), strict=True))
    soft = dict(zip(labels, state.masks.foreground, strict=True))
    # A dense CRF's labels have no threshold; its curve is taken all the same and not used.
    share = state.seconds / sum(len(sample.class_names) for sample in usable)
    parts = []
    for sample in samples:
        if sample.image_id not in labels:
            parts.append(_score_plain(sample, classes, curve=curve))
            continue
        assert sample.truth is not None
        maps = (soft[sample.image_id].numpy(), sample.seed.class_ids) if curve else None
        count = len(sample.class_names)
        parts.append(
            score_image(
                sample.image_id,
                labels[sample.image_id].numpy(),
                sample.truth.numpy(),
                classes,
                maps,
                share * count,
                count,
            )
        )
    return join(parts, noisy=state.noisy)


def _score_plain(sample: Sample, classes: int, *, curve: bool) -> Scores:
    """Score an image without classes: all of it is background."""
    assert sample.truth is not None
    truth = sample.truth.numpy()
    maps = (np.zeros((1, *truth.shape), np.float32), (1,)) if curve else None
    return score_image(sample.image_id, truth * 0, truth, classes, maps, 0.0, 0)
