"""Records of ShareGPT, OpenAI messages, Alpaca and similar layouts -> conversations."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastchat_qlora.config.validation.json_flags import find_template_kwargs_errors
from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord
from fastchat_qlora.data.sources.fields.calls import read_tools
from fastchat_qlora.data.sources.fields.names import ID_FIELDS, KWARGS_FIELD
from fastchat_qlora.data.sources.fields.turns import check_fit, read_messages, rename_columns
from fastchat_qlora.data.sources.fields.values import describe, parse_json_text, reject, write_json

MAX_RECORD_CHARACTERS = 10_000_000  # millions of tokens, more than any model attends to
MAX_MESSAGES = 1_000  # the work of checking a chat template grows with its square

NO_COLUMNS: Mapping[str, str] = MappingProxyType({})


def parse_record(value: Any) -> Any:
    """Return the value of a RawRecord, with a line parsed.

    Raises:
        RejectedRecord: it is one, or the line is not JSON in UTF-8.
    """
    if isinstance(value, RejectedRecord):
        raise value
    if not isinstance(value, bytes):
        return value
    try:
        return json.loads(value.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RejectedRecord(f"not a line of JSON in UTF-8: {error}") from error


def get_id(record: Any) -> str | None:
    """Return the record's own id, if it has one."""
    if not isinstance(record, dict):
        return None
    identity = next((record[key] for key in ID_FIELDS if record.get(key) is not None), None)
    try:
        return None if identity is None else str(identity).encode("utf-8", "backslashreplace").decode("utf-8")[:200]
    except RecursionError:
        return None


def to_conversation(record: Any, columns: Mapping[str, str] = NO_COLUMNS, system_prompt: str = "") -> Conversation:
    """Return the conversation of a parsed record, without assistant messages that open it, which FastChat leaves out.

    Args:
        columns: field of the record -> the role or the known field that it is.
        system_prompt: system message of a record that has none.

    Raises:
        RejectedRecord: the record is not a conversation with an answer.
    """
    if not isinstance(record, dict):
        raise RejectedRecord(f"the record is not an object: found {describe(record)}; expected an object with fields")
    try:
        record = rename_columns(record, columns) if columns else record
        check_fit(record)
        messages, tools = read_messages(record, system_prompt), read_tools(record)
        kwargs = _read_template_kwargs(record)
    except RecursionError as error:
        raise RejectedRecord("nested too deep") from error
    first = 1 if messages[0].role == "system" else 0
    while len(messages) > first and messages[first].role == "assistant":
        del messages[first]
    if not any(message.role == "assistant" for message in messages):
        raise RejectedRecord("no answer: found no assistant's message after a user's; expected one")
    _check_size(messages, tools)
    return Conversation(messages, tools, kwargs)


def _read_template_kwargs(record: dict[str, Any]) -> Mapping[str, Any]:
    """Return the template's arguments from an object, or from its JSON text in a table."""
    kwargs = record.get(KWARGS_FIELD)
    if isinstance(kwargs, str):
        kwargs = parse_json_text(kwargs or "{}", KWARGS_FIELD)
    if kwargs is None:
        return Conversation(()).chat_template_kwargs
    if not isinstance(kwargs, dict):
        raise reject(KWARGS_FIELD, kwargs, "an object with arguments of the chat template, or that as JSON text")
    for error in find_template_kwargs_errors(kwargs):
        raise RejectedRecord(f"{KWARGS_FIELD}: {error}")
    write_json(kwargs, KWARGS_FIELD)
    return kwargs


def _check_size(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    if len(messages) > MAX_MESSAGES:
        raise RejectedRecord(f"{len(messages)} messages, more than {MAX_MESSAGES}")
    size = sum(len(one.content) + len(one.reasoning) + len(str(one.tool_calls or "")) for one in messages)
    size += len(str(tools or ""))
    if size > MAX_RECORD_CHARACTERS:
        raise RejectedRecord(f"{size} characters, more than {MAX_RECORD_CHARACTERS}")
