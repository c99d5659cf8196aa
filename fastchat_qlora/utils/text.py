"""Untrusted text: escaping, masking of secrets, and suggestions for mistyped names."""

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterable
from datetime import date
from typing import Any

VISIBLE_CONTROLS = "\n\t\u200c\u200d"  # the last two join letters of Indic and Persian scripts, and emoji

SECRET_NAME = re.compile(r"(?:token|secret|password|passwd|credentials?|(?:^|[_-])key)$", re.IGNORECASE)
SECRET_TEXT = re.compile(r"(?<=://)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{10,}")  # user:password@ of a URL, hub tokens
MIN_SECRET_LENGTH = 8  # characters; shorter values of environment variables stand in any text
MASK = "<hidden>"

PATTERN_SIGN = re.compile(r"[\\*+?()\[\]{}|^$]")  # in no name of a module


def escape_control(text: str) -> str:
    """Escape characters that control a terminal or reorder a line; line ends and tabs stay."""
    controls = {
        character: character.encode("unicode_escape").decode("ascii")
        for character in {*text} - {*VISIBLE_CONTROLS}
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    }
    return text.translate(str.maketrans(controls)) if controls else text


def is_date(text: str) -> bool:
    """Return whether a text is a day as in 2026-11-30."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def is_text(text: str) -> bool:
    """Return whether a text can be written in UTF-8; other bytes come as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def mask_secrets(value: Any, name: str = "") -> Any:
    """Mask secrets: values of names such as hub_token, passwords in URLs, tokens of the hub, and of the environment.

    Args:
        value: a text, which may be a JSON object, or lists and dictionaries with texts; other values stay.
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
        if len(secret) >= MIN_SECRET_LENGTH and SECRET_NAME.search(variable):
            value = value.replace(secret, MASK)
    return SECRET_TEXT.sub(MASK, _mask_json(value))


def _mask_json(text: str) -> str:
    """Mask secrets in a JSON object, such as settings given on the command line; other texts stay."""
    if not text.startswith("{"):
        return text
    try:
        settings = json.loads(text)
        masked = mask_secrets(settings)
    except (ValueError, RecursionError):
        return text
    return text if masked == settings else json.dumps(masked)


def one_line(text: object, most: int | None = None) -> str:
    """Return the text of an error or another object on one line, with at most so many characters."""
    return " ".join(str(text).split())[:most]


def ends_with_any(name: str, ends: Iterable[str]) -> bool:
    """Return whether a dotted name is one of these or ends with one of them, as PEFT matches names."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def lies_in_any(name: str, ends: Iterable[str]) -> bool:
    """Return whether a dotted name is that of a module with one of these ends, or of a part of such a module."""
    return any(f".{end}." in f".{name}." for end in ends)


def is_pattern(name: str) -> bool:
    """Return whether a name of modules is a regular expression."""
    return bool(PATTERN_SIGN.search(name))


def matches_name(name: str, wanted: str | Collection[str]) -> bool:
    """Return whether PEFT selects a module: by a regular expression, which is a text, or by the end of its name."""
    return re.fullmatch(wanted, name) is not None if isinstance(wanted, str) else ends_with_any(name, wanted)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the advice about an unknown name: the nearest known one, or to drop it."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {nearest[0]}?" if nearest else "drop it"


def count_common_prefix(one: str, other: str) -> int:
    """Return the number of characters that both texts begin with, by bisection: texts may have millions."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low
