"""Files -> messages. Foreign formats end at this door; what cannot be read is set aside with file, line and reason."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastchat_qlora.data.conversation import Message, RejectedRecord, Role
from fastchat_qlora.errors import UserError

# The names that published data sets use for the participants of a conversation.
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class Source(NamedTuple):
    """Where a record stands: its file, its line (JSON Lines) or number (JSON array) from 1, and its own id."""

    file: str
    line: int
    id: str | None = None


class Conversation(NamedTuple):
    """A record that was understood."""

    source: Source
    messages: list[Message]


class Rejection(NamedTuple):
    """A record that was not."""

    source: Source
    reason: str


def read_conversations(path: str, flag: str = "--data_path") -> Iterator[Conversation | Rejection]:
    """Read a file of ShareGPT records, a JSON array or JSON Lines by its name; `flag` is named in errors.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    records = _json_lines(path, flag) if path.endswith((".jsonl", ".ndjson")) else _json_array(path, flag)
    for source, record in records:
        if isinstance(record, RejectedRecord):
            yield Rejection(source, str(record))
            continue
        source = source._replace(id=_record_id(record))
        try:
            yield Conversation(source, to_messages(record))
        except RejectedRecord as error:
            yield Rejection(source, str(error))


def _json_array(path: str, flag: str) -> Iterator[tuple[Source, Any]]:
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error.strerror}; give a file you may read") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path}: not valid JSON: {error}; JSON Lines files end in .jsonl") from error
    if not isinstance(records, list):
        kind = "an object" if isinstance(records, dict) else f"a {type(records).__name__}"
        raise UserError(f"{flag} {path}: holds {kind}, must hold an array of records; JSON Lines end in .jsonl")
    for number, record in enumerate(records, 1):
        yield Source(path, number), record


def _json_lines(path: str, flag: str) -> Iterator[tuple[Source, Any]]:
    """Records, or for a line that cannot be read a RejectedRecord in the record's place."""
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error.strerror}; give a file you may read") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            record: Any
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                record = RejectedRecord(f"not a line of JSON in UTF-8: {error}")
            yield Source(path, number), record


def _record_id(record: Any) -> str | None:
    identity = record.get("id") if isinstance(record, dict) else None
    return None if identity is None else str(identity).encode("utf-8", "backslashreplace").decode("utf-8")


def to_messages(record: Any) -> list[Message]:
    """Understand one ShareGPT record, `{"conversations": [{"from": ..., "value": ...}, ...]}`.

    An assistant's opening line that answers nobody is left out, as FastChat does.

    Raises:
        RejectedRecord: the record is no conversation with something to learn.
    """
    if not isinstance(record, dict):
        raise RejectedRecord("the record is not an object")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RejectedRecord("no turns: 'conversations' must be a list of {from, value}")
    messages = [_to_message(turn, i) for i, turn in enumerate(turns)]
    first = 1 if messages[0].role == "system" else 0
    while len(messages) > first and messages[first].role == "assistant":
        del messages[first]
    if not any(message.role == "assistant" for message in messages):
        raise RejectedRecord("no answer: the conversation has no assistant turn after a user's")
    return messages


def _to_message(turn: Any, index: int) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise RejectedRecord(f"message {index}: must be an object with text in 'from' and 'value'")
    role = ROLES.get(str(turn.get("from")).lower())
    if role is None:
        raise RejectedRecord(f"message {index}: unknown role {turn.get('from')!r}; known are {', '.join(ROLES)}")
    if role == "assistant" and not turn["value"].strip():
        raise RejectedRecord(f"message {index}: empty answer")
    if any("\ud800" <= character <= "\udfff" for character in turn["value"]):
        raise RejectedRecord(f"message {index}: holds half of a surrogate pair, which is no character")
    return Message(role, turn["value"])
