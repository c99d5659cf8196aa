"""Records -> conversations. Foreign formats end here: ShareGPT, OpenAI messages and Alpaca, mixed as they come."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord, Role
from fastchat_qlora.data.templates.template_skeleton import SENTINEL, SENTINEL_END

# The names that published data sets use for the participants of a conversation.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALLS = ("function_call", "tool_call")  # roles whose text is the call, as JSON

SPEAKERS = {name: role for name, role in ROLES.items() if name not in CALLS}

FIELDS = {
    *("id", "conversation_id", "prompt_id", "system", "tools", "functions"),
    *("messages", "conversations", "conversation"),
    *("instruction", "input", "output", "history"),
}
"""The fields of a record that are looked at."""

MOST_CHARACTERS = 10_000_000
"""In one record; millions of tokens, more than any model attends to."""

MOST_MESSAGES = 1_000
"""In one record; the work of checking a chat template grows with its square."""


def parse_record(value: Any) -> Any:
    """A raw record as a parsed one.

    Raises:
        RejectedRecord: it is a line that is not JSON in UTF-8, or no record at all.
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
    """The record's own name, if it has one."""
    if not isinstance(record, dict):
        return None
    identity = next(
        (record[key] for key in ("id", "conversation_id", "prompt_id") if record.get(key) is not None), None
    )
    try:
        return None if identity is None else str(identity).encode("utf-8", "backslashreplace").decode("utf-8")[:200]
    except RecursionError:
        return None


def to_conversation(record: Any) -> Conversation:
    """Understand one record.

    An assistant's opening line that answers nobody is left out, as FastChat does.

    Raises:
        RejectedRecord: the record is no conversation with something to learn.
    """
    if not isinstance(record, dict):
        raise RejectedRecord("the record is not an object")
    try:
        conversation = Conversation(_read_messages(record), _read_tools(record))
    except RecursionError as error:
        raise RejectedRecord("nested too deep") from error
    messages = list(conversation.messages)
    first = 1 if messages[0].role == "system" else 0
    while len(messages) > first and messages[first].role == "assistant":
        del messages[first]
    if not any(message.role == "assistant" for message in messages):
        raise RejectedRecord("no answer: the conversation has no assistant turn after a user's")
    _check_size(messages, conversation.tools)
    return Conversation(messages, conversation.tools)


