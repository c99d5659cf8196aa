"""Settings out of a YAML or JSON file: names with a text, texts or an object each, and the line where they stand."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastchat_qlora.config.validation.json_flags import DEEPEST, read_small_file, without_repetition
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import one_line

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

    @property
    def flag(self) -> str:
        """What the command line calls it."""
        return flag_of(self.name)


def flag_of(name: str) -> str:
    """The flag that a name in a file means, with underscores; both spellings are accepted."""
    return f"--{name.replace('-', '_')}"


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
    text = _read(name)
    try:
        return list(_read_json(name, text) if name.lower().endswith(".json") else _read_yaml(name, text))
    except RecursionError as error:
        raise UserError(f"{name}: holds lists or objects within too many others; mend it") from error
    except Malformed as error:
        raise UserError(f"{_place(name, error.line)}: {error}") from error


def _read(name: str) -> str:
    path = Path(os.path.expanduser(name))
    try:
        return read_small_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8; save it in that encoding") from error
    except OSError as error:
        kind = "is a folder" if path.is_dir() else (error.strerror or str(error)).lower()
        raise UserError(f"{name}: {kind}; {WANTED}") from error
    except ValueError as error:
        raise UserError(f"{name}: {error}; {WANTED}, and data with --data_path") from error


def _place(name: str, line: int | None) -> str:
    return name if line is None else f"{name}: line {line}"


WANTED = "give a YAML or JSON file of flags and their values"
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
    names: dict[str, str] = {}
    for key, value in settings.items():
        if (first := names.setdefault(flag_of(key), key)) != key:
            raise Malformed(f"{key} is there twice, first as {first}; drop one")
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
        places: dict[str, str] = {}
        for key, value in root.value:
            name, line = _name(key), _line(key)
            if first := places.get(flag_of(name)):
                raise Malformed(f"{name} is there twice, first as {first}; drop one", line)
            places[flag_of(name)] = f"{name} in line {line}"
            yield Setting(name, self._value(name, value), _place(self.name, line))

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
        pairs = [(_name(key), self._typed(value, levels - 1)) for key, value in node.value]
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


def _name(key: Any) -> str:
    """What a setting is called.

    Raises:
        Malformed: there are values in place of a name, or nothing.
    """
    if key.id != "scalar" or not key.value:
        raise Malformed("a name must be a word", _line(key))
    return str(key.value)


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
