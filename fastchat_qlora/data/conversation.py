"""A record's messages, and segments of their text."""

from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought", "tool_plan")
"""Names that records and chat templates have for thoughts; the last is Cohere's for those before a call."""


class RejectionKind(Enum):
    """A group of reasons for rejection, with consequences of its own."""

    INVALID = "invalid"
    TOO_LONG = "too long"
    NOTHING_SUPERVISED = "nothing supervised"


class RejectedRecord(ValueError):
    """A record unfit for training, with the reason, as listed in rejected.jsonl."""

    def __init__(self, reason: str, kind: RejectionKind = RejectionKind.INVALID) -> None:
        super().__init__(reason)
        self.kind = kind
        self.message: int | None = None  # the index of the one at fault, where an answer cannot be rendered


class Message(NamedTuple):
    """One message; a tuple and no dataclass, for speed with millions of them."""

    role: Role
    content: str
    reasoning: str = ""  # of the assistant, before the content, where the record has it in a field of its own
    # Of the assistant, as {"type": "function", "function": {"name": ..., "arguments": {...}}}.
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = MappingProxyType({})  # for the chat template, such as a tool's name and the id of a call
    weight: float = 1.0  # of an assistant's tokens in the loss, from 0 (masked) to 1
    unused_weight: float | None = None  # that the record gives to a message of another role

    @property
    def train(self) -> bool:
        """Whether an assistant's message may be supervised."""
        return self.weight > 0

    @property
    def is_plain(self) -> bool:
        """Whether the message is its content and nothing else."""
        return not (self.reasoning or self.tool_calls or self.extra)

    def to_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content, **self.extra}
        if self.reasoning:
            fields |= dict.fromkeys(REASONING_FIELDS, self.reasoning)
        if self.tool_calls:
            fields["tool_calls"] = list(self.tool_calls)
        return fields


class Conversation(NamedTuple):
    """The messages of one record, and what its prompt is made with beside them."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()  # functions available to the assistant, as JSON Schema objects
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({})  # of the record, such as enable_thinking


class Segment(NamedTuple):
    """A piece of a conversation's text."""

    text: str
    supervised: bool = False  # its tokens are in the loss
    ends_turn: bool = False  # a whole assistant turn ends with it, so that the text may be cut after it
    begins_turn: bool = False  # the model begins to write here, behind its prompt
    weight: float = 1.0  # of its tokens in the loss, if they are supervised
