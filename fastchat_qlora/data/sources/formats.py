"""Records of ShareGPT, OpenAI messages and Alpaca -> conversations."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord, Role
from fastchat_qlora.data.templates.sentinels import SENTINEL, SENTINEL_END

CALL_ROLES = ("function_call", "tool_call")  # whose text is the call, as JSON
ROLE_NAMES: dict[Role, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "model", "chatgpt", "bot", *CALL_ROLES),
    "tool": ("tool", "function", "observation", "tool_response", "ipython"),
}
"""Role -> its names in published data sets."""

ROLES = {name: role for role, names in ROLE_NAMES.items() for name in names}
TEXT_ROLES = {name: role for name, role in ROLES.items() if name not in CALL_ROLES}

ID_FIELDS = ("id", "conversation_id", "prompt_id")
TURN_FIELDS = ("messages", "conversations", "conversation")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
FIELDS = {*ID_FIELDS, *TURN_FIELDS, "system", "tools", "functions", "instruction", "input", "output", "history"}

MAX_RECORD_CHARACTERS = 10_000_000  # millions of tokens, more than any model attends to
MAX_MESSAGES = 1_000  # the work of checking a chat template grows with its square
NO_TEXT = "must be an object with text in 'from' and 'value', or role and content"


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


def to_conversation(record: Any) -> Conversation:
    """Return the conversation of a parsed record, without assistant messages that open it, which FastChat leaves out.

    Raises:
        RejectedRecord: the record is not a conversation with an answer.
    """
    if not isinstance(record, dict):
        raise RejectedRecord("the record is not an object")
    try:
        messages, tools = _read_messages(record), _read_tools(record)
    except RecursionError as error:
        raise RejectedRecord("nested too deep") from error
    first = 1 if messages[0].role == "system" else 0
    while len(messages) > first and messages[first].role == "assistant":
        del messages[first]
    if not any(message.role == "assistant" for message in messages):
        raise RejectedRecord("no answer: the conversation has no assistant turn after a user's")
    _check_size(messages, tools)
    return Conversation(messages, tools)


def _check_size(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    if len(messages) > MAX_MESSAGES:
        raise RejectedRecord(f"{len(messages)} messages, more than {MAX_MESSAGES}")
    size = sum(len(one.content) + len(one.reasoning) + len(str(one.tool_calls or "")) for one in messages)
    size += len(str(tools or ""))
    if size > MAX_RECORD_CHARACTERS:
        raise RejectedRecord(f"{size} characters, more than {MAX_RECORD_CHARACTERS}")


def _read_messages(record: dict[str, Any]) -> list[Message]:
    turns = next((record[key] for key in TURN_FIELDS if record.get(key)), None)
    if turns is None and "instruction" in record:
        turns = _get_alpaca_turns(record)
    if not isinstance(turns, list) or not turns:
        raise RejectedRecord(
            "no turns: must have 'conversations' (a list of {from, value}), 'messages' (a list of {role, content}), or "
            "'instruction' and 'output'"
        )
    messages = []
    for i, turn in enumerate(turns):
        try:
            messages.append(_read_message(turn))
        except RejectedRecord as error:
            raise RejectedRecord(f"message {i}: {error}") from error
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise RejectedRecord("'system' must be text")
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", _read_text(system, "'system': ")))
    elif system and messages[0].content != system:
        raise RejectedRecord("'system' and the first message are system messages that differ")
    return messages


def _get_alpaca_turns(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pairs of `history`, and `instruction` with `input` below it and `output`."""
    if "output" not in record:
        raise RejectedRecord("'instruction' without 'output': there is no answer under that name")
    texts = {key: record.get(key) or "" for key in ("instruction", "input", "output")}
    wrong = [key for key, text in texts.items() if not isinstance(text, str)]
    if wrong:
        raise RejectedRecord(f"{wrong[0]!r} must be text")
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RejectedRecord("'history' must be a list of [question, answer]")
    question = "\n".join(filter(None, (texts["instruction"], texts["input"])))
    return [
        {"role": role, "content": content}
        for pair in [*pairs, (question, texts["output"])]
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _read_message(turn: Any) -> Message:
    """Return a message; nearly all of them take the fast path."""
    if isinstance(turn, dict) and len(turn) == 2:
        names = ("from", "value") if "from" in turn else ("role", "content")
        name, content = turn.get(names[0]), turn.get(names[1])
        role = TEXT_ROLES.get(name) if isinstance(name, str) else None
        if role is not None and isinstance(content, str) and content and not content.isspace():
            return Message(role, _read_text(content))
    return _read_any_message(turn)


def _read_any_message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RejectedRecord(NO_TEXT)
    name = turn["role"] if turn.get("role") is not None else turn.get("from")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    role_name = name.lower() if isinstance(name, str) else ""
    role = ROLES.get(role_name)
    if role is None:
        raise RejectedRecord(f"unknown role {_short(name)}; known are {', '.join(ROLES)}")
    tool_calls = _read_calls(content if role_name in CALL_ROLES else _get_calls(turn))
    is_answer = role == "assistant"
    if role_name in CALL_ROLES or (content is None and is_answer and tool_calls):
        content = ""
    text = _read_text(content)
    if is_answer and not text.strip() and not tool_calls:
        raise RejectedRecord("empty answer")
    reasoning = next((turn[key] for key in REASONING_FIELDS if turn.get(key)), "")
    return Message(
        role,
        text,
        reasoning=_read_text(reasoning) if is_answer else "",
        tool_calls=tool_calls if is_answer else (),
        extra={} if is_answer else _read_extra(turn),
        weight=float(_read_flag(turn)),
    )


def _read_extra(turn: dict[str, Any]) -> dict[str, str]:
    given = {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
    return {key: _read_text(str(value) if isinstance(value, int) else value) for key, value in given.items()}


def _short(value: Any) -> str:
    return repr(value if isinstance(value, str | int | float | None) else type(value).__name__)[:42]


def _read_text(content: Any, place: str = "") -> str:
    if isinstance(content, list):
        content = "".join(map(_read_part, content))
    if not isinstance(content, str):
        raise RejectedRecord(NO_TEXT)
    if not content.isascii():  # most are, and that is known without reading them
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RejectedRecord(f"{place}contains half of a surrogate pair, which is not a character") from error
        if SENTINEL in content or SENTINEL_END in content:
            raise RejectedRecord(f"{place}contains U+FDD0 or U+FDD1, which are not characters")
    return content


def _read_part(part: Any) -> str:
    is_text = not isinstance(part, dict) or part.get("type", "text") == "text"
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str) or not is_text:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise RejectedRecord(f"a content part must be text, not {str(kind)[:40]!r}")
    return text


def _read_flag(turn: dict[str, Any]) -> bool:
    """Return whether a message may be supervised by its `train` and `weight`."""
    flags = [turn[key] for key in ("train", "weight") if turn.get(key) is not None]
    for flag in flags:
        if not isinstance(flag, bool | int | float) or flag not in (0, 1):
            raise RejectedRecord(f"'train' or 'weight' must be 0 or 1, is {str(flag)[:40]!r}")
    return all(flags)


def _get_calls(turn: dict[str, Any]) -> Any:
    calls = turn.get("tool_calls") or []
    call = turn.get("function_call")  # OpenAI's older name for one call
    if calls and call:
        raise RejectedRecord("has both 'tool_calls' and 'function_call'; remove one of them")
    return [call] if call else calls


def _read_calls(calls: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(calls, str):
        calls = _parse_json(calls, "a tool call")
    return tuple(_read_call(call) for call in (calls if isinstance(calls, list) else [calls]))


def _read_call(call: Any) -> dict[str, Any]:
    """Return a tool call as chat templates expect it, with an object of arguments."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RejectedRecord("a tool call must have a function with a name")
    arguments = function.get("arguments")
    arguments = function.get("parameters", {}) if arguments is None else arguments
    if isinstance(arguments, str):
        arguments = _parse_json(arguments or "{}", "a tool call")
    if not isinstance(arguments, dict):
        raise RejectedRecord("a tool call's arguments must be an object")
    try:
        text = json.dumps([function["name"], arguments], ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:  # NaN; a timestamp of a Parquet file
        raise RejectedRecord(f"a tool call's arguments are not JSON: {error}") from error
    _read_text(text)
    identity = {"id": _read_text(call["id"])} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _parse_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RejectedRecord(f"{name} is not JSON: {error}") from error


def _read_tools(record: dict[str, Any]) -> list[Mapping[str, Any]]:
    tools = record.get("tools") or record.get("functions") or []
    if isinstance(tools, str):
        tools = _parse_json(tools, "'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RejectedRecord("'tools' must be a list of objects, or that as JSON")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    functions = [tool["function"] for tool in tools]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise RejectedRecord("'tools': a function must be an object with a name")
    try:
        _read_text(json.dumps(tools, ensure_ascii=False), "'tools': ")
    except TypeError as error:  # a timestamp of a Parquet file
        raise RejectedRecord(f"'tools' are not JSON: {error}") from error
    return tools
