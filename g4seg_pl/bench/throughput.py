"""A long predict run in batches of images, as a GPU is used, over the bare networks in the same."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch

from datamodules.folder import FolderDataModule
from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.bench.floor import Floor
from g4seg_pl.bench.inputs import Inputs, write_inputs
from g4seg_pl.bench.plain import Plain
from g4seg_pl.bench.rows import Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.stage import Stage, TimedWriter, predict
from g4seg_pl.bench.timing import Spent, Stopwatch, describe_pairs, middle, ratio
from g4seg_pl.features.transformers_clip import TransformersClipFeatures
from g4seg_pl.lab.cost import PeakMemory
from g4seg_pl.types import Sample

IMAGES_A_BATCH = 6  # of 1, 2, 3, 1, 2, 3 classes: always twelve masks
BATCHES = 8
WORKERS = 2
PLAIN_IMAGES = 3


class WarmWriter(TimedWriter):
    """The writer, with a clock from the end of the first batch to the last written file.

    A run begins with what happens once: processes that read files start, a GPU's memory is
    allocated, kernels are chosen.
    """

    _begun = False

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any
    ) -> None:
        """Hand over a batch; after the first, wait for its files and start the clock."""
        super().write_on_batch_end(trainer, pl_module, *batch)
        if not self._begun:
            self._begun = True
            self._collect(leave=0)
            self._watch.start()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the clock."""
        super().on_predict_start(trainer, pl_module)
        self._begun = False  # a run may be repeated


def throughput(setting: Setting) -> Iterator[Row]:
    """Yield the time of a mask in a long run, over that of the bare networks and under plain's.

    Args:
        setting: size, place and rounds. At full size on a CPU, where the contest says the same in
            less time, nothing is measured unless asked for by name.
    """
    on_gpu = setting.device.type == "cuda"
    if setting.size.full and not on_gpu and not any("throughput" in name for name in setting.only):
        return
    folder = setting.folder / setting.size.name / "many"
    inputs = write_inputs(folder, setting.size.native, IMAGES_A_BATCH * BATCHES)
    masks_a_batch = sum(list(inputs.counts.values())[:IMAGES_A_BATCH])
    stage = Stage(setting.models, setting.device, setting.dtype, masks_per_pass=masks_a_batch)
    run = partial(_run, setting, stage, inputs)
    with PeakMemory(setting.device) as memory:
        run()
    floor = Floor(
        cast(StableDiffusion, stage.module.generator),
        cast(TransformersClipFeatures, stage.module.features),
        batch=masks_a_batch,
    )
    masks = masks_a_batch * (BATCHES - 1)
    own: list[Spent] = []
    bare: list[Spent] = []
    for _ in range(setting.rounds):
        own.append(run())
        stage.module.to(setting.device)  # Lightning leaves the networks on the CPU
        floor.images(IMAGES_A_BATCH, masks_a_batch)
        bare.append(_floor(floor, masks_a_batch))
        yield from _rows(setting, own, bare, masks)
    total = memory.bytes / 1e9
    detail = "most in use during a run, the weights included" if on_gpu else "beyond the weights"
    bar = setting.bar(6) if on_gpu else None
    yield Row("throughput: memory", total, "GB", bar, detail)
    yield from _plain_rows(setting, inputs, middle(own) / masks)
    tuned = [run(tuned=True)]
    detail = f"{describe_pairs(tuned, own[-1:])}; trainer.benchmark seeks cuDNN's fastest kernels"
    name = "throughput: trainer.benchmark / none"
    yield Row(name, ratio(tuned, own[-1:]), "×", None, detail)


def _run(setting: Setting, stage: Stage, inputs: Inputs, *, tuned: bool = False) -> Spent:
    writer = WarmWriter(setting.out("throughput"), override=True)
    data = inputs.data(batch_size=IMAGES_A_BATCH, num_workers=WORKERS)
    before = torch.backends.cudnn.benchmark
    try:
        predict(stage.module, data, setting.device, [writer], benchmark=tuned)
    finally:
        torch.backends.cudnn.benchmark = before
    return writer.spent


def _floor(floor: Floor, masks: int) -> Spent:
    with Stopwatch(floor.device) as watch:
        for _ in range(BATCHES - 1):
            floor.images(IMAGES_A_BATCH, masks)
    return watch.spent


def _rows(
    setting: Setting, own: Sequence[Spent], floor: Sequence[Spent], masks: int
) -> Iterator[Row]:
    on_gpu = setting.device.type == "cuda"
    held = (
        f"{masks} masks by {IMAGES_A_BATCH} images, {WORKERS} reading processes, first batch left "
        f"out; {setting.machine}"
    )
    bar = setting.bar(1.15) if on_gpu else None
    detail = f"{describe_pairs(own, floor)}; {held}"
    yield Row("throughput: g4seg / floor", ratio(own, floor), "×", bar, detail)
    bar = setting.bar(60) if on_gpu else None
    yield Row("throughput: g4seg, a mask", 1e3 * middle(own) / masks, "ms", bar, held)


def _plain_rows(setting: Setting, inputs: Inputs, own: float) -> Iterator[Row]:
    """Plain's seconds a mask over g4seg's, of images of one to three classes."""
    plain = Plain(setting.models, setting.device)
    names = tuple(inputs.counts)[:PLAIN_IMAGES]
    samples = _samples(inputs.data(names))
    plain.refine(samples[0])
    with Stopwatch(setting.device) as watch:
        for sample in samples:
            plain.refine(sample)
    seconds = watch.spent.seconds / sum(inputs.counts[name] for name in names)
    bar = setting.bar(4, at_least=True) if setting.device.type == "cuda" else None
    detail = f"{1e3 * seconds:.4g} ms over {1e3 * own:.4g} ms a mask; plain in float32, warm"
    yield Row("throughput: plain / g4seg", seconds / own, "×", bar, detail)


def _samples(data: FolderDataModule) -> Sequence[Sample]:
    data.setup()
    return [cast(Sample, batch[0]) for batch in data.predict_dataloader()]
