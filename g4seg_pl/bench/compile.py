"""What compiling the U-Net's transformer blocks saves a pass, and what it costs once."""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from g4seg_pl.bench.rows import Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.timing import Stopwatch, describe_pairs, interleaved, ratio

FULL_SIZE_ROUNDS = 3


def compile_blocks(setting: Setting) -> Iterator[Row]:
    """Yield the time of one plain U-Net pass, blocks compiled over not, and of the compilation.

    Blocks of one shape are compiled once (diffusers' regional compilation). Nothing is injected:
    injection exchanges attention's code, which only ends compiled graphs earlier.

    Args:
        setting: size, place and rounds; at full size the passes are timed three times at most.
    """
    plain = setting.generator.unet
    compiled = copy.deepcopy(plain)
    compiled.compile_repeated_blocks()
    passes = {name: partial(_pass, unet, setting) for name, unet in _named(plain, compiled)}
    with Stopwatch(setting.device) as first:
        passes["compiled"]()
    rounds = min(FULL_SIZE_ROUNDS, setting.rounds) if setting.size.full else setting.rounds
    spent = interleaved(passes, rounds, setting.device)
    detail = f"{describe_pairs(spent['compiled'], spent['plain'])}; one U-Net pass"
    yield Row(
        "compile: blocks / plain", ratio(spent["compiled"], spent["plain"]), "×", None, detail
    )
    usual = min(each.seconds for each in spent["compiled"])
    detail = "the first pass over the fastest later one; kept on disk for the next process"
    yield Row("compile: once", first.spent.seconds - usual, "s", None, detail)


def _named(plain: nn.Module, compiled: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "plain", plain
    yield "compiled", compiled


@torch.no_grad()
def _pass(unet: nn.Module, setting: Setting) -> Tensor:
    config = setting.generator.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    device, dtype = setting.device, setting.dtype
    words = torch.zeros(1, 77, config.cross_attention_dim, device=device, dtype=dtype)
    latent = torch.zeros(shape, device=device, dtype=dtype)
    latent = latent.contiguous(memory_format=torch.channels_last)
    output: Tensor = unet(latent, 400, encoder_hidden_states=words).sample
    return output
