"""Sequences -> whether their answers have thoughts."""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.conversation import Conversation, Segment
from fastchat_qlora.data.templates.answers.message_parts import contains
from fastchat_qlora.data.templates.message_forms import get_thought


class ThoughtKind(IntEnum):
    """The thoughts in the supervised answers of a sequence, as the column `thoughts` has them."""

    WITHOUT = 0
    WITH = 1  # of one answer at least
    EMPTY = 2  # an empty one, and no other


class ThoughtCounts(NamedTuple):
    """The numbers of sequences of each kind."""

    with_thoughts: int
    without: int
    empty: int

    def __str__(self) -> str:
        return f"{self.with_thoughts:,} with, {self.without:,} without, {self.empty:,} with an empty one"

    def __bool__(self) -> bool:
        return bool(self.with_thoughts or self.empty)


def classify_thoughts(conversation: Conversation, segments: Sequence[Segment]) -> ThoughtKind:
    """Return the kind of a conversation's sequence."""
    thoughts = [thought for message in conversation.messages if (thought := get_thought(message))]
    if thoughts:
        texts = [segment.text for segment in segments if segment.supervised and segment.ends_turn]
        if any(contains(text, thought) for thought in thoughts for text in texts):
            return ThoughtKind.WITH
    for segment in segments:  # no generator: this runs for every sequence
        if segment.begins_turn and not segment.ends_turn:
            return ThoughtKind.EMPTY
    return ThoughtKind.WITHOUT


def count_thoughts(sequences: Dataset) -> ThoughtCounts:
    """Count the sequences of each kind."""
    counts = np.bincount(get_column(sequences, "thoughts").astype(int), minlength=len(ThoughtKind))
    return ThoughtCounts(*(int(counts[kind]) for kind in (ThoughtKind.WITH, ThoughtKind.WITHOUT, ThoughtKind.EMPTY)))
