"""One sentence for what jsonargparse says in twenty lines about an argument it cannot take."""

import inspect
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module

SECTIONS = ("model", "data", "trainer", "writer", "out", "override", "seed_everything")

# Lines that only give the message its shape.
_SHAPE = re.compile(
    r"^(Parser key \"[^\"]*\":|Does not validate against .*|Subtypes: .*|Errors:|Given value.*"
    r"|Expected a <class 'NoneType'>|Problem with given class_path .*"
    r"|Expected a path but .* not accessible or invalid|Expected a <class 'list'>|)$"
)
_KEY = re.compile(r'^Parser key "[^"]*": ')
_CLASS = re.compile(r"class_path[ =]'([\w.]+)'")
_LITERAL = re.compile(r"typing\.Literal\[(.*?)\]")


def one_sentence(message: str) -> str:
    """What is wrong with an argument, and what it may be.

    Args:
        message: of jsonargparse or argparse.

    Returns:
        one line that names the option, the value got and the remedy as far as the message tells.
    """
    if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        return _unknown_words(found[1])
    if found := re.match(r"Subcommand '\w+' does not accept option '([\w.]+)'", message):
        section, _, rest = found[1].partition(".")
        hint = _hint(section, SECTIONS)
        return f"no option {found[1]!r}{hint}" if not rest else f"no section {section!r}{hint}"
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    leaves = [_KEY.sub("", line) for line in lines if not _SHAPE.match(line)]
    if not leaves:
        return _squeezed(message)
    sentence = _wrong_value(key, leaves, message) or _wrong_option(key, leaves, message)
    return sentence or _with_key(key, _squeezed(" ".join(_unchosen(leaves))))


def _wrong_value(key: str, leaves: Sequence[str], message: str) -> str | None:
    """An option's value is of another type, or none of the words allowed."""
    expected = [leaf for leaf in leaves if leaf.startswith("Expected a ")]
    if not expected:
        return None
    if "dot import path" in expected[-1]:
        value = expected[-1].rpartition(": ")[2]
        return f"{key} is {value!r}: no such class; give its import path, package.module.Class"
    values = re.findall(r"(?:Got value|Given value): ([^\n]*)", "\n".join([*leaves, message]))
    words = ", ".join(found for leaf in expected for found in _LITERAL.findall(leaf))
    kinds = re.findall(r"<class '(?:\w+\.)*(\w+)'>", " ".join(expected))
    wanted = f"one of {words}" if words else f"a value of type {' or '.join(kinds) or 'allowed'}"
    value = values[0] if values else "something else"
    if nested := re.match(r"NestedArg\(.*val='(.*)'\)$", value):
        value = nested[1]
    return f"{key} is {value!r}: give {wanted}"


def _wrong_option(key: str, leaves: Sequence[str], message: str) -> str | None:
    """A class has no such argument."""
    named = [leaf for leaf in leaves if "is not accepted" in leaf]
    found = re.search(r"[Oo]ption '([\w.]+)' is not accepted", named[-1]) if named else None
    if found is None:
        return None
    classes = _CLASS.findall(named[-1]) or re.findall(r"given class_path '([\w.]+)'", message)
    path = classes[-1] if classes else ""
    hint = _hint(found[1], _arguments(path), show_all=True)
    return _with_key(key, f"{path.rpartition('.')[2] or 'it'} has no argument {found[1]!r}{hint}")


def _unknown_words(words: str) -> str:
    """Options that the parser does not know, or words that belong to none."""
    options = [word for word in words.split() if word.startswith("--")]
    if not options:
        return f"cannot place {words!r}: every argument begins with --name"
    name = options[0][2:].partition("=")[0]
    section, _, rest = name.partition(".")
    if section == "trainer" and rest:
        hint = _hint(rest, _arguments("lightning.pytorch.Trainer"), prefix="--trainer.")
    else:
        hint = _hint(section, SECTIONS, prefix="--")
    return f"no option --{name}{hint}"


def _hint(name: str, known: Iterable[str], *, prefix: str = "", show_all: bool = False) -> str:
    """The nearest names, or all of them."""
    names = list(known)
    if close := get_close_matches(name, names, n=1):
        return f"; did you mean {prefix}{close[0]}?"
    return f"; it has {', '.join(names)}" if show_all and names else ""


def _arguments(class_path: str) -> tuple[str, ...]:
    """The names of a class's arguments; none if there is no such class."""
    module, _, name = class_path.rpartition(".")
    try:
        parameters = inspect.signature(getattr(import_module(module), name)).parameters
    except (ImportError, AttributeError, ValueError, TypeError):
        return ()
    return tuple(parameters)


def _unchosen(leaves: Sequence[str]) -> list[str]:
    """Leaves without repetitions, in order."""
    return list(dict.fromkeys(leaves))


def _with_key(key: str, sentence: str) -> str:
    """The sentence behind the name of what it is about, if that is known."""
    return f"{key}: {sentence}" if key else sentence


def _squeezed(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())
