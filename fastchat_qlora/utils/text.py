"""Text from strangers, made fit to be shown and to be answered."""

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

JOINERS = "\u200c\u200d"
"""Format characters that belong to what is seen: Indic and Persian letters, emoji."""

SECRET_NAME = re.compile(r"(?:token|secret|password|passwd|credentials?|(?:^|[_-])key)$", re.IGNORECASE)
SECRET_TEXT = re.compile(r"(?<=://)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{10,}")
"""What stands before the host of a URL, and tokens of the hub."""

SHORTEST_SECRET = 8
MASK = "<hidden>"


def escape_control(text: str) -> str:
    """Text with escapes in place of characters that steer a terminal or reorder a line; line ends and tabs stay."""
    return "".join(
        character.encode("unicode_escape").decode("ascii") if _is_hidden(character) else character for character in text
    )


def is_text(text: str) -> bool:
    """Whether it can be written in UTF-8; other bytes come as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def mask_secrets(value: Any, name: str = "") -> Any:
    """A value with a mask in place of what nobody else may read: under names such as hub_token, in URLs, of the hub.

    Args:
        value: a text, which may be a JSON object, or lists and dictionaries with texts in them; what is neither is
            returned as it is.
        name: what the value is called, if anything.
    """
    if isinstance(value, dict):
        return {key: mask_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mask_secrets(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if SECRET_NAME.search(name):
        return MASK
    for variable, secret in os.environ.items():
        if len(secret) >= SHORTEST_SECRET and SECRET_NAME.search(variable):
            value = value.replace(secret, MASK)
    return SECRET_TEXT.sub(MASK, _without_secrets_of_an_object(value))


def _without_secrets_of_an_object(text: str) -> str:
    """A text that is a JSON object, such as settings given in place, with masks; any other one as it is."""
    if not text.startswith("{"):
        return text
    try:
        settings = json.loads(text)
        hidden = mask_secrets(settings)
    except (ValueError, RecursionError):
        return text
    return text if hidden == settings else json.dumps(hidden)


def one_line(text: object, most: int | None = None) -> str:
    """What an error or another object says, on one line and of so many characters at the most."""
    return " ".join(str(text).split())[:most]


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\n\t" + JOINERS


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to do about a name that nothing has: take the nearest one, or none."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {nearest[0]}?" if nearest else "drop it"