def _check_size(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    if len(messages) > MOST_MESSAGES:
        raise RejectedRecord(f"{len(messages)} messages, more than {MOST_MESSAGES}")
    size = sum(len(one.content) + len(one.reasoning) + len(str(one.tool_calls or "")) for one in messages)
    size += len(str(tools or ""))
    if size > MOST_CHARACTERS:
        raise RejectedRecord(f"{size} characters, more than {MOST_CHARACTERS}")


def _read_messages(record: dict[str, Any]) -> list[Message]:
    turns = next((record[key] for key in ("messages", "conversations", "conversation") if record.get(key)), None)
    if turns is None and "instruction" in record:
        return _read_alpaca(record)
    if not isinstance(turns, list) or not turns:
        raise RejectedRecord(
            "no turns: must have 'conversations' (a list of {from, value}), 'messages' (a list of {role, content}), or "
            "'instruction' and 'output'"
        )
    messages = [_read_message(turn, i) for i, turn in enumerate(turns)]
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise RejectedRecord("'system' must be text")
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", _text(system, 0)))
    elif system and messages[0].content != system:
        raise RejectedRecord("two system messages that differ: 'system' and the first message")
    return messages


def _read_alpaca(record: dict[str, Any]) -> list[Message]:
    """`instruction` and `output`, with `input` below the instruction, after an optional `system` and `history`."""
    if "output" not in record:
        raise RejectedRecord("'instruction' without 'output': there is no answer under that name")
    texts = {key: record.get(key) or "" for key in ("system", "instruction", "input", "output")}
    wrong = [key for key, text in texts.items() if not isinstance(text, str)]
    if wrong:
        raise RejectedRecord(f"{wrong[0]!r} must be text")
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RejectedRecord("'history' must be a list of [question, answer]")
    question = "\n".join(filter(None, (texts["instruction"], texts["input"])))
    turns = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    for asked, answered in [*pairs, (question, texts["output"])]:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [_read_message(turn, i) for i, turn in enumerate(turns)]


def _read_message(turn: Any, index: int) -> Message:
    """Understand one message; the short way first, which nearly all messages can go."""
    if isinstance(turn, dict) and len(turn) == 2:
        name, content = (
            (turn.get("from"), turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
        )
        role = SPEAKERS.get(name) if isinstance(name, str) else None
        if role is not None and isinstance(content, str) and content and not content.isspace():
            return Message(role, _text(content, index))
    return _read_any_message(turn, index)


def _read_any_message(turn: Any, index: int) -> Message:
    if not isinstance(turn, dict):
        raise RejectedRecord(f"message {index}: must be an object with text in 'from' and 'value', or role and content")
    name = turn["role"] if turn.get("role") is not None else turn.get("from")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    speaker = name.lower() if isinstance(name, str) else ""
    role = ROLES.get(speaker)
    if role is None:
        raise RejectedRecord(f"message {index}: unknown role {_short(name)}; known are {', '.join(ROLES)}")
    calls = turn.get("tool_calls") or []
    if turn.get("function_call"):  # OpenAI's older name for one call
        if calls:
            raise RejectedRecord(f"message {index}: has 'tool_calls' and 'function_call'; one of them must go")
        calls = [turn["function_call"]]
    if speaker in CALLS:
        content, calls = "", content
    calls = _parse_json(calls, index) if isinstance(calls, str) else calls
    tool_calls = tuple(_read_call(call, index) for call in (calls if isinstance(calls, list) else [calls]))
    if content is None and role == "assistant" and tool_calls:
        content = ""
    text = _text(content, index)
    if role == "assistant" and not text.strip() and not tool_calls:
        raise RejectedRecord(f"message {index}: empty answer")
    reasoning = next((turn[key] for key in ("reasoning_content", "reasoning", "thinking") if turn.get(key)), "")
    return Message(
        role,
        text,
        reasoning=_text(reasoning, index) if role == "assistant" else "",
        tool_calls=tool_calls if role == "assistant" else (),
        extra={
            key: _text(str(turn[key]) if isinstance(turn[key], int) else turn[key], index)
            for key in ("name", "tool_call_id")
            if turn.get(key) and role != "assistant"
        },
        train=_read_flag(turn, index),
    )


def _short(value: Any) -> str:
    return repr(value if isinstance(value, str | int | float | None) else type(value).__name__)[:42]


def _text(content: Any, index: int) -> str:
    if isinstance(content, list):
        content = _join_parts(content, index)
    if not isinstance(content, str):
        raise RejectedRecord(f"message {index}: must be an object with text in 'from' and 'value', or role and content")
    if not content.isascii():  # most are, and that is told without reading them
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RejectedRecord(f"message {index}: holds half of a surrogate pair, which is no character") from error
        if SENTINEL in content or SENTINEL_END in content:  # chat templates are watched with them
            raise RejectedRecord(f"message {index}: holds U+FDD0 or U+FDD1, which is no character")
    return content


def _join_parts(parts: list[Any], index: int) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str) or (isinstance(part, dict) and part.get("type", "text") != "text"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RejectedRecord(f"message {index}: a content part is no text but {str(kind)[:40]!r}")
        texts.append(text)
    return "".join(texts)


def _read_flag(turn: dict[str, Any], index: int) -> bool:
    """`train` or `weight`: 0 leaves an assistant's message out of what is learnt. Others' messages never are."""
    flags = [turn[key] for key in ("train", "weight") if turn.get(key) is not None]
    for flag in flags:
        if not isinstance(flag, bool | int | float) or flag not in (0, 1):
            raise RejectedRecord(f"message {index}: 'train' or 'weight' must be 0 or 1, is {str(flag)[:40]!r}")
    return all(flags)


def _read_call(call: Any, index: int) -> dict[str, Any]:
    """One tool call in the form that chat templates expect: arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RejectedRecord(f"message {index}: a tool call must have a function with a name")
    arguments = function.get("arguments")
    arguments = function.get("parameters", {}) if arguments is None else arguments
    if isinstance(arguments, str):
        arguments = _parse_json(arguments or "{}", index)
    if not isinstance(arguments, dict):
        raise RejectedRecord(f"message {index}: a tool call's arguments must be an object")
    try:
        text = json.dumps([function["name"], arguments], ensure_ascii=False, allow_nan=False)
    except ValueError as error:  # NaN
        raise RejectedRecord(f"message {index}: a tool call's arguments are not JSON: {error}") from error
    _text(text, index)
    identity = {"id": _text(call["id"], index)} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _parse_json(text: Any, index: int) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise RejectedRecord(f"message {index}: a tool call is not JSON: {error}") from error


def _read_tools(record: dict[str, Any]) -> list[Mapping[str, Any]]:
    tools = record.get("tools") or record.get("functions") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RejectedRecord(f"'tools' is not JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RejectedRecord("'tools' must be a list of objects, or that as JSON")
    if tools:
        _text(json.dumps(tools, ensure_ascii=False), 0)
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    functions = [tool["function"] for tool in tools]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise RejectedRecord("'tools' holds a function that is not an object with a name")
    return tools
