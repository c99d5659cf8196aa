"""Whether a text says what a message of the assistant says."""

import json
import re
from collections.abc import Iterator
from typing import Any

from fastchat_qlora.data.conversation import Message, RejectedRecord

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


def check_structure(message: Message, spoken: str, index: int) -> None:
    """Reasoning, content, names and arguments must all stand in what is to be learnt.

    Raises:
        RejectedRecord: one of them does not.
    """
    parts = [message.reasoning.strip(), message.content.strip()]
    for call in message.tool_calls:
        parts += [call["function"]["name"], *_leaves(call["function"]["arguments"])]
    for part in parts:
        if not stands_in(part, spoken):
            raise RejectedRecord(
                f"message {index}: the chat template does not write {part[:40]!r}, which is said there"
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
