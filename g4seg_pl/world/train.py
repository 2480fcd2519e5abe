"""The recipe of the embedded world's models: ``python -m g4seg_pl.world.train vae|clip|unet``.

Each stage is a LightningModule that resumes from its last checkpoint whenever it is started again,
on a CPU (bf16 autocast where that is fast) or a GPU. The order is teacher, vae, latents, unet; clip
needs the teacher only, tiny the latents, and the judge, which measures the others, stands apart.
"""

import argparse
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKL
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import CLIPTokenizer

from g4seg_pl.checkpoint_files import keep_checkpoints_whole
from g4seg_pl.world.autoencoder import AutoencoderTask
from g4seg_pl.world.classifier import ClassifierTask, SceneClassifier, training_precision
from g4seg_pl.world.clip import ClipTask
from g4seg_pl.world.data import DEFAULT_CACHE, held_out, load_shards, split_row
from g4seg_pl.world.folders import CLIP, GENERATOR, JUDGE, TEACHER
from g4seg_pl.world.text import write_tokenizer
from g4seg_pl.world.tiny import ScenesWithLatents, TinyDecoderTask, held_out_latents
from g4seg_pl.world.unet import LatentBatches, UNetTask

BATCH = 64
DIFFUSERS_SCALE = 0.18215  # of an autoencoder that was never told its own
Loaders = tuple[DataLoader[Any], DataLoader[Any] | None]


class SceneBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless random batches ``(images, presence)`` of cached scenes, half of them mirrored."""

    def __init__(self, cache: Path, shards: int, batch: int = BATCH) -> None:
        self.shards = load_shards(cache, shards)
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches for ever; every start draws anew."""
        rng = np.random.default_rng()
        while True:
            shard = self.shards[int(rng.integers(len(self.shards)))]
            rows = np.sort(rng.choice(len(shard), self.batch, replace=False))
            images, presence = split_row(torch.from_numpy(shard[rows]))
            mirrored = torch.from_numpy(rng.random(self.batch) < 0.5)
            images[mirrored] = images[mirrored].flip(-1)
            yield images, presence


def fit(
    task: L.LightningModule,
    folder: Path,
    steps: int,
    loaders: Loaders,
    precision: Literal["bf16-mixed", "32-true"] | None = None,
) -> None:
    """Train ``task`` to ``steps`` optimiser steps, going on from ``folder/last.ckpt`` if there."""
    checkpoint = ModelCheckpoint(folder, save_last=True, train_time_interval=timedelta(minutes=3))
    trainer = L.Trainer(
        max_steps=steps,
        precision=precision or training_precision(gpu=torch.cuda.is_available()),
        accelerator="auto",
        devices=1,
        logger=CSVLogger(folder, name="log"),
        callbacks=[checkpoint],
        val_check_interval=min(250, steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=50,
    )
    keep_checkpoints_whole(trainer)
    last = folder / "last.ckpt"
    train, validation = loaders
    start = last if last.exists() else None
    # The checkpoints are our own: optimiser and loop states are more than weights.
    trainer.fit(task, train, validation, ckpt_path=start, weights_only=False)
    trainer.save_checkpoint(last)


def _scene_loaders(options: argparse.Namespace, batch: int = BATCH) -> Loaders:
    images, _, presence = held_out("val", 256)
    validation = DataLoader(TensorDataset(images, presence), 64)
    return DataLoader(SceneBatches(options.cache, options.shards, batch), None), validation


def train_teacher(options: argparse.Namespace) -> None:
    """What the autoencoder, the CLIP and the U-Net learn perception from."""
    _train_classifier(options, "teacher", 3000)


def train_judge(options: argparse.Namespace) -> None:
    """The judge of the gates: nothing that is judged has seen it."""
    _train_classifier(options, "judge", 4000)


def _train_classifier(
    options: argparse.Namespace, name: Literal["teacher", "judge"], steps: int
) -> None:
    steps = options.steps or steps
    task = ClassifierTask(steps=steps, disturb=True)
    if options.continue_published:
        published = TEACHER if name == "teacher" else JUDGE
        task.net.load_state_dict(load_file(published / "model.safetensors"))
    # Batch norm in bf16 is slow on a CPU; the classifier is small enough for float32.
    fit(task, options.out / name, steps, _scene_loaders(options), "32-true")


def classifier_weights(out: Path, name: Literal["teacher", "judge"]) -> dict[str, Tensor]:
    """A classifier's weights from its last checkpoint, or those of the repository."""
    checkpoint = out / name / "last.ckpt"
    if not checkpoint.exists():
        published = TEACHER if name == "teacher" else JUDGE
        return load_file(published / "model.safetensors")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix("net."): weight for name, weight in state.items()}


