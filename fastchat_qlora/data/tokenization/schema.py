"""Sequences -> a table with their sources; and texts -> tokens on access, where the table keeps texts."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from fastchat_qlora.data.conversation import Segment
from fastchat_qlora.data.sources.readers import Source
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX, Encoder, LabeledText
from fastchat_qlora.data.tokenization.token_bytes import Ids
from fastchat_qlora.data.tokenization.truncation import truncate

COMMON_COLUMNS = {
    "file": Value("string"),
    "line": Value("int64"),
    "id": Value("string"),
    "record": Value("int64"),
    "length": Value("int32"),
    "supervised": Value("int32"),
    "full_length": Value("int32"),
    "turns": Value("int32"),
    "thoughts": Value("int8"),
}
"""A sequence's source (`record` counts through all files), its tokens, the supervised ones among them, the tokens of
the whole conversation, the assistant turns in the sequence, and their thoughts (a ThoughtKind)."""

EAGER_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), **COMMON_COLUMNS})
LAZY_FEATURES = Features({"segments": Value("string"), **COMMON_COLUMNS})


def build_table(
    sequences: Sequence[tuple[int, Source, LabeledText]], thoughts: Sequence[int], *, lazy: bool
) -> pa.Table:
    """Return a table of sequences, each with the number and the source of its record, and the kind of its thoughts.

    If `lazy`, it has their texts (LAZY_FEATURES) in place of their tokens (EAGER_FEATURES).
    """
    sources = [source for _, source, _ in sequences]
    tokens = [sequence.tokens for _, _, sequence in sequences]
    offsets = np.cumsum([0, *(len(one.input_ids) for one in tokens)], dtype=np.int32)
    labels = _concatenate([one.labels for one in tokens])
    supervised = np.concatenate([[0], np.cumsum(labels != IGNORE_INDEX)]).astype(np.int32)
    columns = {
        "file": [source.file for source in sources],
        "line": [source.line for source in sources],
        "id": [source.id for source in sources],
        "record": [number for number, _, _ in sequences],
        "length": np.diff(offsets),
        "supervised": np.diff(supervised[offsets]),
        "full_length": [one.full_length for one in tokens],
        "turns": [len(one.turn_ends) for one in tokens],
        "thoughts": thoughts,
    }
    if lazy:
        columns["segments"] = [json.dumps(sequence.segments) for _, _, sequence in sequences]
    else:
        columns["input_ids"] = pa.ListArray.from_arrays(offsets, _concatenate([one.input_ids for one in tokens]))
        columns["labels"] = pa.ListArray.from_arrays(offsets, labels)
    return pa.table(columns, schema=(LAZY_FEATURES if lazy else EAGER_FEATURES).arrow_schema)


def _concatenate(arrays: Sequence[Ids]) -> Ids:
    return np.concatenate([*arrays, np.empty(0, dtype=np.int32)], dtype=np.int32)


class TokenizeOnAccess:
    """A transform of lazy datasets, from texts to tokens, with the same encoder as in their check."""

    def __init__(self, encoder: Encoder, max_length: int) -> None:
        self.encoder = encoder
        self.max_length = max_length

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Replace the column `segments` by `input_ids` and `labels`."""
        texts = [[Segment(*part) for part in json.loads(text)] for text in batch["segments"]]
        encoded = self.encoder.encode(texts, enough=self.max_length)
        labeled = [truncate(self.encoder.label(text)[0].tokens, self.max_length) for text in encoded]
        tokens = {name: [getattr(one, name).tolist() for one in labeled] for name in ("input_ids", "labels")}
        return {**tokens, **{name: values for name, values in batch.items() if name != "segments"}}
