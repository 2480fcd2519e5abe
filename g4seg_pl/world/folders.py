"""Where the embedded world's weights lie in the package."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
GENERATOR, CLIP = WEIGHTS / "generator", WEIGHTS / "clip"
TEACHER, JUDGE = WEIGHTS / "teacher", WEIGHTS / "judge"
TINY_DECODER = WEIGHTS / "tiny_decoder"
