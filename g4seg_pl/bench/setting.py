"""What every part of the benchmark is run with."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from g4seg_pl.backbones.pretrained import load_generator
from g4seg_pl.backbones.stable_diffusion import StableDiffusion
from g4seg_pl.bench.inputs import Inputs, write_inputs
from g4seg_pl.bench.models import ModelFolders, write_models
from g4seg_pl.bench.rows import Bar
from g4seg_pl.bench.sizes import Size
from g4seg_pl.features.transformers_clip import TransformersClipFeatures


@dataclass(frozen=True)
class Setting:
    """Size, place and effort.

    Attributes:
        size: of the models.
        device: where networks run.
        folder: for models, inputs and outputs.
        images: of the contest.
        plain_images: of these, how many the slow contestant refines too.
        rounds: repetitions of small measurements.
        memory_images: over which memory is watched.
        only: parts and rows asked for; all if empty.
    """

    size: Size
    device: torch.device
    folder: Path
    images: int = 8
    plain_images: int = 8
    rounds: int = 5
    memory_images: int = 1000
    only: tuple[str, ...] = ()

    def wants(self, row: str) -> bool:
        """Whether a row is asked for, by its own name or its part's."""
        return not self.only or bool({row, row.partition(":")[0]} & set(self.only))

    @cached_property
    def models(self) -> ModelFolders:
        """The models, written on first use."""
        return write_models(self.folder, self.size)

    @cached_property
    def inputs(self) -> Inputs:
        """Images and seeds, written on first use."""
        return write_inputs(self.folder / self.size.name / "inputs", self.size.native, self.images)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of small measurements: bfloat16 at full size, float32 if tiny."""
        return torch.bfloat16 if self.size.full else torch.float32

    @cached_property
    def generator(self) -> StableDiffusion:
        """The generator on the device, loaded on first use."""
        return load_generator(str(self.models.generator), self.dtype).to(self.device)

    @cached_property
    def features(self) -> TransformersClipFeatures:
        """The image encoder on the device, loaded on first use."""
        features = TransformersClipFeatures(str(self.models.clip))
        features.load()
        return features.to(self.device, self.dtype)

    def out(self, name: str) -> Path:
        """A folder for masks."""
        return self.folder / self.size.name / "out" / name

    def bar(self, limit: float, *, at_least: bool = False) -> Bar | None:
        """A bar that holds for full-size models only."""
        return Bar(limit, at_least) if self.size.full else None

    @property
    def machine(self) -> str:
        """The machine in words, as far as it is known."""
        threads = torch.get_num_threads()
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, torch {torch.__version__}"
        cores = available_cores()
        return f"{_processor()}, {threads} of {cores} cores, torch {torch.__version__}"


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"
