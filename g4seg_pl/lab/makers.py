"""Seeds by the makers of `g4seg_pl.seeds`, configured as `g4seg predict` would be."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal, get_args

import torch
import yaml
from jsonargparse import ArgumentParser

from g4seg_pl.callbacks.run_record import Json
from g4seg_pl.lab.cache import Store, hash_of_files
from g4seg_pl.lab.cam_weights import CamRecipe, cam_weights
from g4seg_pl.lab.laboratory import REPOSITORY
from g4seg_pl.lab.models import Models
from g4seg_pl.lab.sources import SceneSource, scenes_identity
from g4seg_pl.lab.written import instantiated
from g4seg_pl.seeds.base import SeedMaker
from g4seg_pl.seeds.diffsegmenter import DiffSegmenter
from g4seg_pl.types import Sample, Seed
from g4seg_pl.world.scenes import Split

MakerName = Literal["cam", "clip_es", "maskclip", "sclip", "diffsegmenter"]
MAKERS: tuple[MakerName, ...] = get_args(MakerName)
CONFIGS = REPOSITORY / "configs" / "seeds"
# Where every class that any threshold of the grid would leave is still there.
LOWEST = 0.05


def arguments_of(name: MakerName) -> tuple[str, dict[str, Any]]:
    """Class path and arguments of ``configs/seeds/<name>.yaml`` with the world's file behind it."""
    first, second = (
        yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        for path in (CONFIGS / f"{name}.yaml", CONFIGS / "world" / f"{name}.yaml")
    )
    return first["class_path"], {**first["init_args"], **second["init_args"]}


class MadeSource(SceneSource):
    """Scenes with the seeds of one maker.

    Args:
        models: whose CLIP or generator makes them.
        store: where they, and CAM's classifier, are kept.
        maker: which one.
        split: disjoint ranges of scenes.
        count: number of scenes.
        first: index of the first within the split.
        background: of makers that are not told an image's classes: a class that nowhere wins
            above it gets no mask. Others make the same maps whatever it is.
        recipe: of CAM's classifier.
    """

    def __init__(
        self,
        models: Models,
        store: Store,
        maker: MakerName,
        split: Split,
        count: int,
        first: int = 0,
        background: float = LOWEST,
        recipe: CamRecipe | None = None,
    ) -> None:
        super().__init__(models, store, "gradcam", split, count, first)
        self.kind = maker  # type: ignore[assignment]
        self.name: MakerName = maker
        self.background = background
        self.recipe = recipe or CamRecipe()

    @property
    def told(self) -> bool:
        """Whether the maker is told the image's classes."""
        return self.name not in ("maskclip", "sclip")

    def describe(self) -> Json:
        """The maker's arguments and the weights that its maps depend on."""
        path, arguments = arguments_of(self.name)
        described = {
            "maker": path,
            "arguments": {k: v for k, v in arguments.items() if k not in ("model", "background")},
            "weights": self._weights_identity(),
            "max_objects": self.max_objects,
            "scenes": scenes_identity(),
        }
        return described if self.told else described | {"background": self.background}

    def _weights_identity(self) -> str:
        match self.name:
            case "cam":
                return hash_of_files(cam_weights(self.store, self.recipe).parent)
            case "diffsegmenter":
                return self.models.generator_identity
            case _:
                return self.models.clip_identity

    def _seed(self, sample: Sample) -> Seed:
        with torch.no_grad():
            made = self._loaded_maker().make(sample)
        return Seed(made.class_ids, made.foreground)

    def _loaded_maker(self) -> SeedMaker:
        if self._maker is None:
            self._maker = self._make_maker()
        return self._maker

    def _make_maker(self) -> SeedMaker:
        path, arguments = arguments_of(self.name)
        constant = {"class_path": "g4seg_pl.core.background.Threshold"}
        arguments["background"] = constant | {"init_args": {"value": self.background}}
        if self.name == "cam":
            arguments["weights"] = str(cam_weights(self.store, self.recipe))
        else:
            generator = self.name == "diffsegmenter"
            arguments["model"] = str(self.models.generator if generator else self.models.clip)
        maker = build_maker(path, arguments)
        if isinstance(maker, DiffSegmenter):
            # The generator that refines is loaded already.
            maker.generator = self.models.refiner().generator  # type: ignore[assignment]
        maker.configure_model()
        return maker


def build_maker(path: str, arguments: Mapping[str, Any]) -> SeedMaker:
    """Return the maker that a configuration writes, its model not loaded yet.

    Args:
        path: of its class.
        arguments: of its making.
    """
    module, _, name = path.rpartition(".")
    made = getattr(import_module(module), name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(made, "maker")
    maker = instantiated(parser, parser.parse_object({"maker": dict(arguments)}))["maker"]
    assert isinstance(maker, SeedMaker)
    return maker
