"""A file in place of flags: its settings become the flags that they are named after, in front of those on the line.

    model_name_or_path: org/model
    data_path: [a.json, b.jsonl]
    learning_rate: 1e-4
    deepspeed: {zero_optimization: {stage: 2}}

So every check, every old name and every error is that of the flags. Values are taken as they are written, not as what
YAML 1.1 makes of them: `1e-4` is a number, and the `no` of `eval_strategy: no` a word. A name given on the line too is
left out of the file.
"""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from fastchat_qlora.config.flag_parsing import CONFIG_SUFFIXES, FlagParser, find_nearest_flag, raise_errors
from fastchat_qlora.config.legacy_flags import AUTOMATIC, LEGACY_FLAGS, get_current_name, normalize_flag
from fastchat_qlora.config.settings_file import Malformed, Setting, read_settings
from fastchat_qlora.config.validation.json_flags import FLAGS

NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")

LOCAL_RANK = "--local_rank="
"""What the deepspeed launcher puts in front of everything."""

ON_THE_LINE_ONLY = {
    "--print_config": "it writes such a file, and is asked for on the line",
    "--local_rank": "it is what the launcher tells each process; drop it",
}
"""Flags that no file may name, and why."""


def expand(argv: Sequence[str], parser: FlagParser) -> list[str]:
    """A command line with the flags that stand for its file of settings, if it begins with one.

    Args:
        argv: a command line.
        parser: knows the flags, and how many values each takes.

    Raises:
        UserError: the file cannot be read, or does not hold flags and their values.
    """
    before = [text for text in argv[:1] if normalize_flag(text).startswith(LOCAL_RANK)]
    words = list(argv[len(before) :])
    if not words or words[0].startswith("-") or not words[0].lower().endswith(CONFIG_SUFFIXES):
        return list(argv)
    given = {_meaning(text.partition("=")[0]) for text in words[1:] if text.startswith("--")}
    actions = _actions(parser)
    flags, problems = [], []
    for setting in read_settings(words[0]):
        try:
            texts = _to_flags(setting, actions, parser)
        except Malformed as error:
            problems.append(f"{setting.place}: {error}")
            continue
        if _meaning(setting.flag) not in given:
            flags += texts
    raise_errors(problems)
    return [*before, *flags, *words[1:]]


def _actions(parser: FlagParser) -> dict[str, argparse.Action]:
    """The flags that a file may name; `--no_x` and `--help` are for the line only."""
    actions = [action for action in parser._actions if action.nargs != 0]
    named = {name: action for action in actions for name in action.option_strings}
    return {name: action for name, action in named.items() if normalize_flag(name) not in ON_THE_LINE_ONLY}


def _meaning(flag: str) -> str:
    """What a flag sets, whatever it is called: the file's word for it gives way to any of its names."""
    name = get_current_name(normalize_flag(flag))
    return name.replace("--no_", "--", 1).replace("--gradient_checkpointing", "--activation_checkpointing")


def _to_flags(setting: Setting, actions: dict[str, argparse.Action], parser: FlagParser) -> list[str]:
    """The words of a command line that say what a setting says; none for an empty value.

    Raises:
        Malformed: there is no such flag, or it takes no such value.
    """
    name = setting.flag
    if name not in actions and name not in LEGACY_FLAGS:
        raise Malformed(f"unknown key {setting.name}: {_hint(setting, actions, parser)}")
    action, value = actions.get(name), setting.value
    if value is None:
        return []
    if isinstance(value, dict):
        if name.removeprefix("--") not in FLAGS and getattr(action and action.type, "__name__", "") != "json_object":
            raise Malformed(f"{setting.name} takes no settings of its own; give a value")
        return [f"{name}={json.dumps(value)}"]
    if isinstance(value, list):
        return _several(setting.name, name, value, action)
    if name in AUTOMATIC and value.lower() == "auto":
        return []
    if _says_the_default(_made(setting.name, value, action), action):
        return []
    return [f"{name}={value}"]


def _hint(setting: Setting, actions: dict[str, argparse.Action], parser: FlagParser) -> str:
    """What to do about a key that no file may have."""
    if why := ON_THE_LINE_ONLY.get(setting.flag):
        return why
    if isinstance(setting.value, dict):
        return "flags stand one below the other, and not in groups"
    nearest = find_nearest_flag(setting.flag, actions, parser.own_flags)
    return f"did you mean {nearest.removeprefix('--')}?" if nearest else "--help lists all flags"


def _several(key: str, name: str, values: list[str], action: argparse.Action | None) -> list[str]:
    if action is None or action.nargs != "+":
        raise Malformed(f"{key} takes one value, not a list of {len(values)}")
    if not values and action.default == []:
        return []
    if not values:
        raise Malformed(f"{key} is an empty list; name something or leave it out")
    for value in values:
        _made(key, value, action)
    if len(values) == 1:
        return [f"{name}={values[0]}"]
    if dashed := [value for value in values if _looks_like_a_flag(value)]:
        raise Malformed(f"{key} holds {dashed[0]!r}, which begins as a flag does; put ./ in front of a file's name")
    return [name, *values]


def _looks_like_a_flag(value: str) -> bool:
    """Whether argparse would take a value for a flag."""
    return value.startswith("-") and value != "-" and " " not in value and not NEGATIVE_NUMBER.fullmatch(value)


def _made(key: str, value: str, action: argparse.Action | None) -> Any:
    """What argparse will make of a value, asked here so that the line of one that it refuses can be named.

    Raises:
        Malformed: it refuses the value.
    """
    if action is None or not callable(action.type):
        return value
    try:
        made = action.type(value)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        kind = getattr(action.type, "__name__", "")
        raise Malformed(f"{key}: {value!r} is no {kind}" if kind in ("int", "float") else f"{key}: {error}") from error
    if action.choices is not None and made not in action.choices:
        raise Malformed(f"{key}: {value!r} is none of {', '.join(map(str, action.choices))}")
    return made


def _says_the_default(made: Any, action: argparse.Action | None) -> bool:
    """Whether a number is the default, which argparse knows: 0 and the 0.0 made of a text are not printed alike."""
    return action is not None and isinstance(made, int | float) and bool(made == action.default)
