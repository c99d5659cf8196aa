"""The text that a chat template writes around messages, found once for all conversations with the same roles.

A conversation whose contents are sentinels is rendered and cut at them:

    <|im_start|>user\n {content 0} <|im_end|>\n<|im_start|>assistant\n {content 1} <|im_end|>

With real contents in the slots this must equal what the template itself renders, or the skeleton does not apply.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fastchat_qlora.data.conversation import Message, Segment

SENTINEL = "\ufdd0"  # Unicode's noncharacters, which stand in for contents; records that hold one are rejected
SENTINEL_END = "\ufdd1"
SENTINELS = re.compile(f"{SENTINEL}(\\d+){SENTINEL_END}")
WRITTEN_SENTINELS = re.compile(f"(?:{SENTINEL}|{re.escape(json.dumps(SENTINEL)[1:-1])})(\\d+)")  # as is, or as JSON


class PlacedTurn(Protocol):
    """An assistant's message in a text: its start and end, and whether it is supervised there."""

    @property
    def index(self) -> int: ...  # noqa: D102
    @property
    def start(self) -> int: ...  # noqa: D102
    @property
    def end(self) -> int: ...  # noqa: D102
    @property
    def is_supervised(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Slot:
    """A part of a skeleton: fixed text, or the place of a message's content.

    Attributes:
        text: the fixed text.
        index: of the message whose content stands here; -1 for fixed text.
        turn: index of the assistant's message whose turn this is a part of; -1 for none.
        is_supervised: whether that turn is supervised in this text.
        ends_turn: whether the turn ends with this part.
    """

    text: str
    index: int = -1
    turn: int = -1
    is_supervised: bool = False
    ends_turn: bool = False


@dataclass(frozen=True)
class TemplateSkeleton:
    """One rendered text of all conversations with the same roles.

    Attributes:
        count: number of messages in it.
        slots: its parts, in order.
        unplaced: assistant's messages that are in the text and could not be located.
        closing: the token that ends the last turn, where the template writes it with the next message only.
    """

    count: int
    slots: list[Slot]
    unplaced: list[int]
    closing: str = ""


def make_sentinel(number: int) -> str:
    """Return a numbered string that can be found again in any text."""
    return f"{SENTINEL}{number}{SENTINEL_END}"


def replace_content(message: Message, index: int) -> Message:
    """Return the message with a numbered sentinel for its content."""
    return Message(message.role, make_sentinel(index), extra=message.extra, train=message.train)


def build_skeleton(
    count: int, text: str, turns: Sequence[PlacedTurn], unplaced: list[int], closing: str = ""
) -> TemplateSkeleton:
    """Cut a text of sentinels at its sentinels and at the edges of turns; for the arguments see TemplateSkeleton."""
    slots: list[Slot] = []
    position = 0
    for turn in turns:
        slots += _cut_at_sentinels(text[position : turn.start])
        own = _cut_at_sentinels(text[turn.start : turn.end])
        slots += [replace(slot, turn=turn.index, is_supervised=turn.is_supervised) for slot in own]
        slots[-1] = replace(slots[-1], ends_turn=True)
        position = turn.end
    return TemplateSkeleton(count, slots + _cut_at_sentinels(text[position:]), unplaced, closing)


def _cut_at_sentinels(text: str) -> list[Slot]:
    parts = SENTINELS.split(text)
    slots = [Slot("", int(part)) if i % 2 else Slot(part) for i, part in enumerate(parts)]
    return [slot for slot in slots if slot.text or slot.index >= 0]


def fill_skeleton(skeleton: TemplateSkeleton, messages: Sequence[Message], text: str) -> list[Segment] | None:
    """Return the segments of a text, or None if the skeleton with these messages is not that text."""
    if any(not messages[i].train for i in skeleton.unplaced):
        return None
    contents = [message.content for message in messages]
    for variant in (contents, [content.strip() for content in contents]):
        parts = [slot.text if slot.index < 0 else variant[slot.index] for slot in skeleton.slots]
        if "".join(parts) == text + skeleton.closing:
            return list(_join_slots(skeleton.slots, parts, messages))
    return None


def _join_slots(slots: Sequence[Slot], parts: Sequence[str], messages: Sequence[Message]) -> Iterator[Segment]:
    gathered: list[str] = []
    turn = -1
    for slot, part in zip(slots, parts, strict=True):
        if slot.turn != turn and gathered:
            yield Segment("".join(gathered))
            gathered = []
        turn = slot.turn
        gathered.append(part)
        if slot.ends_turn:
            train = messages[turn].train
            yield Segment("".join(gathered), slot.is_supervised and train, ends_turn=True, masked=not train)
            gathered, turn = [], -1
    if gathered:
        yield Segment("".join(gathered))
