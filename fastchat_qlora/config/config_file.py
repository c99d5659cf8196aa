"""YAML or JSON file -> the flags that its settings stand for, before those of the command line.

    model_name_or_path: org/model
    data_path: [a.json, b.jsonl]
    learning_rate: 1e-4
    deepspeed: {zero_optimization: {stage: 2}}

So every check, old name and error is that of the flags. Values stay as they are written, whatever YAML 1.1 makes of
them: `1e-4` is a number, and the `no` of `eval_strategy: no` a word. A setting gives way to its flag on the command
line.
"""

import argparse
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastchat_qlora.config.flag_parsing import (
    CONFIG_SUFFIXES,
    FlagParser,
    find_nearest_flag,
    normalize_flag,
    raise_errors,
)
from fastchat_qlora.config.legacy_flags import AUTOMATIC, LEGACY_FLAGS, get_current_name
from fastchat_qlora.config.validation.json_flags import JSON_FLAGS
from fastchat_qlora.config.validation.json_settings import read_small_file, reject_duplicates
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import one_line

MAX_VALUES = 10_000
"""Values of one file; a few nested anchors stand for billions."""

PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}
NULLS = ("", "~", "null", "Null", "NULL")
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on"), ("false", "no", "off")
SWITCHES = {"on": "True", "off": "False"}
"""Words for booleans in YAML that flags do not accept."""

LOCAL_RANK = "--local_rank="
"""Flag that the deepspeed launcher puts before all others."""

NOT_IN_FILES = {
    "--print_config": "it writes such a file, so it must be given on the command line",
    "--local_rank": "the launcher sets it for each process; drop it",
}
"""Flags that no file may set, and why."""

WANTED = "give a YAML or JSON file of flags and their values"


class Setting(NamedTuple):
    """A setting of a file; its value is a text, a list of texts, a JSON object, or None if it is not given."""

    name: str
    value: Any
    line: int | None

    @property
    def flag(self) -> str:
        """The flag with underscores; both spellings are accepted."""
        return f"--{self.name.replace('-', '_')}"


