"""Values of a record: their description in reasons, their text, and JSON."""

import json
from typing import Any

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.templates.sentinels import SENTINEL, SENTINEL_END

MAX_SHOWN = 40  # characters of a value
MAX_NAMES = 6  # fields of an object


def reject(field: str, value: Any, expected: str) -> RejectedRecord:
    """Build the rejection of a field's value: what was found there, and what is expected."""
    return RejectedRecord(f"{field}: found {describe(value)}; expected {expected}")


def describe(value: Any) -> str:
    """Return a value in a few words of JSON's language."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f"the text {value[:MAX_SHOWN]!r}" if value.strip() else "empty text"
    if isinstance(value, int | float):
        return f"the number {str(value)[:MAX_SHOWN]}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        names = [repr(name[:MAX_SHOWN])[1:-1] if isinstance(name, str) else str(name) for name in value]
        more = ", ..." if len(names) > MAX_NAMES else ""
        return f"an object with {', '.join(names[:MAX_NAMES])}{more}" if names else "an empty object"
    return f"a value of type {type(value).__name__}, which JSON does not have"


def is_given(value: Any) -> bool:
    """Return whether a field has a value; null and what is empty are none."""
    return value is not None and value not in ("", [], {})


def is_filled(value: Any) -> bool:
    """Return whether a field has a value that is not an empty list either, as a table of text writes it."""
    return is_given(value) and value not in ("[]", "{}", "null")


def check_text(text: str, field: str = "") -> str:
    """Return a text that a tokenizer can read and that has no sentinels."""
    if text.isascii():  # most are, and that is known without reading them
        return text
    place = f"{field}: " if field else ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RejectedRecord(f"{place}contains half of a surrogate pair, which is not a character") from error
    if SENTINEL in text or SENTINEL_END in text:
        raise RejectedRecord(f"{place}contains U+FDD0 or U+FDD1, which are not characters")
    return text


def read_text(value: Any, field: str, expected: str = "text") -> str:
    """Return the text of a field that may be null."""
    if value is not None and not isinstance(value, str):
        raise reject(field, value, expected)
    return check_text(value or "", field)


def write_json(value: Any, field: str) -> str:
    """Return a value as JSON; it comes from a file that may have more kinds of values, such as dates."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # a date, bytes or a decimal; or NaN
        raise RejectedRecord(f"{field}: found what is not JSON: {error}; expected JSON values only") from error
    return check_text(text, field)


def parse_json_text(text: str, field: str) -> Any:
    """Return the value of a JSON text."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise RejectedRecord(f"{field}: found text that is not JSON: {error}; expected JSON") from error
