"""Values that flags and settings may have, and schemas of JSON objects: names of settings and their kinds."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from fastchat_qlora.utils.text import did_you_mean


class Kind(NamedTuple):
    """The values allowed for a flag or setting, and their description after "must be"."""

    text: str
    accepts: Callable[[Any], object]  # true or false


def one_of(*choices: str) -> Kind:
    """Build the kind of a word among several; those in capitals may be written small."""
    return Kind(" or ".join(choices), lambda value: value in choices or str(value).upper() in choices)


BOOL = Kind("true or false", lambda value: isinstance(value, bool))
SWITCH = Kind("true or false", lambda value: str(value).lower() in ("true", "false"))
WHOLE_NUMBER = Kind(
    "a whole number of at least 1", lambda value: str(value).isdecimal() and str(value).strip("0") != ""
)
NUMBER = Kind("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))
WORD = Kind("a word", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def find_invalid(
    settings: Mapping[str, Any], schema: Mapping[str, Kind], unsupported: Mapping[str, str], path: str = ""
) -> Iterator[str]:
    """Yield an error for each setting that is unknown, not supported (name -> what to do), or of another kind."""
    for name, value in settings.items():
        if name in unsupported:
            yield f"{path}{name} is not supported here ({unsupported[name]}); drop it"
        elif name not in schema:
            yield f"{path}{name} is unknown; {did_you_mean(name, schema)}"
        elif not schema[name].accepts(value):
            yield f"{path}{name} must be {schema[name].text}, not {value!r}; change it or leave it out"
