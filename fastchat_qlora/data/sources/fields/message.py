"""One message of a record -> a Message."""

import re
from typing import Any, NamedTuple

from fastchat_qlora.data.conversation import REASONING_FIELDS, Message, RejectedRecord, Role
from fastchat_qlora.data.sources.fields.calls import get_calls, read_calls
from fastchat_qlora.data.sources.fields.names import (
    CALL_ROLES,
    CONTENT_FIELDS,
    MEDIA_FIELDS,
    ROLES,
    TEXT_ROLES,
)
from fastchat_qlora.data.sources.fields.values import check_text, describe, is_filled, is_given, reject, write_json
from fastchat_qlora.data.sources.fields.weights import read_weight

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning", "reasoning_text", "thought")
MEDIA_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url")
CALL_PARTS = ("tool_call", "function_call")
PART_FIELDS = ("text", "value", "content", "thinking", "reasoning")
A_MESSAGE = "an object with role and content, or from and value"
TEXT_ONLY = "text only, which a run trains on"
THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


class Content(NamedTuple):
    """The content of a message: its text, and of the assistant's its thoughts and its calls."""

    text: str
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()


def read_message(turn: Any) -> Message:
    """Return a message; nearly all of them take the fast path.

    Raises:
        RejectedRecord: the reason, without the message's number.
    """
    if isinstance(turn, dict) and len(turn) == 2:
        names = ("from", "value") if "from" in turn else ("role", "content")
        name, content = turn.get(names[0]), turn.get(names[1])
        role = TEXT_ROLES.get(name) if isinstance(name, str) else None
        if role is not None and isinstance(content, str) and content and not content.isspace():
            return Message(role, check_text(content))
    return _read_any_message(turn)


def check_text_only(fields: dict[str, Any]) -> None:
    """Raise RejectedRecord if a record or a message has images, sounds or videos."""
    for field in MEDIA_FIELDS:
        if is_filled(fields.get(field)):
            raise reject(field, fields[field], TEXT_ONLY)


def _read_any_message(turn: Any) -> Message:
    role, name = _read_role(turn)
    check_text_only(turn)
    field = next((field for field in CONTENT_FIELDS if turn.get(field) is not None), None)
    field = field or next((field for field in CONTENT_FIELDS if field in turn), "content")
    weight = read_weight(turn)
    reasoning = _read_reasoning(turn)
    if role == "assistant":
        content = _read_call_text(turn, field) if name in CALL_ROLES else _read_answer(turn, field)
        if reasoning and content.reasoning not in ("", reasoning):
            raise RejectedRecord(f"found thoughts in {field} and others in a field of their own; expected one of them")
        weight = 1.0 if weight is None else weight
        text = _drop_repeated_thought(content.text, reasoning)
        return Message(role, text, reasoning or content.reasoning, content.calls, weight=weight)
    calls = get_calls(turn)
    if reasoning or calls:
        found = "thoughts" if reasoning else "tool calls"
        raise RejectedRecord(f"found {found} in a message of the {role}; expected them in the assistant's only")
    text = _read_result(turn.get(field), field) if role == "tool" else _read_content(turn.get(field), field).text
    return Message(role, text, extra=_read_extra(turn), unused_weight=weight)


def _read_role(turn: Any) -> tuple[Role, str]:
    """Return a message's role, and its name in the record."""
    if not isinstance(turn, dict):
        raise RejectedRecord(f"found {describe(turn)}; expected {A_MESSAGE}")
    name = turn["role"] if turn.get("role") is not None else turn.get("from")
    if name is None and not {"role", "from"}.isdisjoint(turn):
        raise reject("role" if "role" in turn else "from", None, f"one of {', '.join(ROLES)}")
    if name is None:
        raise RejectedRecord(f"no role: found {describe(turn)}; expected {A_MESSAGE}")
    lowered = name.lower() if isinstance(name, str) else ""
    if lowered not in ROLES:
        raise RejectedRecord(f"unknown role: found {describe(name)}; expected one of {', '.join(ROLES)}")
    return ROLES[lowered], lowered


def _read_answer(turn: dict[str, Any], field: str) -> Content:
    """Return the content of an assistant's message, with its calls."""
    calls = read_calls(get_calls(turn))
    value = turn.get(field)
    content = Content("") if value is None else _read_content(value, field, is_answer=True)
    if calls and content.calls:
        raise RejectedRecord(f"found tool calls in {field} and beside it; expected one of them")
    calls = calls or content.calls
    if not content.text.strip() and not calls:
        thoughts = ", with thoughts only" if content.reasoning or _read_reasoning(turn) else ""
        raise RejectedRecord(f"empty answer{thoughts}: {field}: found {describe(value)}; expected text or a tool call")
    return content._replace(calls=calls)


