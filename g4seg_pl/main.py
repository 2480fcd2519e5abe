"""The command line. Nothing heavy is imported before a command is known, so that help is fast."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

LIGHTNING_COMMANDS = ("predict", "test")


@dataclass(frozen=True)
class Command:
    """A subcommand that is a plain function.

    Attributes:
        target: ``module:function``; its signature is the command's arguments.
        help: one line.
        rewrite: ``module:function`` that makes of the words typed those the signature knows.
    """

    target: str
    help: str
    rewrite: str | None = None

    def load(self) -> Callable[..., object]:
        """Import the function."""
        return _imported(self.target)

    def words(self, typed: list[str]) -> list[str]:
        """The words to parse."""
        if self.rewrite is None:
            return typed
        rewritten: list[str] = _imported(self.rewrite)(typed)
        return rewritten


COMMANDS = {
    "demo": Command("g4seg_pl.world.demo:demo", "refine coarse masks of the embedded world"),
    "evaluate": Command("g4seg_pl.evaluation.evaluate:evaluate", "score a folder of label files"),
    "compare": Command("g4seg_pl.lab.compare:compare", "refiners and chains in one table"),
    "check": Command(
        "datamodules.check:check",
        "check a data set and its seeds without a model",
        "datamodules.check:data_of_run",
    ),
}

# Commands with a parser of their own: module, function, help.
OWN_PARSERS = {
    "prepare": Command("g4seg_pl.prepare:main", "write COCO's label images, or scenes as VOC"),
    "bench": Command("g4seg_pl.bench.command:main", "time and memory against bare networks"),
    "convert": Command("datamodules.convert:main", "convert seed files between dialects"),
    "paper": Command("g4seg_pl.lab.paper:main", "a table of the paper beside the measured one"),
    "fit": Command("g4seg_pl.seeds.fit:main", "train the classifier behind activation maps"),
    "threshold": Command(
        "g4seg_pl.evaluation.threshold:main",
        "a background threshold without ground truth, or swept",
    ),
    "train": Command("g4seg_pl.segmentation.cli:main", "train a network on the result"),
}

USAGE = """usage: g4seg COMMAND [arguments]

Refine coarse segmentation masks with a text-to-image diffusion model.

commands:
{commands}

g4seg COMMAND --help lists a command's arguments."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: the words after ``g4seg``; those of the process if None.

    Returns:
        the exit status: 0, or 1 if an item failed or the command could not run, or 2 if a command
        is unknown or its arguments cannot be parsed.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"g4seg-pl {version('g4seg-pl')}")
        return 0
    return _without_traceback(words[0], words[1:])


def usage() -> str:
    """The list of commands."""
    lines = {
        "predict": "refine a data set's coarse masks and write them",
        "test": "score seeds and refined masks in one pass",
        **{name: command.help for name, command in (COMMANDS | OWN_PARSERS).items()},
    }
    return USAGE.format(commands="\n".join(f"  {name:<10} {text}" for name, text in lines.items()))


def _without_traceback(name: str, words: list[str]) -> int:
    """Run a command; an error raised on purpose, or about a file, is printed as one sentence."""
    try:
        return _run(name, words)
    except Exception as error:
        from g4seg_pl.types import G4SegError, UsageError

        about_a_file = isinstance(error, OSError) and error.filename is not None
        if not isinstance(error, G4SegError) and not about_a_file:
            raise
        print(f"g4seg {name}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _run(name: str, words: list[str]) -> int:
    """Dispatch."""
    if name in LIGHTNING_COMMANDS:
        from g4seg_pl.cli import run_trainer

        return run_trainer([name, *words])
    if name in COMMANDS:
        command = COMMANDS[name]
        return _run_function(command.load(), name, command.words(words))
    if name in OWN_PARSERS:
        status = OWN_PARSERS[name].load()([_with_underscores(word) for word in words])
        return status if isinstance(status, int) else 0
    print(f"g4seg: error: no command {name!r}\n\n{usage()}", file=sys.stderr)
    return 2


def _imported(target: str) -> Callable[..., Any]:
    """The function that ``module:function`` names."""
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def _run_function(function: Callable[..., object], name: str, words: list[str]) -> int:
    """Call a function with arguments parsed by its signature; an integer result is the status."""
    from jsonargparse import ArgumentParser, auto_cli

    class DashedParser(ArgumentParser):
        """Shows options with dashes, as they are accepted."""

        def format_help(self, *args: Any, **kwargs: Any) -> str:
            text = super().format_help(*args, **kwargs)
            return re.sub(r"--\w+", lambda match: match[0].replace("_", "-"), text)

    result: Any = auto_cli(
        function,
        args=[_with_underscores(word) for word in words],
        prog=f"g4seg {name}",
        parser_class=DashedParser,
        as_positional=False,
    )
    return result if isinstance(result, int) else 0


def _with_underscores(word: str) -> str:
    """An option's name as Python spells it; values are left alone."""
    if not word.startswith("--"):
        return word
    option, equals, value = word.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


if __name__ == "__main__":
    sys.exit(main())
