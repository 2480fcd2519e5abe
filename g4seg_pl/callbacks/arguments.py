"""The arguments that objects and functions were made with, read back from what they keep."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType
from typing import Any

from torch import nn

from g4seg_pl.types import ConfigurationError

_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# Of nn.Module and LightningModule: constructors that take anything and keep nothing.
_LIBRARIES = ("torch", "lightning", "pytorch_lightning")


def init_arguments(value: object, optional: Collection[str] = ()) -> dict[str, object]:
    """The arguments an object was made with, by name.

    An object that does not keep them may have a method ``configuration`` that returns them. Else
    each is the attribute of its name, or of its name behind an underscore, or one of a Lightning
    module's saved hyperparameters.

    Args:
        value: of any class.
        optional: arguments that need not be found.

    Raises:
        ConfigurationError: one of the others is not to be found. Networks are excused, as their
            weights decide what they do; extractors of features and Lightning modules are not.
    """
    if isinstance(value, partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    configuration = getattr(value, "configuration", None)
    found = dict(configuration()) if callable(configuration) else {}
    for name in _parameters(type(value)):
        if name in found:
            continue
        if kept := _kept(value, name):
            found[name] = kept[0]
        elif name not in optional and not _is_network(value):
            raise _not_kept(value, name)
    return found


def bound_to(function: Callable[..., Any]) -> dict[str, object]:
    """What a function works with beside its code: the object it belongs to, what it closes over.

    The code itself stands in for the name that a lambda lacks.
    """
    owner = getattr(function, "__self__", None)
    found = {} if owner is None or inspect.ismodule(owner) else {"self": owner}
    code: CodeType | None = getattr(function, "__code__", None)
    if code is None:
        return found
    cells = getattr(function, "__closure__", None) or ()
    for name, cell in zip(code.co_freevars, cells, strict=True):
        # One that calls itself would never come to an end.
        if cell.cell_contents is not function:
            found[name] = cell.cell_contents
    return found | ({"code": _text_of(code)} if function.__name__ == "<lambda>" else {})


def path_of(named: Any) -> str:
    """Where a class or function is imported from."""
    return f"{named.__module__}.{named.__qualname__}"


def own_text(value: object) -> str | None:
    """What an object says of itself; None if that is no more than its class or its address."""
    silent = type(value).__repr__ in (object.__repr__, nn.Module.__repr__) or is_dataclass(value)
    text = "" if silent else repr(value)
    return text if text and " at 0x" not in text else None


def _parameters(kind: type) -> list[str]:
    """Names of what a class is made with, and of what it passes on to its bases.

    Where a base has a method ``configuration``, that tells of the base's own.
    """
    names = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    if [base for base in kind.__mro__ if "__init__" in vars(base)] == [object]:
        return names + [each.name for each in _signature(kind, kind)]  # of __new__, if any
    passed_on: list[str] = []
    for base in kind.__mro__:
        if "configuration" in vars(base):
            told = {each.name for each in _signature(base, kind)}
            return [name for name in names if name not in told]
        made_by = vars(base).get("__init__")
        if made_by in (None, object.__init__) or made_by.__module__ == "typing":  # a protocol's
            continue
        given = _signature(made_by, kind)[1:]
        own = [each.name for each in given if each.kind not in _ANY_NUMBER]
        if not own and base.__module__.partition(".")[0] in _LIBRARIES:
            return names
        names += own
        passed_on = [each.name for each in given if each.kind in _ANY_NUMBER]
        if not passed_on:
            return names
    return names + passed_on  # to nobody


def _signature(callee: Callable[..., Any], kind: type) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(callee).parameters.values())
    except ValueError as error:  # written in C
        message = (
            f"{path_of(kind)} does not tell what it was made with, which run.json would record: "
            "put it into a class of your own that keeps its arguments as attributes"
        )
        raise ConfigurationError(message) from error


def _kept(value: object, name: str) -> tuple[object, ...]:
    """An argument as the object keeps it, alone in a tuple; an empty one if it does not."""
    for key in (name, f"_{name}"):
        # Its own method of that name is no argument.
        if hasattr(value, key) and getattr(getattr(value, key), "__self__", None) is not value:
            return (getattr(value, key),)
    saved = getattr(value, "hparams", {})
    return (saved[name],) if name in saved else ()


def _is_network(value: object) -> bool:
    """Whether an object is a network that others work with."""
    from lightning.pytorch import LightningModule  # a second, which few need

    from g4seg_pl.features.base import DenseFeatures

    if not isinstance(value, nn.Module) or isinstance(value, LightningModule | DenseFeatures):
        return False
    return next(value.children(), None) is not None or bool(value.state_dict())


def _not_kept(value: object, name: str) -> ConfigurationError:
    """The error (not raised) about an argument that an object does not keep."""
    kind = path_of(type(value))
    return ConfigurationError(
        f"{kind}: its argument {name} cannot be read back, so that run.json could not tell this "
        f"run from one with another {name}: keep it as attribute {name}, or give the class a "
        "method configuration() that returns all its arguments in a dict"
    )


def _text_of(code: CodeType) -> str:
    """A function's code, without its file and lines."""
    constants = [
        _text_of(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts
    ]
    return " ".join([code.co_code.hex(), *code.co_names, *constants])
