"""Checkpoints that lack weights."""

from pathlib import Path

from safetensors.torch import load_file, save_file


def drop_weights(folder: Path, part: str) -> None:
    """Take the weights whose names hold this out of a folder's one file."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    kept = {name: value for name, value in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, file, metadata={"format": "pt"})