def load_teacher(out: Path) -> SceneClassifier:
    """The teacher without gradients."""
    teacher = SceneClassifier().eval().requires_grad_(False)
    teacher.load_state_dict(classifier_weights(out, "teacher"))
    return teacher


def train_vae(options: argparse.Namespace) -> None:
    """The autoencoder; needs the teacher."""
    steps = options.steps or 3500
    fit(
        AutoencoderTask(load_teacher(options.out), steps=steps),
        options.out / "vae",
        steps,
        _scene_loaders(options, batch=8),  # many small steps serve an autoencoder best
    )


def train_decoder(options: argparse.Namespace) -> None:
    """The published autoencoder's decoder alone, with more weight on what the teacher sees."""
    steps = options.steps or 8_000
    task = AutoencoderTask(
        load_teacher(options.out),
        learning_rate=4e-4,
        steps=steps,
        perceptual_weight=1.0,
        verdict_weight=20.0,
        decoder_only=True,
    )
    published = AutoencoderKL.from_pretrained(GENERATOR, subfolder="vae")
    task.vae.load_state_dict(published.state_dict())
    fit(task, options.out / "decoder", steps, _scene_loaders(options, batch=8))


def train_tiny(options: argparse.Namespace) -> None:
    """The tiny decoder of the same latents; needs the teacher, the autoencoder and the latents."""
    steps = options.steps or 3500
    scale = json.loads((options.cache / "scaling_factor.json").read_text())["scaling_factor"]
    images, latents = held_out_latents(load_vae(options.out), scale)
    loaders = (
        DataLoader(ScenesWithLatents(options.cache, batch=8), None),
        DataLoader(TensorDataset(images, latents), 64),
    )
    task = TinyDecoderTask(load_teacher(options.out), steps=steps)
    fit(task, options.out / "tiny", steps, loaders)


def train_clip(options: argparse.Namespace) -> None:
    """The CLIP; needs the teacher."""
    steps = options.steps or 5000
    task = ClipTask(
        load_tokenizer(options.out),
        load_teacher(options.out),
        steps=steps,
        compile_model=options.compile,
    )
    if options.continue_published:
        task.clip.load_state_dict(load_file(CLIP / "open_clip_model.safetensors"))
    # The fused kernel's backward is the slower one at these sizes on a CPU.
    with sdpa_kernel(SDPBackend.MATH):
        fit(task, options.out / "clip", steps, _scene_loaders(options, batch=32))


def load_vae(out: Path) -> AutoencoderKL:
    """The autoencoder of the last checkpoint, or that of the repository, without gradients."""
    made = [out / stage / "last.ckpt" for stage in ("decoder", "vae")]
    checkpoint = next((path for path in made if path.exists()), None)
    if checkpoint is not None:
        task = AutoencoderTask()
        task.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
        vae = task.vae
    else:
        vae = AutoencoderKL.from_pretrained(GENERATOR, subfolder="vae")
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def load_tokenizer(out: Path) -> CLIPTokenizer:
    """The tokenizer, written on first use."""
    folder = out / "tokenizer"
    if not (folder / "vocab.json").exists():
        write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