class MalformedFile(ValueError):
    """What is wrong in a file, as the end of an error, and the line if it is known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def expand_config_file(argv: Sequence[str], parser: FlagParser) -> list[str]:
    """Replace the configuration file that a command line begins with, if it does, by flags.

    Raises:
        UserError: the file cannot be read, or does not hold flags and their values.
    """
    before = [text for text in argv[:1] if normalize_flag(text).startswith(LOCAL_RANK)]
    words = list(argv[len(before) :])
    if not words or words[0].startswith("-") or not words[0].lower().endswith(CONFIG_SUFFIXES):
        return list(argv)
    given = {_get_main_name(text.partition("=")[0]) for text in words[1:] if text.startswith("--")}
    arguments, errors = [], []
    for setting in read_settings(words[0]):
        try:
            texts = _to_arguments(setting, parser)
        except MalformedFile as error:
            errors.append(f"{_describe_place(words[0], setting.line)}: {error}")
            continue
        if _get_main_name(setting.flag) not in given:
            arguments += texts
    raise_errors(errors)
    return [*before, *arguments, *words[1:]]


def _get_main_name(flag: str) -> str:
    """Return one name for all flags that set the same."""
    name = get_current_name(normalize_flag(flag))
    return name.replace("--no_", "--", 1).replace("--gradient_checkpointing", "--activation_checkpointing")


def _describe_place(name: str, line: int | None) -> str:
    return name if line is None else f"{name}: line {line}"


def read_settings(name: str) -> list[Setting]:
    """Return the settings of a file in order.

    Raises:
        UserError: it cannot be read, or is no mapping of names to values.
    """
    settings: dict[str, Setting] = {}
    load = _load_json if name.lower().endswith(".json") else _load_yaml
    try:
        for setting in load(_read(name)):
            if first := settings.get(setting.flag):
                place = f"{first.name} in line {first.line}" if first.line else first.name
                raise MalformedFile(f"{setting.name} is there twice, first as {place}; drop one", setting.line)
            settings[setting.flag] = setting
    except RecursionError as error:
        raise UserError(f"{name}: lists or objects are nested too deeply; flatten them") from error
    except MalformedFile as error:
        raise UserError(f"{_describe_place(name, error.line)}: {error}") from error
    return [*settings.values()]


def _read(name: str) -> str:
    path = Path(os.path.expanduser(name))
    try:
        return read_small_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedFile("is not UTF-8; save it in that encoding") from error
    except OSError as error:
        kind = "is a folder" if path.is_dir() else (error.strerror or str(error)).lower()
        raise MalformedFile(f"{kind}; {WANTED}") from error
    except ValueError as error:
        raise MalformedFile(f"{error}; {WANTED}, and data with --data_path") from error


def _no_mapping(kind: str) -> MalformedFile:
    wanted = "must hold flags and their values (learning_rate: 1e-4)"
    return MalformedFile(f"{wanted}, holds {kind}; give data with --data_path")


def _load_json(text: str) -> Iterator[Setting]:
    try:
        settings = json.loads(text, object_pairs_hook=reject_duplicates)
    except json.JSONDecodeError as error:
        raise MalformedFile(f"cannot be read as JSON: {error.msg}", error.lineno) from error
    except ValueError as error:
        raise MalformedFile(f"cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise _no_mapping(type(settings).__name__)
    for name, value in settings.items():
        yield Setting(name, [*map(_to_text, value)] if isinstance(value, list) else _to_text(value), None)


def _to_text(value: Any) -> Any:
    return repr(value) if isinstance(value, int | float) else value


def _load_yaml(text: str) -> Iterator[Setting]:
    import yaml  # which slows every other command line down

    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)  # whose scalars are all texts
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark and error.problem_mark.line + 1
        raise MalformedFile(f"cannot be read as YAML: {one_line(error.problem)}", line) from error
    except (yaml.YAMLError, ValueError) as error:
        raise MalformedFile(f"cannot be read as YAML: {one_line(error, 200)}") from error
    if not isinstance(root, yaml.MappingNode):
        raise _no_mapping("nothing" if root is None else root.id)
    reader = NodeReader()
    for key, value in root.value:
        yield Setting(_read_name(key), reader.read(value), _get_line(key))


class NodeReader:
    """Reader of YAML nodes that gives up after MAX_VALUES of them."""

    def __init__(self) -> None:
        self.count = 0

    def read(self, node: Any, *, in_object: bool = False) -> Any:
        """Return the value of a node: scalars as texts, but in objects as JSON would have them.

        Raises:
            MalformedFile: it is no plain value, or too large.
        """
        self.count += 1
        if self.count > MAX_VALUES:
            raise MalformedFile(f"has more than {MAX_VALUES:,} values; write them without anchors", _get_line(node))
        if node.tag not in PLAIN_TAGS:
            raise MalformedFile(f"the tag {node.tag} is not supported; give plain values", _get_line(node))
        if node.id == "scalar":
            return _read_scalar(node, in_object)
        if node.id == "sequence":
            return [self.read(item, in_object=in_object) for item in node.value]
        pairs = [(_read_name(key), self.read(value, in_object=True)) for key, value in node.value]
        try:
            return reject_duplicates(pairs)
        except ValueError as error:
            raise MalformedFile(str(error), _get_line(node)) from error


def _get_line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _read_name(node: Any) -> str:
    if node.id != "scalar" or not node.value:
        raise MalformedFile("a name must be a word", _get_line(node))
    return str(node.value)


def _read_scalar(node: Any, in_object: bool) -> Any:
    """Return a text, or None for a plain null; in objects `1e-4` is a number as in YAML 1.2, and `yes` is true."""
    text = node.value
    if node.style is not None:
        return text
    if text in NULLS:
        return None
    if not in_object:
        return SWITCHES.get(text.lower(), text)
    if text.lower() in TRUE_WORDS + FALSE_WORDS:
        return text.lower() in TRUE_WORDS
    try:
        return json.loads(text)
    except ValueError:
        return text


def _to_arguments(setting: Setting, parser: FlagParser) -> list[str]:
    """Return the words of a command line that a setting stands for; none if it is not given.

    Raises:
        MalformedFile: there is no such flag, or it takes no such value.
    """
    flag, value = setting.flag, setting.value
    known = {name: action for action in parser._actions if action.nargs != 0 for name in action.option_strings}
    known = {name: action for name, action in known.items() if normalize_flag(name) not in NOT_IN_FILES}
    action = known.get(flag)
    if action is None and flag not in LEGACY_FLAGS:
        raise MalformedFile(f"unknown key {setting.name}: {_suggest(setting, known, parser)}")
    if value is None or (flag in AUTOMATIC and value == "auto"):
        return []
    if isinstance(value, dict) and action and action.type is str and flag[2:] not in JSON_FLAGS:
        raise MalformedFile(f"{setting.name} takes no object; give a value")
    many = isinstance(value, list)
    if many and (action is None or action.nargs not in ("+", "*")):
        raise MalformedFile(f"{setting.name} takes one value, not a list of {len(value)}")
    values = value if many else [json.dumps(value) if isinstance(value, dict) else value]
    _check_values(setting.name, values, action, parser)
    return [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values] if values else []


def _suggest(setting: Setting, known: Collection[str], parser: FlagParser) -> str:
    """Return what to do about a key that no file may have."""
    if why := NOT_IN_FILES.get(setting.flag):
        return why
    if isinstance(setting.value, dict):
        return "settings are not grouped; put each flag on the top level"
    nearest = find_nearest_flag(setting.flag, known, parser.own_flags)
    return f"did you mean {nearest.removeprefix('--')}?" if nearest else "--help lists all flags"


def _check_values(name: str, values: list[Any], action: argparse.Action | None, parser: FlagParser) -> None:
    """Convert values as argparse will, so that an error has their line."""
    if not values and action and action.default != []:
        raise MalformedFile(f"{name} is an empty list; give a value or drop it")
    for value in values:
        if not isinstance(value, str):
            raise MalformedFile(f"{name} holds a list, an object or null in a list; give plain values")
        if len(values) > 1 and value.startswith("-") and value != "-" and " " not in value:
            raise MalformedFile(f"{name} holds {value!r}, which looks like a flag; put ./ before a file's name")
        try:
            if action:
                parser._check_value(action, parser._get_value(action, value))
        except argparse.ArgumentError as error:
            raise MalformedFile(f"{name}: {error.message}") from error
