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
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastchat_qlora.errors import UserError
from fastchat_qlora.flag_parsing import CONFIG_SUFFIXES, FlagParser, nearest_flag, raise_all
from fastchat_qlora.json_settings import DEEPEST, FLAGS, without_repetition
from fastchat_qlora.old_flags import AUTOMATIC, OLD_FLAGS, spelled, today
from fastchat_qlora.text import one_line

LARGEST = 1 << 20
"""Bytes of a file of settings."""

MOST_VALUES = 10_000
"""Of one file; a few anchors within each other stand for billions."""

YAML_TAG = "tag:yaml.org,2002:"
NULL, BOOL, TEXT = f"{YAML_TAG}null", f"{YAML_TAG}bool", f"{YAML_TAG}str"
PLAIN_TAGS = {f"{YAML_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")}
PLAIN_TAGS |= {f"{YAML_TAG}merge", f"{YAML_TAG}value"}  # of the words << and =

SWITCHES = {"on": "True", "off": "False"}
"""YAML's words for booleans that flags do not take."""

NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")

LOCAL_RANK = "--local_rank="
"""What the deepspeed launcher puts in front of everything."""


class Setting(NamedTuple):
    """One line of a file.

    Attributes:
        name: as it is written.
        value: a text, texts, an object, or None.
        place: where it stands, as the beginning of an error.
    """

    name: str
    value: str | list[str] | dict[str, Any] | None
    place: str


class Malformed(ValueError):
    """What is wrong with a file, as the end of a sentence, and the line where that is known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def expand(argv: Sequence[str], parser: FlagParser) -> list[str]:
    """A command line with the flags that stand for its file of settings, if it begins with one.

    Args:
        argv: a command line.
        parser: knows the flags, and how many values each takes.

    Raises:
        UserError: the file cannot be read, or does not hold flags and their values.
    """
    before = [text for text in argv[:1] if spelled(text).startswith(LOCAL_RANK)]
    words = list(argv[len(before) :])
    if not words or words[0].startswith("-") or not words[0].lower().endswith(CONFIG_SUFFIXES):
        return list(argv)
    given = {_meaning(text.partition("=")[0]) for text in words[1:] if text.startswith("--")}
    actions = _actions(parser)
    flags, problems = [], []
    for setting in read_settings(words[0]):
        name = f"--{setting.name.replace('-', '_')}"
        try:
            texts = _to_flags(setting, name, actions, parser)
        except Malformed as error:
            problems.append(f"{setting.place}: {error}")
            continue
        if _meaning(name) not in given:
            flags += texts
    raise_all(problems)
    return [*before, *flags, *words[1:]]


def _actions(parser: FlagParser) -> dict[str, argparse.Action]:
    """The flags that a file may name; `--no_x` is for the line only."""
    actions = [action for action in parser._actions if action.nargs != 0]
    return {name: action for action in actions for name in action.option_strings}


def _meaning(flag: str) -> str:
    """What a flag sets, whatever it is called: the file's word for it gives way to any of its names."""
    name = today(spelled(flag))
    return name.replace("--no_", "--", 1).replace("--gradient_checkpointing", "--activation_checkpointing")


def _to_flags(setting: Setting, name: str, actions: dict[str, argparse.Action], parser: FlagParser) -> list[str]:
    """The words of a command line that say what a setting says; none for an empty value.

    Raises:
        Malformed: there is no such flag, or it takes no such value.
    """
    if name not in actions and name not in OLD_FLAGS:
        raise Malformed(_unknown(setting, name, parser))
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


def _unknown(setting: Setting, name: str, parser: FlagParser) -> str:
    if isinstance(setting.value, dict):
        return f"unknown key {setting.name}: flags stand one below the other, and not in groups"
    nearest = nearest_flag(name, parser)
    return f"unknown key {setting.name}: " + (
        f"did you mean {nearest.removeprefix('--')}?" if nearest else "--help lists all flags"
    )


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


def read_settings(name: str) -> list[Setting]:
    """The settings in a file, in their order.

    Raises:
        UserError: it cannot be read, or is no mapping of names to values.
    """
    path = Path(os.path.expanduser(name))
    try:
        if path.stat().st_size > LARGEST:
            raise Malformed("is too large for settings; data goes into --data_path")
        text = path.read_bytes().decode("utf-8-sig")
        return list(_read_json(name, text) if path.suffix.lower() == ".json" else _read_yaml(name, text))
    except OSError as error:
        kind = "is a folder" if path.is_dir() else (error.strerror or str(error)).lower()
        raise UserError(f"{name}: {kind}; give a YAML or JSON file of flags and their values") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8; save it in that encoding") from error
    except RecursionError as error:
        raise UserError(f"{name}: holds lists or objects within too many others; mend it") from error
    except Malformed as error:
        raise UserError(f"{_place(name, error.line)}: {error}") from error


