"""Checks that a rendered text says what an assistant's message says."""

import json
import re
from collections.abc import Callable, Iterator
from os.path import commonprefix
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


def count_common(first: str, second: str) -> int:
    """Return the length of the common beginning."""
    return len(commonprefix([first, second]))  # noqa: RUF071  # by characters, as wanted


def replace_structure(message: Message) -> tuple[Message, list[str]]:
    """Return the message with a sentinel for its reasoning and each part of its calls, and the parts replaced.

    The same words may stand in the content too, so finding them in a text would prove little.
    """
    parts: list[str] = []
    calls = [{**call, "function": _replace_leaves(call["function"], parts, keys=False)} for call in message.tool_calls]
    reasoning = _replace_leaves(message.reasoning, parts) if message.reasoning else ""
    return message._replace(reasoning=reasoning, tool_calls=tuple(calls)), parts


def _replace_leaves(value: Any, parts: list[str], *, keys: bool = True) -> Any:
    """Return a value with a sentinel for each leaf, and for each key unless `keys` is False; `parts` collects them."""
    if isinstance(value, dict):
        items = value.items()
        return {_replace_leaves(str(key), parts) if keys else key: _replace_leaves(item, parts) for key, item in items}
    if isinstance(value, list):
        return [_replace_leaves(item, parts) for item in value]
    parts.append(str(value))
    return make_sentinel(len(parts) - 1)


def check_structure(message: Message, supervised: str, render: Callable[[Message], str]) -> None:
    """Require that reasoning, content, names and arguments are written by the template, inside the supervised text.

    Args:
        render: renders the conversation up to the message, with another one in its place.

    Raises:
        RejectedRecord: a part is missing.
    """
    parts = [message.reasoning.strip(), message.content.strip()]
    for call in message.tool_calls:
        parts += [call["function"]["name"], *_get_leaves(call["function"]["arguments"])]
    missing = [part for part in dict.fromkeys(parts) if not contains(supervised, part)]
    replaced, leaves = replace_structure(message)
    written = {int(number) for number in WRITTEN_SENTINELS.findall(render(replaced))}
    missing += [leaf for number, leaf in enumerate(leaves) if number not in written]
    if missing:
        raise RejectedRecord(f"the chat template does not write {missing[0][:40]!r} of the message")


def _get_leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _get_leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _get_leaves(item)
    elif isinstance(value, str):
        yield value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def contains(text: str, part: str) -> bool:
    """Return whether a part stands in a text, as it is or as JSON writes it."""
    forms = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
    return any(form in text for form in forms)
