"""The examples of docs/plug_in.md, run as they stand there."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from segmentation.trees import write_tree

PAGE = Path(__file__).parents[2] / "docs" / "plug_in.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
DATA = EXAMPLES[0]

pytestmark = [
    # Lightning's advice about a task that is not ours, and a training of two steps.
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    # The example in the document trains; it does not validate.
    pytest.mark.filterwarnings("ignore:.*no `validation_step`.*"),
]


def example(package: str) -> str:
    """The example that begins with the package's name."""
    return next(text for text in EXAMPLES if text.startswith(f"# {package}\n"))


@pytest.mark.parametrize("package", ["torchgeo", "segmentation_models_pytorch", "transformers"])
def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    write_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(DATA, names)
    exec(example(package), names)
    state = names["trainer"].state
    steps = getattr(state, "global_step", None) or names["trainer"].global_step
    assert steps == 2


def test_mmsegmentation_reads_the_folder_as_it_is(tmp_path: Path) -> None:
    # What its VOC data set does: the mask's name is the picture's, with another suffix.
    text = next(each for each in EXAMPLES if each.startswith("# mmsegmentation"))
    assert 'seg_map_path="SegmentationClassG4Seg"' in text
    voc = write_tree(tmp_path)
    (voc / "SegmentationClassG4Seg").symlink_to(tmp_path / "refined" / "masks")
    for picture in (voc / "JPEGImages").glob("*.jpg"):
        assert (voc / "SegmentationClassG4Seg" / f"{picture.stem}.png").is_file()
