"""What a chat template writes around messages, found once for all conversations with the same sequence of roles."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fastchat_qlora.data.conversation import Message, Segment

PROBE = "\ufdd0"  # Unicode's noncharacters, which stand in for contents; records that hold one are rejected
PROBE_END = "\ufdd1"
PROBES = re.compile(f"{PROBE}(\\d+){PROBE_END}")
WRITTEN_PROBES = re.compile(f"(?:{PROBE}|{re.escape(json.dumps(PROBE)[1:-1])})(\\d+)")  # as they are, or as JSON


class PlacedTurn(Protocol):
    """An assistant's message in a text: where it begins and ends, and whether it is learnt from there."""

    @property
    def index(self) -> int: ...  # noqa: D102
    @property
    def start(self) -> int: ...  # noqa: D102
    @property
    def end(self) -> int: ...  # noqa: D102
    @property
    def is_learnt(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Slot:
    """A part of an outline: fixed text, or the place of a message's content.

    Attributes:
        text: the fixed text.
        index: of the message whose content stands here; -1 for fixed text.
        turn: of the assistant's message whose turn this is a part of; -1 for none.
        is_learnt: whether that turn is learnt from this text.
        ends: whether the turn ends with this part.
    """

    text: str
    index: int = -1
    turn: int = -1
    is_learnt: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Outline:
    """One text of all conversations with the same roles.

    Attributes:
        count: how many of the messages stand in it.
        slots: its parts, in order.
        unplaced: assistant's messages among them that are somewhere in the text and could not be found.
        closing: the token that ends the last turn, where the template writes it with the next message only.
    """

    count: int
    slots: list[Slot]
    unplaced: list[int]
    closing: str = ""


def numbered_probe(number: int) -> str:
    """Text that can be found again in any text."""
    return f"{PROBE}{number}{PROBE_END}"


def probe(message: Message, index: int) -> Message:
    """A stand-in for a message, whose content can be found again in any text."""
    return Message(message.role, numbered_probe(index), extra=message.extra, learn=message.learn)


def make_outline(count: int, text: str, turns: Sequence[PlacedTurn], unplaced: list[int], closing: str = "") -> Outline:
    """Cut a text of probes at its probes and at the edges of turns; for the arguments see Outline and PlacedTurn."""
    slots: list[Slot] = []
    position = 0
    for turn in turns:
        slots += _slots(text[position : turn.start])
        own = _slots(text[turn.start : turn.end])
        slots += [replace(slot, turn=turn.index, is_learnt=turn.is_learnt) for slot in own]
        slots[-1] = replace(slots[-1], ends=True)
        position = turn.end
    return Outline(count, slots + _slots(text[position:]), unplaced, closing)


def _slots(text: str) -> list[Slot]:
    parts = PROBES.split(text)
    slots = [Slot("", int(part)) if i % 2 else Slot(part) for i, part in enumerate(parts)]
    return [slot for slot in slots if slot.text or slot.index >= 0]


def fill(outline: Outline, messages: Sequence[Message], text: str) -> list[Segment] | None:
    """The segments of an outline with these messages, if they make up `text`; None if the template does more."""
    if any(not messages[i].learn for i in outline.unplaced):
        return None
    contents = [message.content for message in messages]
    for said in (contents, [content.strip() for content in contents]):
        parts = [slot.text if slot.index < 0 else said[slot.index] for slot in outline.slots]
        if "".join(parts) == text + outline.closing:
            return list(_join(outline.slots, parts, messages))
    return None


def _join(slots: Sequence[Slot], parts: Sequence[str], messages: Sequence[Message]) -> Iterator[Segment]:
    gathered: list[str] = []
    turn = -1
    for slot, part in zip(slots, parts, strict=True):
        if slot.turn != turn and gathered:
            yield Segment("".join(gathered))
            gathered = []
        turn = slot.turn
        gathered.append(part)
        if slot.ends:
            learn = messages[turn].learn
            yield Segment("".join(gathered), slot.is_learnt and learn, ends_turn=True, withheld=not learn)
            gathered, turn = [], -1
    if gathered:
        yield Segment("".join(gathered))
