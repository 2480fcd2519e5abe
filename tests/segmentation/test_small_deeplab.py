"""The small DeepLab: its shortcuts compute strided convolutions, and two threads do not crash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from g4seg_pl.segmentation.small_deeplab import SmallDeepLab

REPOSITORY = Path(__file__).parents[2]
TWO_THREADS = """
import torch
from g4seg_pl.segmentation.small_deeplab import SmallDeepLab

torch.set_num_threads(2)
network = SmallDeepLab(21, width=8)
for _ in range(3):
    network(torch.randn(3, 3, 72, 72)).square().mean().backward()
"""


@pytest.mark.parametrize("size", [(16, 16), (17, 15)])
def test_shortcuts_are_strided_convolutions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = SmallDeepLab(5, width=4).eval().middle[0]
    features = torch.randn(2, 4, *size)
    convolution, norm = block.shortcut
    expected = norm(functional.conv2d(features, convolution.weight, stride=2))
    found = block(features)
    straight = block.second(block.first(features))
    assert torch.allclose(found, functional.relu(straight + expected), atol=1e-6)


def test_gradients_with_two_threads_leave_memory_whole() -> None:
    # In a process of its own: what this guards against ends the process. Passive, because two
    # threads that wait busily for each other take minutes on a core that is shared.
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    ended = subprocess.run(
        [sys.executable, "-c", TWO_THREADS],
        env=os.environ | threads | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
