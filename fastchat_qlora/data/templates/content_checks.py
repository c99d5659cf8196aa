"""Checks that a rendered text contains an assistant's message in full."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from fastchat_qlora.data.conversation import Message, RejectedRecord
from fastchat_qlora.data.templates.sentinels import SENTINEL, make_sentinel

WRITTEN_SENTINELS = re.compile(f"(?:{SENTINEL}|{re.escape(json.dumps(SENTINEL)[1:-1])})(\\d+)")  # as is, or as JSON
TAG = re.compile(r"</?[A-Za-z_|][^<>\s]*>|\[/?[A-Z_]+\]")  # as templates set thoughts and calls apart


def split_at_tags(text: str) -> list[list[str]]:
    """Return the tags of a text, and the text between them without surrounding blanks."""
    return [TAG.findall(text), [piece.strip() for piece in TAG.split(text)]]


def get_variants(content: str) -> Iterator[str]:
    """Yield the forms in which templates write a content: most leave it, many trim it."""
    yield content
    yield from (content.strip(), content.strip("\n"), content.lstrip("\n"), content.lstrip(), content.rstrip())


def contains(text: str, part: str) -> bool:
    """Return whether a text contains a part, as it is or as JSON writes it."""
    forms = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
    return any(form in text for form in forms)


def check_structure(message: Message, supervised: str, render: Callable[[Message], str]) -> None:
    """Require that reasoning, content, names and arguments are written by the template, inside the supervised text.

    The same words may be in the content too, so each part must also appear when it is replaced by a sentinel.

    Args:
        render: renders the conversation up to the message, with another one in its place.

    Raises:
        RejectedRecord: a part is missing.
    """
    parts: list[Any] = []
    reasoning = _replace_leaves(message.reasoning, parts) if message.reasoning else ""
    calls = [{**call, "function": _replace_leaves(call["function"], parts, keys=False)} for call in message.tool_calls]
    replaced = message._replace(reasoning=reasoning, tool_calls=tuple(calls))
    written = {int(number) for number in WRITTEN_SENTINELS.findall(render(replaced))}
    missing = [part for i, part in enumerate(parts) if i not in written or not contains(supervised, _to_text(part))]
    missing += [] if contains(supervised, message.content.strip()) else [message.content.strip()]
    if missing:
        raise RejectedRecord(f"the chat template does not write {str(missing[0])[:40]!r} of the message")


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
