"""What decoding by a tiny decoder costs in quality, paired image by image."""

from dataclasses import replace
from pathlib import Path

import torch

from g4seg_pl.lab.laboratory import Lab
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.sources import SceneSource
from g4seg_pl.lab.table import Cell, Table, line_row
from g4seg_pl.lab.tables.refinement import named
from g4seg_pl.world.folders import TINY_DECODER

# The ways that look at decoded images.
WAYS = ("g4seg", "no-injection")
BATCH = 50


def decoders(lab: Lab, tiny: Path = TINY_DECODER) -> Table:
    """The paper's update, decoded by the autoencoder and by a tiny decoder, all else the same.

    Args:
        lab: whose generator has the full decoder.
        tiny: folder of an AutoencoderTiny for the same latents.
    """
    other = replace(lab, models=replace(lab.models, decoder=tiny))
    rows: list[dict[str, Cell]] = []
    for kind in lab.kinds:
        source, ways = lab.source(kind), named(lab, kind, WAYS)
        full = lab.scores(kind, ways, source=source)
        cheap = other.scores(kind, ways, source=source)
        fidelity = [fidelity_of(each.models, source) for each in (lab, other)]
        for way in ways:
            for name, decibels, found in zip(
                ("full", "tiny"), fidelity, (full, cheap), strict=True
            ):
                line = lab.line(way.name, full["seed"], found[way.name])
                row = line_row(line, seeds=kind, decoder=name)
                row["PSNR of x₀"] = decibels
                if found is cheap:
                    against = lab.line(way.name, full[way.name], cheap[way.name])
                    row |= {"over full": against.gain, "over full_se": against.gain_se}
                rows.append(row)
    note = (
        "PSNR: the images' own latents decoded, in dB. Settings are those chosen with the full "
        "decoder. `over full` is the tiny decoder's mIoU less the full one's, paired by image. "
        "Seconds tell nothing here, where the full decoder is small too (docs/benchmarks.md)."
    )
    title = "The paper's update by a tiny decoder"
    return Table(
        "decoders", title, tuple(rows), lab.protocol(*lab.kinds), (note,), ("gain", "over full")
    )


def fidelity_of(models: Models, source: SceneSource) -> float:
    """Mean over images of the PSNR in dB of each one's own latent, decoded.

    Args:
        models: the generator with its decoder.
        source: the images.
    """
    found = []
    for start in range(0, len(source.ids), BATCH):
        refiner = models.refiner()
        context = refiner.context(source.samples(source.ids[start : start + BATCH]))
        with torch.no_grad():
            for part in context.parts(len(context.images)):
                decoded = refiner.generator.decode(context.latents[part])
                error = ((decoded - context.images[part]) / 2).square().mean((1, 2, 3))
                found.append(-10 * error.log10().cpu())
    return float(torch.cat(found).mean())
