"""Sentinels: characters in place of contents, which show where a chat template writes these."""

import re

from fastchat_qlora.data.conversation import Message

SENTINEL = "\ufdd0"  # noncharacters of Unicode; records that contain one are rejected
SENTINEL_END = "\ufdd1"
NUMBERED_SENTINEL = re.compile(f"{SENTINEL}(\\d+){SENTINEL_END}")


def make_sentinel(number: int) -> str:
    """Return a numbered string that can be found in any text."""
    return f"{SENTINEL}{number}{SENTINEL_END}"


def replace_content(message: Message, index: int) -> Message:
    """Return the message with a numbered sentinel for its content."""
    return Message(message.role, make_sentinel(index), extra=message.extra, weight=message.weight)