def _read_call_text(turn: dict[str, Any], field: str) -> Content:
    """Return the calls of a message that is nothing else, as an object or as JSON text, perhaps behind a thought."""
    value = turn.get(field)
    thought = THOUGHT.match(value) if isinstance(value, str) else None
    if not isinstance(value, str) or thought is None:
        return Content("", calls=read_calls(value, field))
    return Content("", check_text(thought.group(1).strip(), field), read_calls(value[thought.end() :], field))


def _drop_repeated_thought(text: str, reasoning: str) -> str:
    """Return a content without the thought in tags that is in a field too: it would be supervised twice."""
    written = THOUGHT.match(text) if reasoning else None
    if written is None or written.group(1).strip() != reasoning.strip():
        return text
    return text[written.end() :].lstrip() or text


def _read_reasoning(turn: dict[str, Any]) -> str:
    """Return the thoughts that a message has in a field of their own."""
    given = {field: turn[field] for field in REASONING_FIELDS if is_given(turn.get(field))}
    texts = {_read_content(value, field).text for field, value in given.items()}
    if len(texts) > 1:
        raise RejectedRecord(f"found different thoughts in {' and '.join(given)}; expected one of them")
    return texts.pop() if texts else ""


def _read_result(value: Any, field: str) -> str:
    """Return the result of a tool as text; values of other kinds as JSON."""
    types = [part.get("type") if isinstance(part, dict) else None for part in value] if isinstance(value, list) else []
    is_parts = bool(types) and all(kind in TEXT_PARTS for kind in types)
    if isinstance(value, str) or value is None or is_parts or any(kind in MEDIA_PARTS for kind in types):
        return _read_content(value, field).text
    return write_json(value, field)


def _read_extra(turn: dict[str, Any]) -> dict[str, str]:
    given = {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
    return {key: _read_name(value, key) for key, value in given.items()}


def _read_name(value: Any, field: str) -> str:
    if isinstance(value, str | int):
        return check_text(str(value), field)
    raise reject(field, value, "text")


def _read_content(value: Any, field: str, *, is_answer: bool = False) -> Content:
    """Return the content of a message from text or a list of parts; thoughts and calls only of an answer."""
    if isinstance(value, str):
        return Content(check_text(value, field if field not in CONTENT_FIELDS else ""))
    if not isinstance(value, list):
        raise reject(field, value, "text or a list of parts")
    content = Content("")
    for i, part in enumerate(value):
        content = _add_part(content, part, f"{field}, part {i}", is_answer=is_answer)
    return content


def _add_part(content: Content, part: Any, place: str, *, is_answer: bool) -> Content:
    """Return a content with one more part.

    Raises:
        RejectedRecord: the part is of another type, or stands where no template writes it.
    """
    kind = part.get("type") or "text" if isinstance(part, dict) else "text"
    if isinstance(part, dict) and not {"role", "from"}.isdisjoint(part):
        raise reject(place, part, "text, or a part with type and text, and no message")
    if kind in TEXT_PARTS:
        text = _read_part_text(part, place)
        if content.calls and text.strip():
            raise RejectedRecord(f"{place}: found text after a tool call; expected calls at the end")
        return content._replace(text=content.text + text)
    if is_answer and kind in REASONING_PARTS:
        if content.text.strip() or content.calls:
            raise RejectedRecord(f"{place}: found a thought after text or a call; expected thoughts first")
        return content._replace(reasoning=content.reasoning + _read_part_text(part, place))
    if is_answer and kind in CALL_PARTS:
        value = part.get("value") if part.get("value") is not None else part.get(kind, part)
        return content._replace(calls=(*content.calls, *read_calls(value, place)))
    kinds = "text, thinking, reasoning or tool_call" if is_answer else "text"
    raise RejectedRecord(f"{place}: found the type {str(kind)[:40]!r}; expected {kinds}")


def _read_part_text(part: Any, place: str) -> str:
    """Return the text of a part, which may consist of parts itself (a thought of Mistral's)."""
    if isinstance(part, str):
        return check_text(part)
    if not isinstance(part, dict):
        raise reject(place, part, "text, or an object with type and text")
    text = next((part[field] for field in PART_FIELDS if part.get(field) is not None), None)
    if isinstance(text, list):
        return "".join(_read_part_text(inner, place) for inner in text)
    if not isinstance(text, str):
        raise reject(place, part if text is None else text, "a part with text")
    return check_text(text)
