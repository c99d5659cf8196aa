"""Sequences and rejections -> examples, counts and lengths, for a terminal or a page."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from fastchat_qlora.data.analysis.duplicates import Finding
from fastchat_qlora.data.analysis.thought_kinds import ThoughtCounts, count_thoughts
from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.conversation import Segment
from fastchat_qlora.data.dataset import LoadedData, SourceCounts, describe_source_counts
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
    weights: list[float] | None  # of supervised tokens in the loss; None where all are 1
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
        """Text of the sequence, cut where supervision or its weight changes, with escapes for what cannot be seen.

        A piece is what its tokens add to the text before them: decoded alone, it would lose its first blank in
        tokenizers of Llama's family.
        """
        weights = (np.array(self.labels) != IGNORE_INDEX) * np.array(1.0 if self.weights is None else self.weights)
        edges = [0, *(np.flatnonzero(weights[1:] != weights[:-1]) + 1).tolist(), len(self.input_ids)]
        parts = []
        before = ""
        for start, end in pairwise(edges):
            text = self.tokenizer.decode(self.input_ids[:end], clean_up_tokenization_spaces=False)
            if not text.startswith(before):  # half of a character stands on either side of the edge
                before = ""
                text = self.tokenizer.decode(self.input_ids[start:end], clean_up_tokenization_spaces=False)
            shown, weight = escape_control(text[len(before) :]), float(weights[start])
            parts.append(Segment(shown, weight > 0, weight=weight))
            before = text
        return parts


class RejectionReport(NamedTuple):
    """The counts of one flag's records, and the first rejected ones with their reasons."""

    summary: RejectionSummary
    listed: list[str]
    sources: Sequence[SourceCounts] = ()
    findings: Sequence[Finding] = ()

    @property
    def found(self) -> list[str]:
        """The duplicates and leaks, one kind a line, with the places of the first."""
        return [finding.describe() for finding in self.findings if finding.size]


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
    weight: float  # of the supervised tokens in the loss, together
    lengths: dict[str, int]
    histogram: list[Bin]

    @property
    def is_weighted(self) -> bool:
        """Whether a supervised token weighs less than 1."""
        return self.weight != self.supervised


def summarize_rejections(data: LoadedData) -> RejectionReport:
    """Return the counts of one flag's records, and the first rejected ones."""
    with data.rejected.open(encoding="utf-8") as lines:
        first = [json.loads(line) for line in islice(lines, MAX_LISTED_REJECTIONS)]
    rejections = [Rejection(Source(line["file"], line["line"], line["id"]), line["reason"]) for line in first]
    listed = [describe_rejection(rejection) for rejection in rejections]
    return RejectionReport(data.summary, listed, data.sources, data.findings)


def get_examples(name: str, sequences: Dataset, tokenizer: Any, count: int) -> Iterator[Example]:
    """Yield the first sequences of the split of that name, all of them for a count of 0."""
    total = len(sequences)
    for i, row in enumerate(sequences.select(range(min(count or total, total))), 1):
        source = f"{row['file']}:{row['line']}"
        copied = {column: row[column] for column in ("id", "input_ids", "labels", "weights", "full_length")}
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
        weight=_add_up_weights(sequences, supervised),
        lengths={name: int(np.percentile(lengths, q)) for name, q in PERCENTILES.items()} if len(lengths) else {},
        histogram=_count_by_length(lengths) if len(lengths) else [],
    )


def _add_up_weights(sequences: Dataset, supervised: NDArray[np.int64]) -> float:
    """Return the sum of the weights of all supervised tokens."""
    weights = np.asarray(get_column(sequences, "weight"), dtype=np.float64)  # NaN where there are none
    return float(np.where(np.isnan(weights), supervised, weights).sum())


def _count_by_length(lengths: NDArray[np.int64]) -> list[Bin]:
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // HISTOGRAM_BINS)
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    return [Bin(int(edge), int(edge) + width - 1, int(n)) for edge, n in zip(edges, counts, strict=False)]


def format_rejections(report: RejectionReport) -> dict[str, str]:
    """Return the counts of one flag's records, and of each of its sources, as texts by name."""
    counts = {"read": report.summary.read}
    for name in ("accepted", "rejected", "dropped", "not_sampled"):
        counts[name.replace("_", " ")] = sum(getattr(source, name) for source in report.sources)
    counts |= {f"rejected: {reason}": count for reason, count in report.summary.reasons.items()}
    counts |= report.summary.notes | {finding.kind.value: finding.size for finding in report.findings}
    texts = {escape_control(name): f"{count:,}" for name, count in counts.items()}
    if len(report.sources) > 1 or any(source.entry.settings for source in report.sources):
        texts |= {f"source {source.name}": describe_source_counts(source) for source in report.sources}
    return texts


def format_statistics(statistics: DatasetStatistics) -> dict[str, str]:
    """Return the counts of a split as texts by name."""
    share = f" ({statistics.supervised / statistics.tokens:.1%})" if statistics.tokens else ""
    lengths = ", ".join(f"{name}\N{NO-BREAK SPACE}{length:,}" for name, length in statistics.lengths.items())
    thoughts = {"thoughts": f"sequences {statistics.thoughts}"} if statistics.thoughts else {}
    weight = {"weight of these": f"{statistics.weight:,.1f}"} if statistics.is_weighted else {}
    return {
        "sequences": f"{statistics.rows:,}",
        "conversations": f"{statistics.conversations:,}",
        "shortened": f"{statistics.shortened:,}",
        "assistant turns": f"{statistics.answers:,}",
        **thoughts,
        "tokens": f"{statistics.tokens:,}",
        "supervised tokens": f"{statistics.supervised:,}{share}",
        **weight,
        "tokens per sequence": lengths or "none",
    }
