"""What people are shown of the data, before it is known how: examples, counts and lengths."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.dataset import LoadedData
from fastchat_qlora.data.sources.readers import Rejection, Source
from fastchat_qlora.data.tokenization.build import RejectionSummary, describe_rejection
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.utils.text import escape_control

LISTED = 20
"""Rejected records that are listed one by one."""

BATCH = 256
BINS = 12
PERCENTILES = {"shortest": 0, "median": 50, "90%": 90, "99%": 99, "longest": 100}


class Part(NamedTuple):
    """A piece of a sequence's text, with escapes for characters that cannot be seen."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Example:
    """One row: `input_ids` and `labels` as training gets them, and about how many tokens the conversation had."""

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
        """Whether the conversation had more tokens than the row."""
        return self.full_length > len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Tokens in the loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    @property
    def title(self) -> str:
        """Where the row comes from, and its size."""
        identity = f", id {self.id}" if self.id is not None else ""
        cut = f", shortened from about {self.full_length:,}" if self.is_shortened else ""
        size = f"{len(self.input_ids):,} tokens, {self.supervised:,} learnt{cut}"
        return escape_control(f"{self.set} row {self.position}: {self.source}{identity}: {size}")

    @property
    def parts(self) -> list[Part]:
        """The row's text, cut where learning begins or ends."""
        return split_by_label(self.input_ids, self.labels, self.tokenizer)


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
    """Counts over the rows of one set; `lengths` are percentiles of a row's tokens."""

    rows: int
    conversations: int
    shortened: int
    answers: int
    tokens: int
    supervised: int
    lengths: dict[str, int]
    histogram: list[Bin]


def summarize_rejections(data: LoadedData) -> RejectionReport:
    """Return the counts of one flag's records, and the first rejected ones."""
    with data.rejected.open(encoding="utf-8") as lines:
        first = [json.loads(line) for line in islice(lines, LISTED)]
    sources = [Source(*(line[name] for name in Source._fields)) for line in first]
    listed = [
        describe_rejection(Rejection(source, line["reason"])) for source, line in zip(sources, first, strict=True)
    ]
    return RejectionReport(data.summary, listed)


def get_examples(name: str, rows: Dataset, tokenizer: Any, count: int) -> Iterator[Example]:
    """The first rows of the set of that name, all for a count of 0."""
    for i, row in enumerate(get_rows(rows, count)):
        yield Example(
            set=name,
            position=f"{i + 1} of {len(rows)}",
            source=f"{row['file']}:{row['line']}",
            id=row["id"],
            input_ids=row["input_ids"],
            labels=row["labels"],
            full_length=row["full_length"],
            tokenizer=tokenizer,
        )


def get_rows(rows: Dataset, count: int) -> Iterator[dict[str, Any]]:
    """The first rows of a set, all for a count of 0."""
    stop = min(count or len(rows), len(rows))
    for start in range(0, stop, BATCH):
        end = min(start + BATCH, stop)
        batch = rows[start:end]
        for i in range(end - start):
            yield {name: values[i] for name, values in batch.items()}


def compute_statistics(rows: Dataset) -> DatasetStatistics:
    """Count a set."""
    names = ("length", "supervised", "full_length", "turns")
    numbers = {name: get_column(rows, name) for name in names}
    records = get_column(rows, "record")
    lengths, supervised = numbers["length"], numbers["supervised"]
    return DatasetStatistics(
        rows=len(rows),
        conversations=len(np.unique(records)),
        shortened=len(np.unique(records[numbers["full_length"] > lengths])),
        answers=int(numbers["turns"].sum()),
        tokens=int(lengths.sum()),
        supervised=int(supervised.sum()),
        lengths={name: int(np.percentile(lengths, q)) for name, q in PERCENTILES.items()} if len(lengths) else {},
        histogram=_histogram(lengths),
    )


def format_rejections(summary: RejectionSummary) -> dict[str, str]:
    """Return the counts of one flag's records as texts by name."""
    accepted = summary.read - summary.rejected
    counts = {"read": summary.read, "accepted": accepted, "rejected": summary.rejected}
    reasons = {f"rejected: {reason}": count for reason, count in summary.reasons.items()}
    return {escape_control(name): f"{count:,}" for name, count in {**counts, **reasons}.items()}


def format_statistics(statistics: DatasetStatistics) -> dict[str, str]:
    """The counts of one set, as named numbers."""
    share = f" ({statistics.supervised / statistics.tokens:.1%})" if statistics.tokens else ""
    lengths = ", ".join(f"{name}\N{NO-BREAK SPACE}{length:,}" for name, length in statistics.lengths.items())
    return {
        "rows": f"{statistics.rows:,}",
        "conversations": f"{statistics.conversations:,}",
        "shortened": f"{statistics.shortened:,}",
        "assistant turns": f"{statistics.answers:,}",
        "tokens": f"{statistics.tokens:,}",
        "learnt tokens": f"{statistics.supervised:,}{share}",
        "tokens a row": lengths or "none",
    }


def _histogram(lengths: NDArray[np.int64]) -> list[Bin]:
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // BINS)
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    return [Bin(int(edge), int(edge) + width - 1, int(n)) for edge, n in zip(edges, counts, strict=False)]


def split_by_label(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[Part]:
    """The text of a row in pieces that are learnt or not.

    A piece is what its tokens add to the text before them: decoded alone, it would lose the blank in front in
    tokenizers of Llama's family.
    """
    is_supervised = np.array(labels) != IGNORE_INDEX
    edges = [0, *(np.flatnonzero(is_supervised[1:] != is_supervised[:-1]) + 1).tolist(), len(input_ids)]
    parts = []
    before = ""
    for start, end in pairwise(edges):
        text = tokenizer.decode(input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not text.startswith(before):  # a character in halves, on either side of where the row was cut
            before = ""
            text = tokenizer.decode(input_ids[start:end], clean_up_tokenization_spaces=False)
        parts.append(Part(escape_control(text[len(before) :]), bool(is_supervised[start])))
        before = text
    return parts
