"""Coarse masks from files, one small module a dialect."""

from datamodules.seed_files.maps import Dialect, ReadOptions, SeedMaps
from datamodules.seed_files.reading import detect, read_maps, read_seed
from datamodules.seed_files.source import SeedSource, open_seeds
from datamodules.seed_files.writing import WritableDialect, write_atomically, write_seed

__all__ = [
    "Dialect",
    "ReadOptions",
    "SeedMaps",
    "SeedSource",
    "WritableDialect",
    "detect",
    "open_seeds",
    "read_maps",
    "read_seed",
    "write_atomically",
    "write_seed",
]
