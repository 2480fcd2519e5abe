"""A small CLIP with its own tokenizer in one folder, and samples."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from g4seg_pl.types import Sample, Seed

CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 77,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "hf_tokenizer_name": "tokenizer",
    },
}


@pytest.fixture(scope="session")
def worded_clip_folder(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder with the tokenizer's files beside the weights."""
    folder = tmp_path_factory.mktemp("models") / "worded_clip"
    shutil.copytree(sd1_folder / "tokenizer", folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    config = CLIP | {"text_cfg": CLIP["text_cfg"] | {"vocab_size": len(vocabulary)}}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = open_clip.CLIP(**json.loads(json.dumps(config)))
    # Random texts and images must differ, or every map is flat.
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    weights["token_embedding.weight"] = weights["token_embedding.weight"] * 30
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    return folder


@pytest.fixture(scope="session")
def clip(worded_clip_folder: Path) -> Any:
    """The small CLIP, loaded by open_clip itself."""
    model = open_clip.create_model(f"local-dir:{worded_clip_folder}")
    return model.eval().requires_grad_(False)


def make_sample(
    size: tuple[int, int] = (40, 53),
    class_ids: tuple[int, ...] = (2, 5),
    names: tuple[str, ...] = ("dog", "cat"),
    image_id: str = "one",
) -> Sample:
    """A random image that is said to show some classes."""
    pixels = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(1))
    seed = Seed(class_ids, torch.zeros(len(class_ids), *size))
    return Sample(image_id, pixels.to(torch.uint8), seed, names)


@pytest.fixture
def sample() -> Sample:
    """An image of a dog and a cat."""
    return make_sample()


class Listed(pl.LightningDataModule):
    """One image, and what its label values mean."""

    def __init__(self, sample: Sample, class_list: Sequence[str]) -> None:
        super().__init__()
        self.sample, self.class_list = sample, class_list

    def predict_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([self.sample], batch_size=1, collate_fn=list)  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        return self.predict_dataloader()

    def transfer_batch_to_device(self, batch: Any, *_: Any) -> Any:
        return batch


@pytest.fixture
def data_of(sample: Sample) -> Callable[[Sequence[str]], pl.LightningDataModule]:
    """Makes a data module of a class list."""
    return lambda class_list: Listed(sample, class_list)


@pytest.fixture
def new_trainer(tmp_path: Path) -> Callable[[], pl.Trainer]:
    """Makes a quiet Trainer on the CPU."""
    return lambda: pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
