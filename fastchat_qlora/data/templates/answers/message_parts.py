"""Parts of an assistant's message, and checks that a text contains them."""

import json
import re
from collections.abc import Iterator
from typing import Any

from fastchat_qlora.data.conversation import Message
from fastchat_qlora.data.templates.message_forms import WRITTEN_THOUGHT, split_thought
from fastchat_qlora.data.templates.sentinels import SENTINEL, SENTINEL_END, make_sentinel

WRITTEN_SENTINELS = re.compile(  # as they are, or as JSON writes them
    f"(?:{SENTINEL}|{re.escape(json.dumps(SENTINEL)[1:-1])})(\\d+)(?:{SENTINEL_END}|{re.escape(json.dumps(SENTINEL_END)[1:-1])})"
)
TAG = re.compile(r"</?[A-Za-z_|][^<>\s]*>|\[/?[A-Z_]+\]")  # as templates set thoughts and calls apart


def get_variants(content: str) -> Iterator[str]:
    """Yield the forms in which templates write a content: most leave it, many trim it."""
    yield content
    yield from (content.strip(), content.strip("\n"), content.lstrip("\n"), content.lstrip(), content.rstrip())


def contains(text: str, part: str) -> bool:
    """Return whether a text contains a part, as it is or as JSON writes it."""
    forms = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
    return any(form in text for form in forms)


def list_parts(message: Message) -> list[str]:
    """Return the content behind a thought, and the names and arguments of calls, as a text must contain them."""
    parts: list[Any] = []
    for call in message.tool_calls:
        _replace_leaves(call["function"], parts, keys=False)
    content = split_thought(message).content.strip()
    return [*([content] if content else []), *map(_to_text, parts)]


def replace_parts(message: Message) -> tuple[Message, int]:
    """Return a message with a numbered sentinel for each part, and their number; that of a thought is 0."""
    parts: list[Any] = []
    thought = split_thought(message)
    replaced = message
    if message.reasoning:
        replaced = replaced._replace(reasoning=_replace_leaves(message.reasoning, parts))
    elif thought.reasoning.strip() and (written := WRITTEN_THOUGHT.fullmatch(message.content)):
        before, between = message.content[: written.start("reasoning")], written["close"]
        blank = re.match(r"\s*", written["content"])
        behind = blank.group() if blank else ""
        replaced = replaced._replace(content=f"{before}\n{_replace_leaves('', parts)}\n{between}{behind}")
    if thought.content.strip():
        before = "" if replaced is message or message.reasoning else replaced.content
        replaced = replaced._replace(content=before + _replace_leaves(thought.content, parts))
    calls = [{**call, "function": _replace_leaves(call["function"], parts, keys=False)} for call in message.tool_calls]
    return replaced._replace(tool_calls=tuple(calls)), len(parts)


def _replace_leaves(value: Any, leaves: list[Any], *, keys: bool = True) -> Any:
    """Return a value with a sentinel for each leaf, and for each key unless `keys` is False; `leaves` collects them."""
    if isinstance(value, dict):
        items = value.items()
        return {_replace_leaves(key, leaves) if keys else key: _replace_leaves(item, leaves) for key, item in items}
    if isinstance(value, list):
        return [_replace_leaves(item, leaves) for item in value]
    leaves.append(value)
    return make_sentinel(len(leaves) - 1)


def _to_text(leaf: Any) -> str:
    """Return a leaf as a text must contain it; templates write true, false and null in many ways."""
    if isinstance(leaf, str):
        return leaf.strip()
    return "" if isinstance(leaf, bool | None) else json.dumps(leaf)
