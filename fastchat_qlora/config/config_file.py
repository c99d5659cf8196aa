"""YAML or JSON file -> the flags that its settings stand for, before those of the command line.

    model_name_or_path: org/model
    data_path: [a.json, {path: b.jsonl, max_samples: 10000}]
    learning_rate: 1e-4
    deepspeed: {zero_optimization: {stage: 2}}

So every check, old name and error is that of the flags. Values stay as they are written, whatever YAML 1.1 makes of
them: `1e-4` is a number, and the `no` of `eval_strategy: no` a word. A setting gives way to its flag on the command
line.
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fastchat_qlora.config.flag_parsing import (
    CONFIG_SUFFIXES,
    FlagParser,
    explain_peer_name,
    explain_peer_value,
    find_nearest_flag,
    normalize_flag,
)
from fastchat_qlora.config.legacy_flags import LEGACY_FLAGS, OMITTED, get_current_name
from fastchat_qlora.config.mixture import ENTRY_FLAGS, format_entry
from fastchat_qlora.config.validation.json_flags import JSON_FLAGS, read_small_file, reject_duplicates
from fastchat_qlora.errors import UserError, raise_errors
from fastchat_qlora.utils.text import one_line

MAX_VALUES = 10_000  # of one file; a few nested anchors stand for billions
TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "null", "bool", "int", "float", "timestamp", "seq", "map")}
NULLS = ("", "~", "null", "Null", "NULL")
JSON_BOOLS = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}

NOT_IN_FILES = {
    "--print_config": "it writes such a file, so it must be given on the command line",
    "--local_rank": "the launcher sets it for each process; drop it",
}
"""Flags that no file may set, and why."""


class Setting(NamedTuple):
    """A setting of a file."""

    name: str
    flag: str  # with underscores; both spellings are accepted
    value: Any  # a text, a list of texts, a JSON object, or None if it is not given
    line: int | None  # in a YAML file


def expand_config_file(argv: Sequence[str], parser: FlagParser) -> list[str]:
    """Replace the configuration file that a command line begins with, if it does, by flags."""
    before = [text for text in argv[:1] if normalize_flag(text).startswith("--local_rank=")]  # deepspeed puts it first
    words = list(argv[len(before) :])
    if not words or words[0].startswith("-") or not words[0].lower().endswith(CONFIG_SUFFIXES):
        return list(argv)
    given = {_get_main_name(text.partition("=")[0]) for text in words[1:] if text.startswith("--")}
    arguments, errors = [], []
    file, known = ConfigFile(words[0]), _get_settable_flags(parser)
    for setting in file.read():
        if setting.flag not in known and setting.flag not in LEGACY_FLAGS:
            errors += [
                f"{file.get_place(setting.line)}: {error}" for error in _find_unknown_keys(setting, known, parser)
            ]
            continue
        try:
            texts = _to_arguments(setting, known, parser)
            arguments += [] if _get_main_name(setting.flag) in given else texts
        except UserError as error:
            errors.append(f"{file.get_place(setting.line)}: {error}")
    raise_errors(errors)
    return [*before, *arguments, *words[1:]]


def _get_main_name(flag: str) -> str:
    """Return one name for all flags that set the same."""
    name = get_current_name(normalize_flag(flag))
    return name.replace("--no_", "--", 1).replace("--gradient_checkpointing", "--activation_checkpointing")


class ConfigFile:
    """A YAML or JSON file of settings."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0

    def read(self) -> list[Setting]:
        """Return the settings in order; a file that cannot be read, or is no mapping, is a UserError."""
        settings: dict[str, Setting] = {}
        load = self._load_json if self.name.lower().endswith(".json") else self._load_yaml
        try:
            for name, value, line in load(read_small_file(Path(os.path.expanduser(self.name))).decode("utf-8-sig")):
                setting = Setting(name, normalize_flag(f"--{name}"), value, line)
                if first := settings.get(setting.flag):
                    where = f"{first.name} in line {first.line}" if first.line else first.name
                    raise UserError(f"{self.get_place(line)}: {name} is there twice, first as {where}; drop one")
                settings[setting.flag] = setting
        except RecursionError as error:
            raise UserError(f"{self.name}: lists or objects are nested too deeply; flatten them") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}: is not UTF-8; save it in that encoding") from error
        except (OSError, ValueError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise UserError(f"{self.name}: {reason}; give a YAML or JSON file of flags and their values") from error
        return [*settings.values()]

    def get_place(self, line: int | None) -> str:
        """Return the file, with the line if it is known, as the beginning of an error."""
        return f"{self.name}: line {line}" if line else self.name

    def _load_json(self, text: str) -> Iterator[tuple[str, Any, int | None]]:
        try:
            settings = json.loads(text, object_pairs_hook=reject_duplicates)
        except ValueError as error:
            place = self.get_place(error.lineno if isinstance(error, json.JSONDecodeError) else None)
            raise UserError(f"{place}: cannot be read as JSON: {getattr(error, 'msg', error)}") from error
        if not isinstance(settings, dict):
            raise self._no_mapping(type(settings).__name__)
        for name, value in settings.items():
            yield name, [*map(_json_to_text, value)] if isinstance(value, list) else _json_to_text(value), None

    def _no_mapping(self, kind: str) -> UserError:
        wanted = "must hold flags and their values (learning_rate: 1e-4)"
        return UserError(f"{self.name}: {wanted}, holds {kind}; give data with --data_path")

    def _load_yaml(self, text: str) -> Iterator[tuple[str, Any, int | None]]:
        import yaml  # which slows every other command line down

        try:
            root = yaml.compose(text, Loader=yaml.BaseLoader)  # to which every scalar is a text
        except yaml.MarkedYAMLError as error:
            raise UserError(f"{self._place(error)}: cannot be read as YAML: {one_line(error.problem)}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{self.name}: cannot be read as YAML: {one_line(error, 200)}") from error
        if not isinstance(root, yaml.MappingNode):
            raise self._no_mapping("nothing" if root is None else root.id)
        for key, value in root.value:
            yield self._read_name(key), self._read_node(value), key.start_mark.line + 1

    def _place(self, node: Any) -> str:
        """Return the file and the line of a node or an error."""
        mark = getattr(node, "start_mark", None) or getattr(node, "problem_mark", None)
        return self.get_place(mark.line + 1 if mark else None)

    def _read_name(self, node: Any) -> str:
        if node.id != "scalar" or not node.value:
            raise UserError(f"{self._place(node)}: a name must be a word")
        return str(node.value)

    def _read_node(self, node: Any, *, in_object: bool = False) -> Any:
        """Return the value of a node: scalars as texts, but in objects as JSON would have them."""
        self.count += 1
        if self.count > MAX_VALUES:
            raise UserError(f"{self._place(node)}: has more than {MAX_VALUES:,} values; write them without anchors")
        if node.tag not in TAGS:
            raise UserError(f"{self._place(node)}: the tag {node.tag} is not supported; give plain values")
        if node.id == "scalar":
            return _read_scalar(node, in_object)
        if node.id == "sequence":
            return [self._read_node(item, in_object=in_object) for item in node.value]
        try:
            pairs = [(self._read_name(key), self._read_node(value, in_object=True)) for key, value in node.value]
            return reject_duplicates(pairs)
        except ValueError as error:
            raise UserError(f"{self._place(node)}: {error}") from error


def _read_scalar(node: Any, in_object: bool) -> Any:
    """Return a text, or None for a plain null. In objects `1e-4` is a number as in YAML 1.2, and `yes` is true."""
    if node.style is None and node.value in NULLS:
        return None
    if node.style is None and in_object:
        with suppress(ValueError):
            return json.loads(JSON_BOOLS.get(node.value.lower(), node.value))
    return node.value


def _json_to_text(value: Any) -> Any:
    return repr(value) if isinstance(value, int | float) else value


def _get_settable_flags(parser: FlagParser) -> dict[str, argparse.Action]:
    """Return the flags that a file may set, in all spellings."""
    named = {name: action for action in parser._actions if action.nargs != 0 for name in action.option_strings}
    return {name: action for name, action in named.items() if normalize_flag(name) not in NOT_IN_FILES}


def _find_unknown_keys(setting: Setting, known: Mapping[str, argparse.Action], parser: FlagParser) -> list[str]:
    """Return an error for an unknown key, or for each setting in it: other programs put them in groups."""
    if isinstance(setting.value, dict) and setting.value and setting.flag not in NOT_IN_FILES:
        names = [f"{setting.name}.{name}" for name in setting.value]
        return [f"unknown key {name}: {_explain_key(name, known, parser, in_group=True)}" for name in names]
    return [f"unknown key {setting.name}: {_explain_key(setting.name, known, parser)}"]


def _explain_key(name: str, known: Mapping[str, argparse.Action], parser: FlagParser, *, in_group: bool = False) -> str:
    """Return what to write for an unknown key, which may be that of a setting in a group."""
    flag, last = normalize_flag(f"--{name}"), normalize_flag(f"--{name.rpartition('.')[2]}")
    if reason := NOT_IN_FILES.get(flag):
        return reason
    if explained := explain_peer_name(flag[2:], known, in_file=True):
        return explained
    if in_group and last in known:
        return f"settings are not grouped; put {last[2:]} on the top level"
    explained = explain_peer_name(last[2:], known, in_file=True)
    nearest = find_nearest_flag(last, known, parser.own_flags).removeprefix("--")
    return explained or (f"did you mean {nearest}?" if nearest else "--help lists all flags")


def _to_arguments(setting: Setting, known: Mapping[str, argparse.Action], parser: FlagParser) -> list[str]:
    """Return the words of a command line that a setting stands for; none if it is not given."""
    name, flag, value, _ = setting
    action = known.get(flag)
    if value is None or (flag in OMITTED and str(value).lower() == OMITTED[flag]):
        return []
    if flag[2:] in ENTRY_FLAGS:
        value = _format_entries(name, value)
    if isinstance(value, dict) and action and action.type is str and flag[2:] not in JSON_FLAGS:
        raise UserError(f"{name} takes no object; give a value")
    if isinstance(value, list) and (action is None or action.nargs not in ("+", "*")):
        raise UserError(f"{name} takes one value, not a list of {len(value)}")
    if value == [] and action and action.default != []:
        raise UserError(f"{name} is an empty list; give a value or drop it")
    values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
    for text in values:
        _check_value(name, text, action, parser)
        if len(values) > 1 and parser._parse_optional(text) is not None:
            raise UserError(f"{name} holds {text!r}, which looks like a flag; put ./ before a file's name")
    return [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values] if values else []


def _format_entries(name: str, value: Any) -> Any:
    """Return data entries as on a command line; those that are objects have a path and settings."""
    try:
        entries = value if isinstance(value, list) else [value]
        return [format_entry(entry) if isinstance(entry, dict) else entry for entry in entries]
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _check_value(name: str, text: Any, action: argparse.Action | None, parser: FlagParser) -> None:
    """Convert a value as argparse will, so that an error has its line."""
    if not isinstance(text, str):
        raise UserError(f"{name} holds a list, an object or null in a list; give plain values")
    try:
        if action:
            parser._check_value(action, parser._get_value(action, text))
    except argparse.ArgumentError as error:
        reason = explain_peer_value(f"--{name}", text)
        raise UserError(reason or f"{name}: {error.message}") from error
