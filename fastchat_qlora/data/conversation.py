"""Conversations: messages as one record holds them, and segments of their text."""

from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]


class RejectionKind(Enum):
    """What follows from a rejection."""

    INVALID = "invalid"
    TOO_LONG = "too long"
    NOTHING_SUPERVISED = "nothing supervised"


class RejectedRecord(ValueError):
    """A record that cannot be trained on.

    Args:
        reason: as it is written to rejected.jsonl.
        kind: what follows from it.
    """

    def __init__(self, reason: str, kind: RejectionKind = RejectionKind.INVALID) -> None:
        super().__init__(reason)
        self.kind = kind


class Message(NamedTuple):
    """One participant's message. (A tuple: of these there are millions, and dataclasses take longer to make.)

    Attributes:
        role: of the participant.
        content: the text.
        reasoning: the assistant's thoughts before it, where the record keeps them apart.
        tool_calls: the functions that an assistant calls: `{"type": "function", "function": {"name", "arguments"}}`.
        extra: further fields for the chat template, such as the name or the call that a tool's result belongs to.
        train: whether an assistant's message may be supervised; False for `train: false` or `weight: 0`.
    """

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = MappingProxyType({})
    train: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether the message is its content and nothing else."""
        return not (self.reasoning or self.tool_calls or self.extra)

    def to_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content, **self.extra}
        if self.reasoning:
            fields |= {"reasoning_content": self.reasoning, "thinking": self.reasoning, "reasoning": self.reasoning}
        if self.tool_calls:
            fields["tool_calls"] = list(self.tool_calls)
        return fields


class Conversation(NamedTuple):
    """The content of one record.

    Attributes:
        messages: in order.
        tools: descriptions of the functions that the assistant may call, as JSON Schema objects.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()


class Segment(NamedTuple):
    """A piece of a conversation's text.

    Attributes:
        text: the piece.
        supervised: whether its labels are its tokens.
        ends_turn: whether a whole turn of the assistant ends with it; a text may be cut after it.
        masked: whether the record excludes this turn from the loss (`train: false`), even where all text is supervised.
    """

    text: str
    supervised: bool = False
    ends_turn: bool = False
    masked: bool = False
