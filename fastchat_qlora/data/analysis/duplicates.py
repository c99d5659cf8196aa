"""Hashes of conversations -> duplicates within a set, and conversations that two sets share."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from fastchat_qlora.data.batching.packing import get_column

MAX_LISTED_PAIRS = 5

Indices = NDArray[np.int64]
Hashes = NDArray[np.uint64]


class FindingKind(Enum):
    """A kind of conversations that stood before, as it is logged."""

    DUPLICATE = "exact duplicates"
    OTHER_ANSWER = "the prompt of an earlier one with another answer"
    LEAK = "conversations of the training data"
    PROMPT_LEAK = "prompts of the training data with another answer"


class Finding(NamedTuple):
    """The number of conversations of a kind, and the places of the first with those of the earlier ones."""

    kind: FindingKind
    size: int
    pairs: list[tuple[str, str]]

    def describe(self) -> str:
        """Return the finding as one line."""
        pairs = [f"{place} as {earlier}" for place, earlier in self.pairs]
        more = [f"{self.size - len(pairs):,} more"] if self.size > len(pairs) else []
        return f"{self.kind.value}: {self.size:,} ({', '.join([*pairs, *more])})"


@dataclass(frozen=True)
class RecordTable:
    """The accepted records of a set: the first of their sequences, and their hashes, all of shape (records,)."""

    sequences: Dataset
    rows: Indices  # of the first sequence of each record
    conversation: Hashes
    prompt: Hashes
    example: Hashes  # of the conversation with its weights

    @classmethod
    def read(cls, sequences: Dataset) -> "RecordTable":
        """Read the columns of sequences, of which those of a record stand together."""
        _, rows = np.unique(get_column(sequences, "record"), return_index=True)
        names = ("conversation", "prompt", "weights")
        conversation, prompt, weights = (get_column(sequences, f"{name}_hash")[rows] for name in names)
        return cls(sequences, rows, conversation, prompt, conversation ^ weights)

    def place(self, index: int) -> str:
        """Return file and line of a record."""
        file, line = (self.sequences.data.column(name)[int(self.rows[index])].as_py() for name in ("file", "line"))
        return f"{file}:{line}"


def find_duplicates(table: RecordTable) -> tuple[Finding, Indices]:
    """Return the records that are equal to an earlier one, whose weights are equal too."""
    first = _find_first(table.example)
    found = np.flatnonzero(first != np.arange(len(first)))
    return _build_finding(FindingKind.DUPLICATE, table, found, table, first[found]), found


def find_other_answers(table: RecordTable) -> Finding:
    """Return the different conversations that begin with the prompt of an earlier one."""
    different = np.flatnonzero(_find_first(table.conversation) == np.arange(len(table.rows)))
    first = _find_first(table.prompt[different])
    found = np.flatnonzero(first != np.arange(len(first)))
    return _build_finding(FindingKind.OTHER_ANSWER, table, different[found], table, different[first[found]])


def find_leaks(table: RecordTable, used: Indices, training: RecordTable, trained: Indices) -> list[Finding]:
    """Return the used records that are trained on too, and those of which the prompt is."""
    findings = []
    for kind, name in ((FindingKind.LEAK, "conversation"), (FindingKind.PROMPT_LEAK, "prompt")):
        earlier = _find_in(getattr(table, name)[used], getattr(training, name)[trained])
        is_known = earlier >= 0
        findings.append(_build_finding(kind, table, used[is_known], training, trained[earlier[is_known]]))
        used = used[~is_known]
    return findings


def find_leaked(table: RecordTable, training: RecordTable, trained: Indices) -> NDArray[np.bool_]:
    """Return for each record whether it is trained on too."""
    return _find_in(table.conversation, training.conversation[trained]) >= 0


def _find_first(values: Hashes) -> Indices:
    """Return for each value the index of the first one that is equal."""
    order, starts, first = _group_equals(values)
    found = np.empty_like(order)
    found[order] = np.repeat(first, np.diff(starts, append=len(order)))
    return found


def _find_in(values: Hashes, known: Hashes) -> Indices:
    """Return for each value the index of the first known one that is equal, or -1."""
    if not len(known):
        return np.full(len(values), -1)
    _, _, first = _group_equals(known)
    places = np.searchsorted(known[first], values).clip(max=len(first) - 1)
    return np.where(known[first][places] == values, first[places], -1)


def _group_equals(values: Hashes) -> tuple[Indices, Indices, Indices]:
    """Return the order of values, where in it equal ones begin, and the first index of each of these groups.

    np.unique does the same with a stable sort, in twice the time.
    """
    order = np.argsort(values)
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(values)])
    return order, starts, np.minimum.reduceat(order, starts) if len(values) else order


def _build_finding(
    kind: FindingKind, table: RecordTable, found: Indices, earlier_table: RecordTable, earlier: Indices
) -> Finding:
    listed = zip(found[:MAX_LISTED_PAIRS].tolist(), earlier[:MAX_LISTED_PAIRS].tolist(), strict=True)
    pairs = [(table.place(index), earlier_table.place(first)) for index, first in listed]
    return Finding(kind, len(found), pairs)
