from pathlib import Path

import pytest
import torch

from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.sizes import TINY


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The tiny size on the CPU, three images, each thing measured once."""
    folder: Path = tmp_path_factory.mktemp("bench")
    return Setting(TINY, torch.device("cpu"), folder, images=3, plain_images=3, rounds=1)
