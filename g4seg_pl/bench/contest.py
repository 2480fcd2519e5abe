"""floor, g4seg and plain over the same images, in turns: the ratios the benchmark is about."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor

from datamodules.folder import FolderDataModule
from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.bench.floor import Floor
from g4seg_pl.bench.plain import Plain
from g4seg_pl.bench.rows import Bar, Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.stage import Stage
from g4seg_pl.bench.timing import Spent, Stopwatch, describe_pairs, ratio
from g4seg_pl.core.background import compose_label
from g4seg_pl.features.transformers_clip import TransformersClipFeatures
from g4seg_pl.lab.cost import PeakMemory
from g4seg_pl.types import RefinedMask, Sample

BATCHES = {"cpu": (1, 2, 3), "cuda": (1, 4, 8, 16)}
SOFT_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass
class Found:
    """What the turns gave so far.

    Attributes:
        spent: of each contestant, by image.
        masks: number of masks, by image.
        peaks: megabytes beyond what was in use before, of each contestant.
        soft: differences between g4seg's and plain's soft maps, flat, one tensor an image.
        equal: share of pixels with the same label, by image.
    """

    spent: dict[str, dict[str, Spent]] = field(
        default_factory=lambda: {"floor": {}, "g4seg": {}, "plain": {}}
    )
    masks: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    soft: list[Tensor] = field(default_factory=list)
    equal: list[float] = field(default_factory=list)

    def pairs(self, over: str, under: str) -> tuple[list[Spent], list[Spent]]:
        """The times of two contestants over the images that both did."""
        names = [name for name in self.spent[over] if name in self.spent[under]]
        return (
            [self.spent[over][name] for name in names],
            [self.spent[under][name] for name in names],
        )


class Contest:
    """The three contestants on one device in one number format."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        """Load g4seg's models and, if it is to run, plain's.

        Args:
            setting: size and place.
            dtype: number format of floor and g4seg; plain is always float32.
        """
        self.setting, self.dtype, self.found = setting, dtype, Found()
        self.stage = Stage(setting.models, setting.device, dtype)
        first = next(iter(setting.inputs.counts))
        self._run_stage(first)
        self.floor = Floor(
            cast(StableDiffusion, self.stage.module.generator),
            cast(TransformersClipFeatures, self.stage.module.features),
            batch=1,
        )
        self.plain = Plain(setting.models, setting.device) if setting.plain_images else None
        self.batches: dict[int, float] = {}
        self._last: RefinedMask | None = None

    def run(self) -> Iterator[Found]:
        """Warm up, measure memory, choose the batch, then image by image; yield after each."""
        names = list(self.setting.inputs.counts)
        self._measure_memory(names[0])
        self._choose_batch()
        for turn, name in enumerate(names):
            contestants = ["floor", "g4seg"]
            if self.plain is not None and turn < self.setting.plain_images:
                contestants.append("plain")
            first = turn % len(contestants)
            for contestant in contestants[first:] + contestants[:first]:
                gc.collect()
                self._turn(contestant, name)
            yield self.found

    def _place(self) -> None:
        """Bring the networks, which Lightning leaves on the CPU after every run, to the device."""
        self.stage.module.to(self.setting.device)

    def _choose_batch(self) -> None:
        self._place()
        candidates = BATCHES[self.setting.device.type]
        self.floor.best_batch(candidates[:1])
        self.floor.batch, self.batches = self.floor.best_batch(candidates)
        self.stage.limit(self.floor.batch)

    def _turn(self, contestant: str, name: str) -> None:
        """Let a contestant refine an image, and note its time."""
        count = self.setting.inputs.counts[name]
        self.found.masks[name] = count
        match contestant:
            case "floor":
                self._place()
                spent = self.floor.timed_image(count)
            case "g4seg":
                spent, masks = self._run_stage(name)
                self._last = masks[0]
            case _:
                sample = self._sample(name)
                with Stopwatch(self.setting.device) as watch:
                    soft = cast(Plain, self.plain).refine(sample)
                spent = watch.spent
                self._compare(sample, soft, name)
        self.found.spent[contestant][name] = spent

    def _compare(self, sample: Sample, soft: Tensor, name: str) -> None:
        """Hold plain's masks against g4seg's, of a run of its own if that has not had its turn."""
        refined = self._last
        if refined is None or refined.image_id != name:
            refined = self._run_stage(name)[1][0]
        rule = self.stage.module.background
        label = compose_label(soft, sample.seed.class_ids, rule)
        self.found.soft.append((soft - refined.foreground).abs().flatten())
        self.found.equal.append(float((label == refined.label).float().mean()))

    def _measure_memory(self, name: str) -> None:
        count = self.setting.inputs.counts[name]
        runs: dict[str, Callable[[], object]] = {
            "floor": partial(self.floor.image, count),
            "g4seg": partial(self._run_stage, name),
        }
        if self.plain is not None:
            runs["plain"] = partial(self.plain.refine, self._sample(name))
        for contestant, run in runs.items():
            self._place()  # or g4seg's models would count as what it needs beyond them
            with PeakMemory(self.setting.device) as memory:
                run()
            self.found.peaks[contestant] = memory.bytes / 1e6

    def _run_stage(self, name: str) -> tuple[Spent, list[RefinedMask]]:
        return self.stage.run(self._data(name), self.setting.out(f"{self.dtype}/{name}"))

    def _data(self, name: str) -> FolderDataModule:
        return self.setting.inputs.data((name,))

    def _sample(self, name: str) -> Sample:
        data = self._data(name)
        data.setup()
        (batch,) = data.predict_dataloader()
        return cast(Sample, batch[0])


def contest(setting: Setting) -> Iterator[Row]:
    """Yield the rows of the contest, again after each image; in bfloat16, and if tiny in float32.

    Args:
        setting: size, place and number of images.
    """
    contestants = Contest(setting, torch.bfloat16)
    for found in contestants.run():
        yield from _ratio_rows(setting, found, contestants)
        yield from _agreement_rows(setting, found, torch.bfloat16)
    if not setting.size.full:
        exact = Contest(setting, torch.float32)
        for found in exact.run():
            yield from _agreement_rows(setting, found, torch.float32)


def _ratio_rows(setting: Setting, found: Found, contestants: Contest) -> Iterator[Row]:
    images, masks = len(found.masks), sum(found.masks.values())
    held = f"{images} images, {masks} masks, bfloat16; {setting.machine}"
    own, floor = found.pairs("g4seg", "floor")
    # On a GPU an image takes no longer than starting a run does: `throughput` has the bars.
    on_cpu = setting.device.type == "cpu"
    bar = setting.bar(1.10) if on_cpu else None
    yield Row(
        "contest: g4seg / floor",
        ratio(own, floor),
        "×",
        bar,
        f"{describe_pairs(own, floor)}; {held}",
    )
    plain, ours = found.pairs("plain", "g4seg")
    if plain:
        detail = f"{describe_pairs(plain, ours)}; plain in float32"
        bar = setting.bar(4, at_least=True) if on_cpu else None
        yield Row("contest: plain / g4seg", ratio(plain, ours), "×", bar, detail)
    seconds = [found.spent["g4seg"][name].seconds / n for name, n in found.masks.items()]
    batches = ", ".join(f"{1e3 * s:.4g} ms at {b}" for b, s in contestants.batches.items())
    milliseconds = 1e3 * sorted(seconds)[len(seconds) // 2]
    detail = f"median over images; bare networks a mask by batch: {batches}"
    yield Row("contest: g4seg, a mask", milliseconds, "ms", None, detail)
    for name, peak in found.peaks.items():
        yield Row(f"contest: {name}, memory", peak, "MB", None, "beyond the models, one mask")


def _agreement_rows(setting: Setting, found: Found, dtype: torch.dtype) -> Iterator[Row]:
    if not found.soft:
        return
    # A tiny model's few cells are large: one that matches elsewhere moves many pixels.
    barred = setting.size.full or dtype == torch.float32
    differences = torch.cat(found.soft)
    kept, text = _quantile(differences, dtype)
    name = str(dtype).removeprefix("torch.")
    detail = f"{text}; largest {differences.max():.3g}, mean {differences.mean():.3g}"
    bar = Bar(SOFT_LIMIT[dtype]) if barred else None
    yield Row(f"contest: soft maps, {name}", kept, "", bar, detail)
    equal = 100 * sum(found.equal) / len(found.equal)
    detail = f"pixels of {len(found.equal)} images with the same label from plain and from g4seg"
    bar = Bar(99.9, at_least=True) if barred else None
    yield Row(f"contest: labels, {name}", equal, "%", bar, detail)


def _quantile(differences: Tensor, dtype: torch.dtype) -> tuple[float, str]:
    """The difference that counts: the largest in float32, that of 99 % of pixels in bfloat16.

    In half precision the best match of a location changes where two are nearly as good; there a
    pixel may move by (1-β) whatever the precision.
    """
    if dtype == torch.float32:
        return float(differences.max()), "largest difference between plain and g4seg"
    ordered = differences.sort().values
    value = float(ordered[int(0.99 * (len(ordered) - 1))])
    return value, "99 % of pixels differ by less between plain in float32 and g4seg"
