"""Sequences and rejections -> examples, counts and lengths, for a terminal or a page."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from fastchat_qlora.data.analysis.thought_kinds import ThoughtCounts, count_thoughts
from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.conversation import Segment
from fastchat_qlora.data.dataset import LoadedData
from fastchat_qlora.data.sources.readers import Rejection, Source
from fastchat_qlora.data.tokenization.build import RejectionSummary, describe_rejection
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.utils.text import escape_control

MAX_LISTED_REJECTIONS = 20
HISTOGRAM_BINS = 12
PERCENTILES = {"shortest": 0, "median": 50, "90%": 90, "99%": 99, "longest": 100}


@dataclass(frozen=True)
class Example:
    """One sequence as input of training, with the approximate number of its conversation's tokens (`full_length`)."""

    set: str
    position: str
    source: str
    id: str | None
    input_ids: list[int]
    labels: list[int]
    full_length: int
    tokenizer: Any

    @property
    def is_shortened(self) -> bool:
        """Whether the conversation has more tokens than the sequence."""
        return self.full_length > len(self.input_ids)

    @property
    def title(self) -> str:
        """Source and size of the sequence."""
        identity = f", id {self.id}" if self.id is not None else ""
        cut = f", shortened from about {self.full_length:,}" if self.is_shortened else ""
        supervised = sum(label != IGNORE_INDEX for label in self.labels)
        size = f"{len(self.input_ids):,} tokens, {supervised:,} supervised{cut}"
        return escape_control(f"{self.set} sequence {self.position}: {self.source}{identity}: {size}")

    @property
    def parts(self) -> list[Segment]:
        """Text of the sequence, cut where supervision begins or ends, with escapes for what cannot be seen.

        A piece is what its tokens add to the text before them: decoded alone, it would lose its first blank in
        tokenizers of Llama's family.
        """
        is_supervised = np.array(self.labels) != IGNORE_INDEX
        edges = [0, *(np.flatnonzero(is_supervised[1:] != is_supervised[:-1]) + 1).tolist(), len(self.input_ids)]
        parts = []
        before = ""
        for start, end in pairwise(edges):
            text = self.tokenizer.decode(self.input_ids[:end], clean_up_tokenization_spaces=False)
            if not text.startswith(before):  # half of a character stands on either side of the edge
                before = ""
                text = self.tokenizer.decode(self.input_ids[start:end], clean_up_tokenization_spaces=False)
            parts.append(Segment(escape_control(text[len(before) :]), bool(is_supervised[start])))
            before = text
        return parts


class RejectionReport(NamedTuple):
    """The counts of one flag's records, and the first rejected ones with their reasons."""

    summary: RejectionSummary
    listed: list[str]


class Bin(NamedTuple):
    """The number of sequences of `first` to `last` tokens."""

    first: int
    last: int
    sequences: int


@dataclass(frozen=True)
class DatasetStatistics:
    """Counts over the sequences (`rows`) of a split, and percentiles of their tokens (`lengths`)."""

    rows: int
    conversations: int
    shortened: int
    answers: int
    tokens: int
    supervised: int
    thoughts: ThoughtCounts
    lengths: dict[str, int]
    histogram: list[Bin]


def summarize_rejections(data: LoadedData) -> RejectionReport:
    """Return the counts of one flag's records, and the first rejected ones."""
    with data.rejected.open(encoding="utf-8") as lines:
        first = [json.loads(line) for line in islice(lines, MAX_LISTED_REJECTIONS)]
    rejections = [Rejection(Source(line["file"], line["line"], line["id"]), line["reason"]) for line in first]
    return RejectionReport(data.summary, [describe_rejection(rejection) for rejection in rejections])


def get_examples(name: str, sequences: Dataset, tokenizer: Any, count: int) -> Iterator[Example]:
    """Yield the first sequences of the split of that name, all of them for a count of 0."""
    total = len(sequences)
    for i, row in enumerate(sequences.select(range(min(count or total, total))), 1):
        source = f"{row['file']}:{row['line']}"
        copied = {column: row[column] for column in ("id", "input_ids", "labels", "full_length")}
        yield Example(set=name, position=f"{i} of {total}", source=source, tokenizer=tokenizer, **copied)


def compute_statistics(sequences: Dataset) -> DatasetStatistics:
    """Count the sequences of a split."""
    lengths, supervised, full_lengths, turns, records = (
        get_column(sequences, name) for name in ("length", "supervised", "full_length", "turns", "record")
    )
    return DatasetStatistics(
        rows=len(sequences),
        conversations=len(np.unique(records)),
        shortened=len(np.unique(records[full_lengths > lengths])),
        answers=int(turns.sum()),
        tokens=int(lengths.sum()),
        supervised=int(supervised.sum()),
        thoughts=count_thoughts(sequences),
        lengths={name: int(np.percentile(lengths, q)) for name, q in PERCENTILES.items()} if len(lengths) else {},
        histogram=_count_by_length(lengths) if len(lengths) else [],
    )


def _count_by_length(lengths: NDArray[np.int64]) -> list[Bin]:
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // HISTOGRAM_BINS)
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    return [Bin(int(edge), int(edge) + width - 1, int(n)) for edge, n in zip(edges, counts, strict=False)]


def format_rejections(summary: RejectionSummary) -> dict[str, str]:
    """Return the counts of one flag's records as texts by name."""
    accepted = summary.read - summary.rejected
    counts = {"read": summary.read, "accepted": accepted, "rejected": summary.rejected}
    reasons = {f"rejected: {reason}": count for reason, count in summary.reasons.items()}
    return {escape_control(name): f"{count:,}" for name, count in {**counts, **reasons}.items()}


def format_statistics(statistics: DatasetStatistics) -> dict[str, str]:
    """Return the counts of a split as texts by name."""
    share = f" ({statistics.supervised / statistics.tokens:.1%})" if statistics.tokens else ""
    lengths = ", ".join(f"{name}\N{NO-BREAK SPACE}{length:,}" for name, length in statistics.lengths.items())
    thoughts = {"thoughts": f"sequences {statistics.thoughts}"} if statistics.thoughts else {}
    return {
        "sequences": f"{statistics.rows:,}",
        "conversations": f"{statistics.conversations:,}",
        "shortened": f"{statistics.shortened:,}",
        "assistant turns": f"{statistics.answers:,}",
        **thoughts,
        "tokens": f"{statistics.tokens:,}",
        "supervised tokens": f"{statistics.supervised:,}{share}",
        "tokens per sequence": lengths or "none",
    }