def _place(name: str, line: int | None) -> str:
    return name if line is None else f"{name}: line {line}"


NO_MAPPING = "must hold flags and their values (learning_rate: 1e-4), holds {}; data goes into --data_path"


def _read_json(name: str, text: str) -> Iterator[Setting]:
    try:
        settings = json.loads(text, object_pairs_hook=without_repetition)
    except json.JSONDecodeError as error:
        raise Malformed(f"cannot be read as JSON: {error.msg}", error.lineno) from error
    except ValueError as error:
        raise Malformed(f"cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise Malformed(NO_MAPPING.format(type(settings).__name__))
    for key, value in settings.items():
        if isinstance(value, list):
            value = [_text(key, item) for item in value]
        elif value is not None and not isinstance(value, dict):
            value = _text(key, value)
        yield Setting(key, value, name)


def _text(key: str, value: Any) -> str:
    if value is None or isinstance(value, list | dict):
        raise Malformed(f"{key} holds a list, an object or null within a list; name values only")
    return value if isinstance(value, str) else repr(value)


def _read_yaml(name: str, text: str) -> Iterator[Setting]:
    import yaml  # of which no run without such a file has any use

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark and error.problem_mark.line + 1
        raise Malformed(f"cannot be read as YAML: {one_line(error.problem)}", line) from error
    except (yaml.YAMLError, ValueError) as error:
        raise Malformed(f"cannot be read as YAML: {one_line(error, 200)}") from error
    if not isinstance(root, yaml.MappingNode):
        raise Malformed(NO_MAPPING.format("nothing" if root is None else root.id))
    yield from YamlSettings(name).read(root)


class YamlSettings:
    """Settings out of the nodes of a YAML file.

    Args:
        name: the file's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0

    def read(self, root: Any) -> Iterator[Setting]:
        """The settings in a mapping.

        Raises:
            Malformed: a name is there twice, or a value is neither a text, nor texts, nor an object.
        """
        lines: dict[str, int] = {}
        for key, value in root.value:
            line = key.start_mark.line + 1
            if key.id != "scalar":
                raise Malformed("a name must be a word", line)
            if key.value in lines:
                raise Malformed(f"{key.value} is there twice, first in line {lines[key.value]}; drop one", line)
            lines[key.value] = line
            yield Setting(key.value, self._value(key.value, value), _place(self.name, line))

    def _value(self, key: str, node: Any) -> str | list[str] | dict[str, Any] | None:
        self._check(node)
        if node.id == "scalar":
            return None if node.tag == NULL else _word(node)
        if node.id == "mapping":
            return self._typed(node, DEEPEST)  # type: ignore[no-any-return]  # of a mapping it makes one
        for item in node.value:
            self._check(item)
            if item.id != "scalar" or item.tag == NULL:
                raise Malformed(f"{key} holds a list, an object or null within a list; name values only", _line(item))
        return [_word(item) for item in node.value]

    def _typed(self, node: Any, levels: int) -> Any:
        """What a node says as JSON would say it, of objects within flags."""
        self._check(node)
        if not levels:
            raise Malformed(f"holds objects in more than {DEEPEST} others; mend it", _line(node))
        if node.id == "sequence":
            return [self._typed(item, levels - 1) for item in node.value]
        if node.id == "scalar":
            return _number_or_text(node)
        pairs = [(key.value if key.id == "scalar" else "", self._typed(value, levels - 1)) for key, value in node.value]
        try:
            return without_repetition(pairs)
        except ValueError as error:
            raise Malformed(str(error), _line(node)) from error

    def _check(self, node: Any) -> None:
        self.count += 1
        if self.count > MOST_VALUES:
            raise Malformed(f"stands for more than {MOST_VALUES:,} values; write them without anchors", _line(node))
        if node.tag not in PLAIN_TAGS:
            raise Malformed(f"{node.tag} makes an object of a program; give plain values only", _line(node))


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _word(node: Any) -> str:
    """A value as it is written; the words on and off as flags say them."""
    text = str(node.value)
    return SWITCHES.get(text.lower(), text) if node.tag == BOOL else text


def _number_or_text(node: Any) -> Any:
    """A scalar's value, where `1e-4` is a number as in YAML 1.2 and JSON."""
    if node.style is not None or node.tag == NULL:
        return None if node.tag == NULL else node.value
    if node.tag == BOOL:
        return node.value.lower() in ("yes", "true", "on")
    try:
        return json.loads(node.value)
    except ValueError:
        return node.value
