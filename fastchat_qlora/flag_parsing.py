"""Reading flags with argparse, in this program's words; needs no library."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from fastchat_qlora.errors import UserError

TRUE = ("yes", "true", "t", "y", "1")
FALSE = ("no", "false", "f", "n", "0")


class FlagParser(argparse.ArgumentParser):
    """A parser that reports a mistake as a UserError, not as two hundred lines of usage."""

    own_flags: Sequence[str] = ()
    """Flags that this program declares; they come first when the nearest name is looked for."""

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


def unknown_flags(unknown: Sequence[str], parser: FlagParser) -> list[str]:
    """What is wrong with the texts that a parser knows nothing about; an unknown flag comes with its nearest name."""
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    problems = []
    for text in unknown:
        name = text.partition("=")[0]
        if not name.startswith("-"):
            continue
        spelled = name.replace("-", "_").replace("__", "--", 1)
        nearest = difflib.get_close_matches(spelled, parser.own_flags, n=1, cutoff=0.7) or difflib.get_close_matches(
            spelled, known, n=1
        )
        hint = f"did you mean {nearest[0]}?" if nearest else "--help lists all flags"
        problems.append(f"unknown flag {name}: {hint}")
    if unknown and not problems:
        problems.append(f"unexpected value {unknown[0]!r}: every value follows a flag that takes it")
    return problems


def raise_all(problems: Sequence[str]) -> None:
    """Raise everything found as one UserError; nothing where nothing was found."""
    if problems:
        listed = "; ".join(f"({i}) {problem}" for i, problem in enumerate(problems, 1))
        raise UserError(problems[0] if len(problems) == 1 else f"{len(problems)} problems: {listed}")
