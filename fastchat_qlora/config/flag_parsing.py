"""Reading flags with argparse, in this program's words; needs no library."""

import argparse
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import NoReturn

from fastchat_qlora.errors import UserError

TRUE = ("yes", "true", "t", "y", "1")
FALSE = ("no", "false", "f", "n", "0")

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
"""How the names of files end that stand in place of flags."""


class FlagParser(argparse.ArgumentParser):
    """A parser that reports a mistake as a UserError, not as two hundred lines of usage."""

    own_flags: Sequence[str] = ()
    """Flags that this program declares; they come first when the nearest name is looked for."""

    groups: Mapping[str, Sequence[str]] = {}
    """What the groups of a run's flags are about -> names of the flags, without dashes."""

    def error(self, message: str) -> NoReturn:
        """Raise in place of printing and exiting, as argparse would."""
        raise UserError(message.removeprefix("argument ").replace("/--", " / --"))


def string_to_bool(value: str) -> bool:
    """True or False as transformers' `string_to_bool` reads it.

    Raises:
        argparse.ArgumentTypeError: it is neither, in the words of transformers.
    """
    if value.lower() in TRUE:
        return True
    if value.lower() in FALSE:
        return False
    raise argparse.ArgumentTypeError(
        f"Truthy value expected: got {value} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
    )


def object_of_a_library(value: str) -> NoReturn:
    """Refuse a text where transformers wants an object of a class, which is made in programs only.

    Raises:
        argparse.ArgumentTypeError: always.
    """
    raise argparse.ArgumentTypeError(f"{value}: is made in programs, no command line can give it; drop the flag")


def find_unknown_flags(unknown: Sequence[str], parser: FlagParser) -> list[str]:
    """What is wrong with the texts that a parser knows nothing about; an unknown flag comes with its nearest name."""
    problems = []
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for text in unknown:
        name = text.partition("=")[0]
        if not name.startswith("-"):
            continue
        nearest = find_nearest_flag(name.replace("-", "_").replace("__", "--", 1), known, parser.own_flags)
        hint = f"did you mean {nearest}?" if nearest else "--help lists all flags"
        problems.append(f"unknown flag {name}: {hint}")
    if unknown and not problems:
        is_file = unknown[0].lower().endswith(CONFIG_SUFFIXES)
        hint = "one file in place of flags may stand there, in front of all flags" if is_file else ""
        problems.append(f"unexpected value {unknown[0]!r}: {hint or 'every value follows a flag that takes it'}")
    return problems


def find_nearest_flag(name: str, known: Collection[str], own_flags: Collection[str]) -> str:
    """The known flag that an unknown one is most like, this program's own first; empty where none is like it."""
    own = difflib.get_close_matches(name, [flag for flag in own_flags if flag in known], n=1, cutoff=0.7)
    return (own or difflib.get_close_matches(name, known, n=1) or [""])[0]


def raise_errors(problems: Sequence[str]) -> None:
    """Raise everything found as one UserError; nothing where nothing was found."""
    if problems:
        listed = "; ".join(f"({i}) {problem}" for i, problem in enumerate(problems, 1))
        raise UserError(problems[0] if len(problems) == 1 else f"{len(problems)} problems: {listed}")
