"""Objects from what YAML and JSON write of them."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, cast

from jsonargparse import ArgumentError, ArgumentParser

from g4seg_pl.lab.stages import Stage
from g4seg_pl.types import ConfigurationError


def build_object(written: Mapping[str, Any], places: Mapping[str, str] | None = None) -> Any:
    """Return what YAML or JSON writes as ``class_path`` and ``init_args``.

    Args:
        written: both.
        places: what stands for ``{clip}`` and the like, so that files hold no absolute path.

    Raises:
        ConfigurationError: there is no such class, or it refuses an argument.
    """
    written = _placed(written, places or {})
    path = str(written.get("class_path", ""))
    module, _, name = path.rpartition(".")
    try:
        made = getattr(import_module(module), name)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(made, "made")
        parsed = parser.parse_object({"made": dict(written.get("init_args") or {})})
        return instantiated(parser, parsed)["made"]
    except (ImportError, AttributeError, ValueError, TypeError, ArgumentError) as error:
        message = f"{path!r} with {written.get('init_args')} cannot be made: {error}"
        raise ConfigurationError(message) from error


def instantiated(parser: ArgumentParser, parsed: Any) -> Any:
    """Return what was parsed with its classes made."""
    # jsonargparse 4.49 renamed the method; older ones are supported too.
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return make(parsed)


def build_stages(
    written: Sequence[Mapping[str, Any]], places: Mapping[str, str] | None = None
) -> tuple[Stage, ...]:
    """Return the stages of a list in YAML or JSON; arguments as of ``build_object``."""
    return tuple(cast(Stage, build_object(each, places)) for each in written)


def _placed(written: Any, places: Mapping[str, str]) -> Any:
    if isinstance(written, Mapping):
        return {name: _placed(value, places) for name, value in written.items()}
    if isinstance(written, list | tuple):
        return [_placed(value, places) for value in written]
    if isinstance(written, str) and written.startswith("{"):
        return places.get(written.strip("{}"), written)
    return written


def object_text(written: Mapping[str, Any]) -> str:
    """An object as a reader of tables wants it: ``Name(argument=value)``."""
    name = str(written["class_path"]).rpartition(".")[2]
    arguments = written.get("init_args") or {}
    told = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return f"{name}({told})".replace("|", "/")
