"""What injecting masks costs over plain fused attention, and what more classes cost."""

from collections.abc import Iterator
from functools import partial

import torch

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.bench.allocation import peak_allocated
from g4seg_pl.bench.rows import Row
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.timing import describe_pairs, interleaved, ratio
from g4seg_pl.core.injection import Injection

MANY = 20


def injection(setting: Setting) -> Iterator[Row]:
    """Yield time with 20 classes against 1, with 1 against none, and the extra memory.

    Args:
        setting: size, place and rounds.
    """
    generator = setting.generator
    passes = {count: partial(unet_pass, generator, count) for count in (0, 1, MANY)}
    spent = interleaved(
        {str(count): each for count, each in passes.items()}, setting.rounds, setting.device
    )
    many, one, none = spent[str(MANY)], spent["1"], spent["0"]
    name = f"injection: {MANY} classes / 1 class"
    detail = f"{describe_pairs(many, one)}; one U-Net pass, all classes in one prompt"
    yield Row(name, ratio(many, one), "×", setting.bar(1.2), detail)
    detail = f"{describe_pairs(one, none)}; one U-Net pass"
    yield Row("injection: 1 class / plain attention", ratio(one, none), "×", None, detail)
    peaks = {count: peak_allocated(each, setting.device) for count, each in passes.items()}
    extra = 100 * (peaks[1] / peaks[0] - 1)
    detail = (
        f"tensors allocated at most in one U-Net pass, beside weights: {peaks[0] / 1e6:.5g} MB "
        f"plain, {peaks[1] / 1e6:.5g} MB with 1 class, {peaks[MANY] / 1e6:.5g} MB with {MANY}"
    )
    yield Row("injection: extra memory", extra, "%", setting.bar(2), detail)


@torch.inference_mode()
def unet_pass(generator: StableDiffusion, classes: int, batch: int = 1) -> None:
    """One U-Net pass with so many masks injected; with none it is the bare network.

    Args:
        generator: whose U-Net.
        classes: masks injected at once.
        batch: rows.
    """
    config, text = generator.unet.config, generator.text_encoder.config
    side, length = config.sample_size, text.max_position_embeddings
    device = generator.alphas_cumprod.device
    noisy = torch.zeros(batch, config.in_channels, side, side, device=device)
    told = torch.zeros(batch, length, text.hidden_size, device=device)
    injected = None
    if classes:
        size = generator.image_size
        masks = torch.rand(batch, classes, size, size, device=device)
        tokens = torch.zeros(batch, classes, length, device=device)
        tokens[:, torch.arange(classes), 3 + torch.arange(classes)] = 1
        injected = Injection(masks, tokens, 10.0)
    generator.denoise(noisy, 400, told, injected)
