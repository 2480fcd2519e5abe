"""The published weights are what the readers of Stable Diffusion and open_clip expect."""

import torch

from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.world.check import load_judge
from g4seg_pl.world.data import held_out
from g4seg_pl.world.folders import CLIP, GENERATOR, TINY_DECODER, WEIGHTS
from g4seg_pl.world.scenes import CLASS_NAMES


def test_weights_stay_small() -> None:
    size = sum(file.stat().st_size for file in WEIGHTS.rglob("*.safetensors"))
    assert size <= 40 * 2**20


def test_generator_folder_loads_and_names_every_class() -> None:
    generator = StableDiffusion.from_pretrained(str(GENERATOR))
    for name in CLASS_NAMES:
        mask = generator.token_mask(f"A photo of {name}", name)
        assert mask.sum() == len(name.split())
    latents = generator.encode(torch.zeros(1, 3, 64, 64))
    assert latents.shape == (1, 4, 16, 16)


def test_tiny_decoder_is_small_and_decodes_what_the_generator_encodes() -> None:
    files = [file.stat().st_size for file in TINY_DECODER.rglob("*") if file.is_file()]
    assert 0 < sum(files) < 1.5 * 2**20
    images = held_out("val", 16)[0]
    psnr = []
    for decoder in (None, str(TINY_DECODER)):
        generator = StableDiffusion.from_pretrained(str(GENERATOR), decoder=decoder)
        with torch.no_grad():
            error = (generator.decode(generator.encode(images)) - images) / 2
        psnr.append(float(-10 * error.square().mean((1, 2, 3)).log10().mean()))
    full, tiny = psnr
    assert tiny > 25
    assert abs(full - tiny) < 3


def test_clip_and_judge_load() -> None:
    from g4seg_pl.seeds.clip_model import encode_texts, load_clip

    clip, tokenizer = load_clip(str(CLIP))
    vectors = encode_texts(clip, tokenizer, CLASS_NAMES, ["a photo of {}"])
    assert torch.linalg.matrix_rank(vectors.detach()) == len(CLASS_NAMES)
    assert load_judge()(torch.zeros(1, 3, 64, 64)).shape == (1, len(CLASS_NAMES))
