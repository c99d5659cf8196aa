"""Settings out of a YAML or JSON file: names with a text, texts or an object each, and the line where they stand."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastchat_qlora.errors import UserError
from fastchat_qlora.json_settings import DEEPEST, without_repetition
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
