"""The text that a chat template writes around contents, found once for all conversations with the same roles.

A conversation of sentinels is rendered and cut at them:

    <|im_start|>user\\n {content 0} <|im_end|>\\n<|im_start|>assistant\\n {content 1} <|im_end|>

With real contents in the slots this must equal what the template itself renders, or the skeleton does not apply.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from fastchat_qlora.data.conversation import Message, Segment
from fastchat_qlora.data.templates.assistant_spans import AssistantTurn, RenderedText, cut_into_segments
from fastchat_qlora.data.templates.sentinels import NUMBERED_SENTINEL


@dataclass(frozen=True)
class SkeletonTurn:
    """An assistant turn: the message's index, its slots from `first` up to `stop`, and whether it is supervised."""

    index: int
    first: int
    stop: int
    is_supervised: bool


@dataclass(frozen=True)
class TemplateSkeleton:
    """One rendered text of all conversations with the same roles.

    Attributes:
        count: number of messages in it.
        slots: fixed texts, and indices of messages whose content stands there.
        turns: the assistant's.
        unplaced: indices of assistant messages that are in the text and could not be located.
        closing: see RenderedText.
    """

    count: int
    slots: list[str | int]
    turns: list[SkeletonTurn]
    unplaced: list[int]
    closing: str = ""


def build_skeleton(rendered: RenderedText) -> TemplateSkeleton:
    """Cut a text of sentinels at its sentinels and at the edges of turns."""
    slots: list[str | int] = []
    turns = []
    position = 0
    for turn in rendered.turns:
        slots += _cut(rendered.text[position : turn.start])
        first = len(slots)
        slots += _cut(rendered.text[turn.start : turn.end])
        turns.append(SkeletonTurn(turn.index, first, len(slots), turn.is_supervised))
        position = turn.end
    slots += _cut(rendered.text[position:])
    return TemplateSkeleton(rendered.count, slots, turns, rendered.unplaced, rendered.closing)


def _cut(text: str) -> list[str | int]:
    parts = NUMBERED_SENTINEL.split(text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts) if part]


def fill_skeleton(skeleton: TemplateSkeleton, messages: Sequence[Message], text: str) -> list[Segment] | None:
    """Return the segments of a text, or None if the skeleton with these messages is not that text."""
    if any(not messages[i].train for i in skeleton.unplaced):
        return None
    text += skeleton.closing
    contents = [message.content for message in messages]
    for variant in (contents, [content.strip() for content in contents]):
        parts = [slot if isinstance(slot, str) else variant[slot] for slot in skeleton.slots]
        if "".join(parts) == text:
            ends = [0, *accumulate(map(len, parts))]
            turns = [
                AssistantTurn(turn.index, text, ends[turn.first], ends[turn.stop], is_supervised=turn.is_supervised)
                for turn in skeleton.turns
            ]
            return cut_into_segments(text, turns, messages)
    return None
