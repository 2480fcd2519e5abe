"""What a tiny decoder saves: the paper's update with it and with the autoencoder's own decoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import AutoencoderTiny
from torch import nn

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.bench.rows import Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.steps import STEPS, one_and_three_classes, refine_once
from g4seg_pl.bench.timing import Spent, describe_pairs, interleaved, ratio
from g4seg_pl.lab.cost import PeakMemory
from g4seg_pl.types import Sample

FULL_SIZE_ROUNDS = 3


def decoder(setting: Setting) -> Iterator[Row]:
    """Yield time and memory of one mask, and of decoding alone, with both decoders.

    Args:
        setting: size, place and rounds; at full size each is timed three times at most.
    """
    full = setting.generator.vae.decoder
    tiny = build_tiny(setting)
    sample = one_and_three_classes(setting)[0]
    rounds = min(FULL_SIZE_ROUNDS, setting.rounds) if setting.size.full else setting.rounds
    decoders = {"full": None, "tiny": tiny}
    update = {name: partial(_refine, setting, sample, each) for name, each in decoders.items()}
    # Once before: what is allocated for good must not count against the first.
    for run in update.values():
        run()
    for name, run in update.items():
        with PeakMemory(setting.device) as memory:
            run()
        weights = _megabytes(full if name == "full" else tiny)
        detail = f"beyond the models, one mask; the decoder's weights are {weights:.3g} MB"
        yield Row(f"decoder: {name}, memory", memory.bytes / 1e6, "MB", None, detail)
    spent = interleaved(update, rounds, setting.device, warm_up=False)
    yield _ratio_row("decoder: tiny / full, the paper's update", spent)
    alone = {name: partial(_decode, setting, each) for name, each in decoders.items()}
    spent = interleaved(alone, rounds, setting.device, warm_up=False)
    yield _ratio_row("decoder: tiny / full, decoding alone", spent)


def build_tiny(setting: Setting) -> AutoencoderTiny:
    """A tiny decoder of the size with random weights, without an encoder, in place.

    Args:
        setting: size and place.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = AutoencoderTiny(**setting.size.tiny)
    del tiny.encoder
    tiny.decoder.to(setting.device, setting.dtype).to(memory_format=torch.channels_last)
    frozen: AutoencoderTiny = tiny.eval().requires_grad_(requires_grad=False)
    return frozen


@contextmanager
def _decoding_by(generator: StableDiffusion, tiny: AutoencoderTiny | None) -> Iterator[None]:
    generator.decoder = tiny
    try:
        yield
    finally:
        generator.decoder = None


def _refine(setting: Setting, sample: Sample, tiny: AutoencoderTiny | None) -> None:
    with _decoding_by(setting.generator, tiny):
        refine_once(setting, STEPS["paper"], sample)


def _decode(setting: Setting, tiny: AutoencoderTiny | None) -> None:
    config = setting.generator.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    with _decoding_by(setting.generator, tiny), torch.no_grad():
        setting.generator.decode(torch.zeros(shape, device=setting.device))


def _ratio_row(name: str, spent: dict[str, list[Spent]]) -> Row:
    detail = describe_pairs(spent["tiny"], spent["full"])
    return Row(name, ratio(spent["tiny"], spent["full"]), "×", None, detail)


def _megabytes(network: nn.Module) -> float:
    return sum(each.numel() * each.element_size() for each in network.parameters()) / 1e6
