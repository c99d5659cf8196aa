"""JSON objects as values of flags: reading them, and comparing them with a schema."""

import argparse
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastchat_qlora.utils.text import did_you_mean

MAX_DEPTH = 50  # nested objects; no setting of any library is as deep
TOO_DEEP = f"objects in more than {MAX_DEPTH} others"
MAX_FILE_BYTES = 1 << 20


class Kind(NamedTuple):
    """Values that a setting may have, and their description."""

    text: str
    accepts: Callable[[Any], bool]


def one_of(*choices: str) -> Kind:
    """Build the kind of a word among several."""
    return Kind(" or ".join(choices), lambda value: value in choices)


BOOL = Kind("true or false", lambda value: isinstance(value, bool))
SWITCH = Kind("true or false", lambda value: str(value).lower() in ("true", "false"))
COUNT = Kind("a whole number of at least 1", lambda value: str(value).isdecimal() and str(value).strip("0") != "")
NUMBER = Kind("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))
WORD = Kind("a word", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def find_invalid(
    settings: Mapping[str, Any], schema: Mapping[str, Kind], unsupported: Mapping[str, str], path: str = ""
) -> Iterator[str]:
    """Yield an error for each setting that is unknown, not supported, or of another kind.

    Args:
        settings: a JSON object.
        schema: name -> what it may be.
        unsupported: name of a setting that the libraries know and this program does not support -> what to do.
        path: of the object in its file, with a dot at the end.
    """
    for name, value in settings.items():
        if name in unsupported:
            yield f"{path}{name} is not supported here ({unsupported[name]}); drop it"
        elif name not in schema:
            yield f"{path}{name} is unknown; {did_you_mean(name, schema)}"
        elif not schema[name].accepts(value):
            yield f"{path}{name} must be {schema[name].text}, not {value!r}; change it or leave it out"


def read_json(given: str) -> Any:
    """Parse JSON given in place, or in the file of that name.

    Raises:
        OSError: there is no such file.
        ValueError: it is no JSON, is nested too deeply, or has a name twice.
    """
    try:
        settings = json.loads(json_text(given), object_pairs_hook=reject_duplicates)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    level = [settings]
    for _ in range(MAX_DEPTH):
        level = [value for values in level if isinstance(values, dict) for value in values.values()]
    if level:
        raise ValueError(TOO_DEEP)
    return settings


def json_object(given: str) -> dict[str, Any]:
    """Parse a JSON object for argparse.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        settings = read_json(given)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{given}: cannot be read as JSON: {error}; correct it") from error
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f"{given}: must be a JSON object, not {type(settings).__name__}; correct it")
    return settings


def json_text(given: str) -> str:
    """Return the text, or the content of the file it names; the libraries read a file for some flags only.

    Raises:
        OSError: there is no such file.
        ValueError: it is not UTF-8, or no file of settings.
    """
    return given if given.startswith("{") else read_small_file(Path(os.path.expanduser(given))).decode().strip()


def read_small_file(path: Path) -> bytes:
    """Read a file of settings; a pipe could be read only once, and a device may never end.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file of settings, as the end of a sentence.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError("is not a regular file")
    if found.st_size > MAX_FILE_BYTES:
        raise ValueError("is too large for settings")
    return path.read_bytes()


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; Python would keep the last of several values.

    Raises:
        ValueError: a name is there twice.
    """
    names = [name for name, _ in pairs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(repeated)} is there twice")
    return dict(pairs)


def read_object(given: Any) -> dict[str, Any]:
    """Return the JSON object of a flag, or an empty one if it is malformed, which is reported elsewhere."""
    try:
        settings = read_json(given) if given else {}
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
