"""argparse with this program's error messages; imports no library."""

import argparse
import difflib
import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import is_pattern

PEER_TABLE = Path(__file__).with_name("peer_flags.json")

TRUE = ("yes", "true", "t", "y", "1", "on")
FALSE = ("no", "false", "f", "n", "0", "off")

YAML_SUFFIXES = (".yaml", ".yml")
CONFIG_SUFFIXES = (*YAML_SUFFIXES, ".json")  # of configuration files, one of which may precede the flags

NAME_FLAGS = ("lora_target_modules", "lora_exclude_modules", "lora_target_parameters", "modules_to_save")
"""Flags that name modules or parameters."""

ALL_LINEAR_NAMES = ("all", "all_linear", "all-linear")  # of --lora_target_modules in other programs, in small letters

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


def parse_share_prefixes(value: str) -> str | None:
    """Return the value of --share_prefixes (auto, True or False); None for another word."""
    word = value.lower()
    return "True" if word in TRUE else "False" if word in FALSE else word if word == "auto" else None


def split_module_names(words: Sequence[str]) -> list[str]:
    """Return the names of modules that words hold: one each, or several with commas or spaces, also as a list in JSON.

    A regular expression, which may have commas and brackets itself, is one word, or a quoted item of a list.
    """
    text = " ".join(words)
    is_list = text.startswith("[") and text.endswith("]")
    if is_list:
        with suppress(ValueError, RecursionError):
            return [str(name) for name in json.loads(text)] or [""]
    names = [name.strip("\"'") for name in re.split(r"[,\s]+", text[1:-1] if is_list else text)]
    if "" in words or (any(map(is_pattern, names)) and not (is_list and re.search("[\"']", text))):
        return [*words]
    return [name for name in names if name] or [""]


def normalize_flag(name: str) -> str:
    """Return a flag's name with underscores; both spellings are accepted."""
    return "--" + name[2:].replace("-", "_")


def find_given(arguments: Sequence[str]) -> list[str]:
    """Return the fields that a command line sets, in order; `--no_x` sets x."""
    flags = [normalize_flag(text.partition("=")[0]) for text in arguments if text.startswith("--")]
    return list(dict.fromkeys(flag[2:].removeprefix("no_") for flag in flags))


class PeerSetting(NamedTuple):
    """What a name of another program is here."""

    use: tuple[tuple[str, str], ...]  # flags without dashes, and the values to give them, "" for any; none: drop it
    remark: str  # on the flags, or why there is none


@functools.cache
def read_peer_table() -> dict[str, Any]:
    """Return the names and values that other programs have; only mistakes are looked up, so it is read when needed."""
    table: dict[str, Any] = json.loads(PEER_TABLE.read_text(encoding="utf-8"))
    return table


def find_peer_settings(name: str, known: Collection[str]) -> dict[PeerSetting, list[str]]:
    """Return what a name, without dashes, is in other programs -> those programs.

    `known` are the flags of the command; what it has no flags for is left out.
    """
    found: dict[PeerSetting, list[str]] = {}
    for peer, entry in read_peer_table()["peers"].items():
        if name in entry["flags"]:
            given = entry["flags"][name]
            words, remark = (given, "") if isinstance(given, str) else given
            use = tuple(word.partition("=")[::2] for word in words.split())
            if all(f"--{flag}" in known for flag, _ in use or [("data_path", "")]):
                found.setdefault(PeerSetting(use, remark), []).append(peer)
    return found


def explain_peer_name(name: str, known: Collection[str], *, in_file: bool = False) -> str:
    """Return whose name this is and what to use, as flags or as lines of a file; "" for a name of no program."""
    explained = []
    for (use, remark), peers in find_peer_settings(name, known).items():
        *others, last = [f"{peer}'" if peer.endswith("s") else f"{peer}'s" for peer in peers]
        owners = f"{', '.join(others)} and {last}" if others else last
        dashes, between = ("", ": ") if in_file else ("--", " ")
        flags = ", ".join(f"{dashes}{flag}{between if value else ''}{value}" for flag, value in use)
        advice = f"use {flags}{f' ({remark})' if remark else ''}" if use else f"drop it: {remark}"
        explained.append(f"{owners} name; {advice}")
    return "; ".join(explained)


def split_peer_values(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return an error for each value that a flag of the same name has in other programs only, and the rest."""
    errors, rest, waiting = [], [], list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, has_value, value = word.partition("=")
        value = value if has_value else "".join(waiting[:1])
        if reason := explain_peer_value(name, value):
            errors.append(reason)
            del waiting[: 0 if has_value else 1]
        else:
            rest.append(word)
    return errors, rest


def explain_peer_value(name: str, value: str) -> str:
    """Return the error for a flag's value that it has in other programs only; "" for any other value."""
    flag = normalize_flag(name)
    reason = read_peer_table()["values"].get(flag[2:], {}).get(value.lower())
    return f"{flag} {value}: {reason}" if reason else ""


def list_known_flags(parser: FlagParser) -> list[str]:
    """Return all spellings of the flags of a command."""
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def find_unknown_flags(unknown: Sequence[str], parser: FlagParser) -> list[str]:
    """Return an error for each unknown flag, with what is meant by it, or else for the first stray value."""
    known = list_known_flags(parser)
    errors = []
    for text in unknown:
        name = text.partition("=")[0]
        if name.startswith("-"):
            flag = normalize_flag(f"--{name.lstrip('-')}")
            nearest = find_nearest_flag(flag, known, parser.own_flags)
            hint = f"did you mean {nearest}?" if nearest else "--help lists all flags"
            errors.append(f"unknown flag {name}: {explain_peer_name(flag[2:], known) or hint}")
    if unknown and not errors:
        errors.append(f"unexpected value {unknown[0]!r}: {_explain_stray_value(unknown[0], known)}")
    return errors


def _explain_stray_value(text: str, known: Collection[str]) -> str:
    name, is_setting, _ = text.partition("=")  # as in torchtune's and LLaMA-Factory's overrides of a file
    if is_setting and f"--{name}" in known:
        return f"a flag has two dashes; write --{text}"
    if is_setting and (explained := explain_peer_name(name, known)):
        return explained
    is_file = text.lower().endswith(CONFIG_SUFFIXES)
    return "a configuration file must come first, before all flags" if is_file else "every value must follow a flag"


def find_nearest_flag(name: str, known: Collection[str], own_flags: Collection[str]) -> str:
    """Return the known flag most similar to an unknown one, rather one of this program's own; "" if none is similar.

    Dashes do not count: they would make short names similar, such as lr and q_lora.
    """
    ratings = {
        flag: difflib.SequenceMatcher(None, flag[2:], name[2:]).ratio() + 0.05 * (flag in own_flags) for flag in known
    }
    nearest = max(ratings, key=lambda flag: (ratings[flag], flag), default="")
    return nearest if nearest and ratings[nearest] >= 0.65 else ""
