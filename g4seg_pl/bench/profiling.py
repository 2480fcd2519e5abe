"""``g4seg bench profile``: where the time of an update goes."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from torch.profiler import ProfilerActivity, profile

from g4seg_pl.bench.command import pick_device
from g4seg_pl.bench.setting import Setting
from g4seg_pl.bench.sizes import SIZES
from g4seg_pl.bench.steps import STEPS, one_and_three_classes, refine_once


def profiled(
    size: Literal["tiny", "sd21"] = "tiny",
    step: Literal["paper", "affinity", "gradient", "likelihood", "grounding", "best"] = "paper",
    classes: Literal[1, 3] = 1,
    device: str | None = None,
    lines: int = 15,
    work: Path | None = None,
) -> int:
    """Print torch.profiler's table of one image, the operators that take most time first.

    Args:
        size: of the models.
        step: the update.
        classes: of the image.
        device: such as cuda; a GPU if there is one.
        lines: of the table.
        work: folder for models, kept; a temporary one if not given.

    Returns:
        0.
    """
    with TemporaryDirectory() as temporary:
        folder = (Path(temporary) if work is None else work).absolute()
        setting = Setting(SIZES[size], pick_device(device), folder)
        sample = one_and_three_classes(setting)[classes == 3]
        refine_once(setting, STEPS[step], sample)
        activities = [ProfilerActivity.CPU]
        if setting.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as watched:
            refine_once(setting, STEPS[step], sample)
        first = f"self_{setting.device.type}_time_total"
        print(f"size {size}, {step}, {classes} classes; {setting.machine}")
        print(watched.key_averages().table(sort_by=first, row_limit=lines))
    return 0
