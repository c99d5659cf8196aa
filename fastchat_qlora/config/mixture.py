"""An entry of --data_path: a path and how much of it is used, as in `a.jsonl#max_samples=10000,repeat=2`."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from fastchat_qlora.config.validation.json_schema import Kind
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.file_types import DATA_SUFFIXES, strip_compression_suffix

ENTRY_FLAGS = ("data_path", "eval_data_path")

SETTINGS: dict[str, Kind] = {
    "max_samples": Kind("a whole number of at least 1", lambda value: value >= 1 and value == int(value)),
    "share": Kind("above 0 and at most 1", lambda value: 0 < value <= 1),
    "repeat": Kind("at least 1 and at most 1000; for a part of it give share", lambda value: 1 <= value <= 1000),
}
"""Setting of an entry -> its values."""

SETTING = re.compile(r"#\w+=")  # where settings begin


class DataEntry(NamedTuple):
    """A file, a folder or a hub dataset, and how much of it is used."""

    path: str
    max_samples: int | None = None  # conversations at most
    share: float = 1.0  # of its conversations
    repeat: float = 1.0  # times that each is used an epoch; a fraction repeats as many once more

    @property
    def settings(self) -> str:
        """The settings as on a command line; empty if all of it is used once."""
        given = {name: getattr(self, name) for name in SETTINGS if getattr(self, name) != self._field_defaults[name]}
        return ",".join(f"{name}={value:.15g}" for name, value in given.items())

    def __str__(self) -> str:
        return "#".join(filter(None, (self.path, self.settings)))


def parse_entry(text: str) -> DataEntry:
    """Return the entry that a text stands for; one that exists under the whole text has no settings.

    Raises:
        UserError: a setting is unknown, given twice, or out of its range.
    """
    path, mark, settings = text.rpartition("#")
    if _exists(text) or not mark or not (SETTING.match(mark + settings) or _exists(path)):
        return DataEntry(text)
    if not path or (SETTING.search(path) and not _exists(path)):
        raise UserError(
            "settings stand behind a path and one #, with commas between them; write a.jsonl#share=0.5,repeat=2"
        )
    pairs = [setting.partition("=")[::2] for setting in settings.split(",")]
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{twice} is given twice; drop one")
    return build_entry(path, dict(pairs))


def _exists(path: str) -> bool:
    return bool(path) and os.path.exists(os.path.expanduser(path))


def build_entry(path: str, settings: Mapping[str, Any]) -> DataEntry:
    """Return an entry with these settings, as numbers or as texts.

    Raises:
        UserError: a setting is unknown, or out of its range.
    """
    values = {name: _read_number(name, value) for name, value in settings.items()}
    if values.get("max_samples") is not None:
        values["max_samples"] = int(values["max_samples"])
    return DataEntry(path, **values)


def _read_number(name: str, value: Any) -> Any:
    if name not in SETTINGS:
        raise UserError(f"unknown setting {name!r}; known are {', '.join(SETTINGS)}, as in a.jsonl#max_samples=1000")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or not SETTINGS[name].accepts(number):
        raise UserError(f"{name}={value}: must be {SETTINGS[name].text}")
    return number


def format_entry(value: Mapping[str, Any]) -> str:
    """Return the entry of a configuration file, an object with `path` and settings, as on a command line.

    Raises:
        UserError: it has no path, or a setting is wrong.
    """
    path = value.get("path")
    if not isinstance(path, str) or not path:
        raise UserError("an entry must have its path as text, as in {path: a.jsonl, max_samples: 1000}")
    return str(build_entry(path, {name: one for name, one in value.items() if name != "path"}))


def get_path(text: str) -> str:
    """Return the path of an entry, whatever its settings are."""
    try:
        return parse_entry(text).path
    except UserError:  # the check of the flags reports it
        return text.rpartition("#")[0]


def name_entries(paths: Sequence[str]) -> list[str]:
    """Return a short name for each path, all different: the last part of it, with folders where two are alike."""
    parts = [tuple(map(_clean, PurePath(path).parts)) or ("data",) for path in paths]
    lengths = dict.fromkeys(parts, 1)
    while True:
        names = {part: "-".join(part[-length:]) for part, length in lengths.items()}
        alike = [part for part in names if [*names.values()].count(names[part]) > 1 and lengths[part] < len(part)]
        if not alike:
            return _number_equals([names[part] for part in parts])
        lengths |= {part: lengths[part] + 1 for part in alike}


def _clean(part: str) -> str:
    """Return a part of a path without suffixes and without what TensorBoard takes in no name."""
    stem = part[: len(strip_compression_suffix(part))]
    stem = next((stem[: -len(suffix)] for suffix in DATA_SUFFIXES if stem.lower().endswith(suffix)), stem)
    return re.sub(r"[^\w.-]+", "-", stem).strip("-") or "data"


def _number_equals(names: Sequence[str]) -> list[str]:
    """Return the names, with numbers behind those that stood before."""
    taken: list[str] = []
    for name in names:
        number, unique = 2, name
        while unique in taken:
            number, unique = number + 1, f"{name}-{number}"
        taken.append(unique)
    return taken