@torch.inference_mode()
def encode_shard(vae: AutoencoderKL, teacher: SceneClassifier, scenes: Path, scale: float) -> None:
    """Write the scaled latent modes and the teacher's last maps of one shard, once.

    Both are float16, ``(N, 4, 16, 16)`` and ``(N, 160, 8, 8)``; the maps have mean 0 and
    deviation 1 in every channel over the shard's first thousand scenes.
    """
    target = scenes.with_name(scenes.name.replace("scenes", "latents"))
    if target.exists():
        return
    rows = np.load(scenes, mmap_mode="r")
    latents, maps = [], []
    for start in range(0, len(rows), 100):
        images, _ = split_row(torch.from_numpy(np.array(rows[start : start + 100])))
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=training_precision() == "bf16-mixed"):
            latents.append(vae.encode(images).latent_dist.mode().float() * scale)
            maps.append(teacher.features(images)[-1].half())
    first = torch.cat(maps[:10]).float()
    middle, spread = first.mean((0, 2, 3), keepdim=True), first.std((0, 2, 3), keepdim=True)
    maps = [((each - middle) / (spread + 1e-3)).half() for each in maps]
    # The latents last: where they are, the maps are complete.
    guides = scenes.with_name(scenes.name.replace("scenes", "guides"))
    for path, parts in ((guides, maps), (target, latents)):
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, torch.cat(parts).half().numpy())
        temporary.rename(path)


def encode_latents(options: argparse.Namespace) -> None:
    """Encode every shard that has no latents yet; the scale makes their deviation 1."""
    vae = load_vae(options.out)
    first = sorted(options.cache.glob("scenes_*.npy"))
    record = options.cache / "scaling_factor.json"
    if not record.exists() and vae.config.scaling_factor != DIFFUSERS_SCALE:
        record.write_text(json.dumps({"scaling_factor": vae.config.scaling_factor}))
    if not record.exists():
        images, _ = split_row(torch.from_numpy(np.array(np.load(first[0], mmap_mode="r")[:512])))
        with torch.inference_mode():
            deviation = vae.encode(images).latent_dist.mode().std()
        record.write_text(json.dumps({"scaling_factor": round(1 / float(deviation), 5)}))
    scale = json.loads(record.read_text())["scaling_factor"]
    teacher = load_teacher(options.out).to(memory_format=torch.channels_last)
    for scenes in first:
        encode_shard(vae, teacher, scenes, scale)


def train_unet(options: argparse.Namespace) -> None:
    """The U-Net with its text encoder; needs latents. Runs on with more ``--steps`` at any time.

    With ``--continue-published`` it starts from the weights of the repository, where a checkpoint
    with the optimiser's state is not at hand.
    """
    steps = options.steps or 20_000
    tokenizer = load_tokenizer(options.out)
    task = UNetTask(tokenizer, steps=steps, compile_model=options.compile)
    if options.continue_published:
        task.start_from(GENERATOR)
    loader = DataLoader(LatentBatches(options.cache, tokenizer, BATCH), None)
    fit(task, options.out / "unet", steps, (loader, None))


def main() -> None:
    """Parse the stage and run it."""
    stages = {
        "teacher": train_teacher,
        "judge": train_judge,
        "vae": train_vae,
        "decoder": train_decoder,
        "latents": encode_latents,
        "tiny": train_tiny,
        "clip": train_clip,
        "unet": train_unet,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=list(stages))
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--shards", type=int, default=20, help="of 10,000 scenes each")
    parser.add_argument("--out", type=Path, default=Path("outputs/world/train"))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the unet or clip",
    )
    parser.add_argument(
        "--continue-published",
        action="store_true",
        help="of teacher, judge, clip and unet: start from the weights of the repository",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    L.seed_everything(0)
    stages[options.stage](options)


if __name__ == "__main__":
    main()
