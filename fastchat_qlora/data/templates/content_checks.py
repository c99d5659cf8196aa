"""Whether a text says what a message of the assistant says."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from fastchat_qlora.data.conversation import Message, RejectedRecord
from fastchat_qlora.data.templates.template_cache import WRITTEN_PROBES, numbered_probe

TAG = re.compile(r"</?[A-Za-z_|][^<>\s]*>|\[/?[A-Z_]+\]")  # as templates set thoughts and calls apart


def split_at_tags(text: str) -> list[list[str]]:
    """The tags of a text, and what stands between them without the blanks beside them."""
    return [TAG.findall(text), [piece.strip() for piece in TAG.split(text)]]


def get_variants(content: str) -> Iterator[str]:
    """What templates make of a content: most leave it, many trim it."""
    yield content
    yield content.strip()
    yield content.strip("\n")
    yield content.lstrip("\n")
    yield content.lstrip()
    yield content.rstrip()


def count_common(first: str, second: str) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def mark_structure(message: Message) -> tuple[Message, list[str]]:
    """The message with a numbered probe for its reasoning and each name, argument and value of its calls, and these.

    Their words may stand in the content too, so that finding them in a text says little.
    """
    parts: list[str] = []
    calls = [{**call, "function": _mark(call["function"], parts, names=False)} for call in message.tool_calls]
    reasoning = _mark(message.reasoning, parts) if message.reasoning else ""
    return message._replace(reasoning=reasoning, tool_calls=tuple(calls)), parts


def _mark(value: Any, parts: list[str], *, names: bool = True) -> Any:
    """A value with a probe for each of its parts, which are added to these; its own names may be left as they are."""
    if isinstance(value, dict):
        return {_mark(str(key), parts) if names else key: _mark(item, parts) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark(item, parts) for item in value]
    parts.append(str(value))
    return numbered_probe(len(parts) - 1)


def check_structure(message: Message, spoken: str, render: Callable[[Message], str], index: int) -> None:
    """Reasoning, content, names and arguments must all be written by the template, and stand in what is to be learnt.

    Args:
        message: the assistant's message.
        spoken: what is to be learnt of it.
        render: the text of the conversation up to it, with another message in its place.
        index: of the message.

    Raises:
        RejectedRecord: one of them does not.
    """
    parts = [message.reasoning.strip(), message.content.strip()]
    for call in message.tool_calls:
        parts += [call["function"]["name"], *_leaves(call["function"]["arguments"])]
    missing = [part for part in dict.fromkeys(parts) if not stands_in(part, spoken)]
    marked, marked_parts = mark_structure(message)
    written = {int(number) for number in WRITTEN_PROBES.findall(render(marked))}
    missing += [part for number, part in enumerate(marked_parts) if number not in written]
    if missing:
        raise RejectedRecord(
            f"message {index}: the chat template does not write {missing[0][:40]!r}, which is said there"
        )


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def stands_in(part: str, text: str) -> bool:
    """Whether a part of what is said stands in a text, as it is or as JSON writes it."""
    forms = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
    return any(form in text for form in forms)
