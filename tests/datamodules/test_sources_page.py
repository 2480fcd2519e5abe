"""docs/sources.md covers every system that the method is measured on, by flags that exist."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from datamodules.seed_files.maps import Dialect, ReadOptions

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "sources.md").read_text(encoding="utf-8")

# fmt: off
SYSTEMS = [
    "CAM", "CLIP-ES", "IRN", "ReCAM", "SEAM", "PSA", "MCTformer", "ViT-PCM", "ToCo", "WeakTr",
    "GroupViT", "SCLIP", "MaskCLIP", "DiffSegmenter", "TCL", "PGSeg", "OVSegmentor", "OVDiff",
    "FreeDA", "SegFormer", "Mask2Former", "OneFormer", "ODISE", "DTP", "OVAM", "DAAM", "DeOP",
    "CascadePSP", "SegRefiner", "SAMRefiner", "SEPL",
    "AFA", "SSENet", "MoRe", "ExCEL", "iSeg",
]
# fmt: on


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_has_a_row(system: str) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert any(re.search(rf"\b{re.escape(system)}\b", row.split("|")[1]) for row in rows)


def test_the_flags_exist() -> None:
    dialects = re.findall(r"--data\.dialect (\w+)", PAGE)
    assert set(dialects) <= {"auto", *get_args(Dialect)}
    options = re.findall(r"--data\.seed_options\.(\w+)", PAGE)
    assert set(options) <= {field.name for field in fields(ReadOptions)}
    assert len(dialects) > 20
    assert {"channels", "label_offset", "category_ids", "activation"} <= set(options)


def test_the_configurations_exist() -> None:
    table = PAGE.split("**Made elsewhere.**")[0]
    names = re.findall(r"^\| [^|]+ \| ([^|]+) \| (?:yes|no)", table, re.MULTILINE)
    stems = {stem for cell in names for stem in re.findall(r"`(\w+)`", cell)}
    known = {path.stem for path in (REPOSITORY / "configs" / "seeds").glob("*.yaml")}
    assert stems == known - {"cam_fit"}
