"""On a GPU everything gives, in float32, what it gives on the CPU; and speed has its bars."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import masks, words
from fake_voc import IDS, write_voc
from PIL import Image
from segmentation.test_cli import words as training_words
from segmentation.trees import write_tree
from test_module import data, predicted
from test_refiner import sample_of
from torch import Tensor

from g4seg_pl.backbones.controlnet import ControlNetInjection
from g4seg_pl.bench.steps import STEPS
from g4seg_pl.callbacks.records import read_records
from g4seg_pl.core.background import Threshold
from g4seg_pl.core.controls import EdgeFilter, FeatureAffinity, RandomWalk
from g4seg_pl.core.null_text import NullTextCorrespondence
from g4seg_pl.core.steps import Blur, Correspondence, UpdateStep
from g4seg_pl.features.open_clip import OpenClipFeatures
from g4seg_pl.lab.cache import Store
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.runner import Runner
from g4seg_pl.lab.sources import SceneSource
from g4seg_pl.lab.stages import Way
from g4seg_pl.main import main
from g4seg_pl.module import G4SegModule
from g4seg_pl.refiner import G4SegRefiner
from g4seg_pl.segmentation.cli import run
from g4seg_pl.types import RefinedMask
from g4seg_pl.world import train as recipe
from g4seg_pl.world.load import load_seed_maker, scenes

GPU = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*weights_only"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),  # that is what is compared
    pytest.mark.filterwarnings("ignore:.*Precision bf16-mixed is not supported by the model"),
]

EVERY_STEP: dict[str, tuple[UpdateStep, ...]] = STEPS | {
    "all classes at once": (Correspondence(all_classes_at_once=True),),
    "self-match": (Correspondence(matching="self"),),
    "null-text": (NullTextCorrespondence(ddim_steps=2, inner_steps=1),),
    "random walk": (RandomWalk(),),
    "feature affinity": (FeatureAffinity(),),
    "guided filter": (EdgeFilter(kind="guided"),),
    "blur": (Blur(),),
}


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32: convolutions would be three digits apart from the CPU's."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def assert_alike(found: Tensor, expected: Tensor, share: float = 0.99) -> None:
    """Equal but for pixels whose two best partners are as good as each other."""
    assert found.device.type == "cpu"
    assert found.dtype == expected.dtype
    near = (found - expected).abs() < 1e-3
    assert float(near.float().mean()) >= share


@pytest.mark.parametrize("folder", ["sd1_folder", "sd2_folder", "sdxl_folder", "lcm_folder"])
@pytest.mark.parametrize("name", EVERY_STEP)
def test_step_moves_masks_as_on_the_cpu(
    name: str, folder: str, clip_folder: Path, request: pytest.FixtureRequest
) -> None:
    model = str(request.getfixturevalue(folder))
    samples = [
        sample_of("a", 40, 60, ("dog", "cat")),
        sample_of("b", 30, 30, ()),
        sample_of("c", 64, 64, ("zebra disc",)),
    ]
    found = {
        device: G4SegRefiner.from_pretrained(
            model,
            steps=EVERY_STEP[name],
            features=OpenClipFeatures(str(clip_folder), image_size=64),
            device=device,
            dtype="float32",
        ).refine_samples(samples)
        for device in (GPU, "cpu")
    }
    for on_gpu, on_cpu in zip(found[GPU], found["cpu"], strict=True):
        if len(on_cpu):
            assert_alike(on_gpu, on_cpu)


def test_controlnet_and_tiny_decoder_as_on_the_cpu(
    sd1_folder: Path, controlnet_folder: Path, tiny_decoder_folder: Path
) -> None:
    found = [
        G4SegRefiner.from_pretrained(
            str(sd1_folder),
            recipe="paper",
            controlnet=ControlNetInjection(str(controlnet_folder), colours={"dog": "sofa"}),
            decoder=str(tiny_decoder_folder),
            device=device,
            dtype="float32",
        ).refine_samples([sample_of("a", 40, 60, ("dog",))])[0]
        for device in (GPU, "cpu")
    ]
    assert_alike(*found)


@pytest.mark.parametrize("kept", [False, True])
def test_predict_writes_the_labels_of_the_cpu(
    kept: bool, tmp_path: Path, sd2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    more = ["--model.dtype", "float32"]
    more += ["--model.cache_features", "kept"] if kept else []
    assert main(words("predict", sd2_folder, "on_cpu", *more)) == 0
    more += ["--trainer.accelerator", "gpu", "--trainer.devices", "1"]
    assert main(words("predict", sd2_folder, "on_gpu", *more)) == 0
    on_gpu, on_cpu = masks(Path("on_gpu")), masks(Path("on_cpu"))
    assert on_gpu.keys() == on_cpu.keys() == {f"{name}.png" for name in IDS}
    for name in on_gpu:
        pair = [np.array(Image.open(Path(out) / "masks" / name)) for out in ("on_gpu", "on_cpu")]
        assert (pair[0] == pair[1]).mean() >= 0.99
    assert {each["id"] for each in read_records(Path("on_gpu"))} == set(IDS)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_half_precision_stays_near(dtype: Any, tmp_path: Path, sd1_folder: Path) -> None:
    on_gpu = predicted(
        G4SegModule(str(sd1_folder), dtype=dtype),
        data(tmp_path),
        accelerator="gpu",
    )
    on_cpu, seeds = (
        predicted(G4SegModule(str(sd1_folder), update), data(tmp_path))
        for update in (None, [Blur(sigma=0.0)])
    )
    for name in IDS:
        found = on_gpu[name]
        assert isinstance(found, RefinedMask)
        expected, seed = on_cpu[name].foreground, seeds[name].foreground
        # A match may fall elsewhere, but not most: the change is the CPU's, not none or another.
        off = (found.foreground.cpu() - expected).abs().mean()
        assert off < 0.5 * (seed - expected).abs().mean()


def test_seeds_are_those_of_the_cpu() -> None:
    maker = load_seed_maker()
    samples = scenes("test", 4)
    on_cpu = [maker.make(sample).foreground for sample in samples]
    maker.to(GPU)
    for sample, expected in zip(samples, on_cpu, strict=True):
        assert_alike(maker.make(sample).foreground.cpu(), expected)


def test_laboratory_scores_as_on_the_cpu(
    sd1_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    way = Way("g4seg", (Correspondence(confidence_range=None),))
    counts = []
    for device in (GPU, "cpu"):
        models = Models(sd1_folder, clip_folder, device=device)
        runner = Runner(models, Store(tmp_path / device))
        source = SceneSource(models, runner.store, "degraded", "val", 4)
        counts.append(runner.run([way], source, Threshold(0.5))["g4seg"][0].counts)
    # bfloat16 against float32: a match may fall elsewhere.
    assert np.abs(counts[0] - counts[1]).sum() <= 0.02 * counts[1].sum()


def test_training_on_labels_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    two = ["--trainer.accelerator", "gpu", "--trainer.max_steps", "2"]
    two += ["--trainer.check_val_every_n_epoch", "1", "--trainer.logger", "false"]
    cli = run(["fit", *training_words(tmp_path, "scenes_small"), *two])
    assert cli.trainer.global_step == 2
    assert 0 <= cli.trainer.callback_metrics["val/miou"] <= 100
    more = ["--trainer.max_steps", "4", "--ckpt_path", "run/last.ckpt"]
    cli = run(["fit", *training_words(tmp_path, "scenes_small"), *two, *more])
    assert cli.trainer.global_step == 4


@pytest.mark.filterwarnings("ignore")  # Lightning's advice to people who train for days
def test_recipe_of_the_world_trains_and_resumes(tmp_path: Path) -> None:
    from world.test_recipe import miniature

    options = miniature(tmp_path)
    checkpoint = torch.load(options.out / "unet" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 3
    latents = np.load(options.cache / "latents_000.npy").astype(np.float32)
    assert latents.std() == pytest.approx(1, abs=0.1)
    assert recipe.load_vae(options.out).dtype == torch.float32


@pytest.mark.timeout(1200)
def test_bars_of_the_benchmark_hold(tmp_path: Path) -> None:
    command = ["bench", "--size", "sd21", "--device", GPU, "--work", str(tmp_path)]
    assert main([*command, "--only", "throughput", "match", "--rounds", "3"]) == 0
