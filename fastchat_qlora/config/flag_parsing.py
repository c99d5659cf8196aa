"""argparse with this program's error messages; imports no library."""

import argparse
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from fastchat_qlora.errors import UserError

TRUE = ("yes", "true", "t", "y", "1", "on")
FALSE = ("no", "false", "f", "n", "0", "off")

YAML_SUFFIXES = (".yaml", ".yml")
CONFIG_SUFFIXES = (*YAML_SUFFIXES, ".json")  # of configuration files, one of which may precede the flags

NOT_PLANNED: dict[str, Any] = {"devices": None, "device_type": None, "device_memory_gib": None}
"""Values that `plan`'s own flags have in other commands, which run on this machine's devices."""


class FlagParser(argparse.ArgumentParser):
    """An argument parser with a UserError in place of two hundred lines of usage."""

    def __init__(self, **settings: Any) -> None:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(**{"allow_abbrev": False, "formatter_class": formatter, **settings})
        self._defaults = NOT_PLANNED | self._defaults  # set_defaults would change the flags of `plan` too
        self.own_flags: Sequence[str] = ()  # declared by this program; preferred as the nearest of an unknown flag
        self.groups: Mapping[str, Sequence[str]] = {}  # title of a group of a run's settings -> flags without dashes

    def error(self, message: str) -> NoReturn:
        """Raise a UserError in argparse's words."""
        raise UserError(message.removeprefix("argument ").replace("/--", " / --"))


def string_to_bool(value: str) -> bool:
    """Return the boolean that a word means, for argparse; on and off are YAML's."""
    if value.lower() in TRUE:
        return True
    if value.lower() in FALSE:
        return False
    raise argparse.ArgumentTypeError(f"must be true/false, yes/no, on/off, t/f, y/n or 1/0, not {value!r}")


def parse_token_count(value: str) -> str | None:
    """Return which tokens --include_num_input_tokens_seen counts (all, non_padding or no); None for another word."""
    word = value.lower()
    return "all" if word in ("all", *TRUE) else "no" if word in FALSE else word if word == "non_padding" else None


def normalize_flag(name: str) -> str:
    """Return a flag's name with underscores; both spellings are accepted."""
    return "--" + name[2:].replace("-", "_")


def find_given(arguments: Sequence[str]) -> list[str]:
    """Return the fields that a command line sets, in order; `--no_x` sets x."""
    flags = [normalize_flag(text.partition("=")[0]) for text in arguments if text.startswith("--")]
    return list(dict.fromkeys(flag[2:].removeprefix("no_") for flag in flags))


def find_unknown_flags(unknown: Sequence[str], parser: FlagParser) -> list[str]:
    """Return an error for each unknown flag, with the nearest known one, or else for the first stray value."""
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    errors = []
    for text in unknown:
        name = text.partition("=")[0]
        if name.startswith("-"):
            nearest = find_nearest_flag(name.replace("-", "_").replace("__", "--", 1), known, parser.own_flags)
            errors.append(f"unknown flag {name}: {f'did you mean {nearest}?' if nearest else '--help lists all flags'}")
    if unknown and not errors:
        is_file = unknown[0].lower().endswith(CONFIG_SUFFIXES)
        hint = "a configuration file must come first, before all flags" if is_file else "every value must follow a flag"
        errors.append(f"unexpected value {unknown[0]!r}: {hint}")
    return errors


def find_nearest_flag(name: str, known: Collection[str], own_flags: Collection[str]) -> str:
    """Return the known flag most similar to an unknown one, this program's own first; "" if none is similar."""
    own = difflib.get_close_matches(name, [flag for flag in own_flags if flag in known], n=1, cutoff=0.7)
    return (own or difflib.get_close_matches(name, known, n=1) or [""])[0]
