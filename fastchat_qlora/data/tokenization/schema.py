"""Rows of a record -> a table with where they come from; and back to tokens, where the table keeps texts."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from fastchat_qlora.data.conversation import RejectedRecord, Segment
from fastchat_qlora.data.sources.readers import Source
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX, Encoder, Ids, TokenizedConversation
from fastchat_qlora.data.tokenization.truncation import truncate

COMMON = {
    "file": Value("string"),
    "line": Value("int64"),
    "id": Value("string"),
    "record": Value("int64"),
    "length": Value("int32"),
    "supervised": Value("int32"),
    "full_length": Value("int32"),
    "turns": Value("int32"),
}
"""Where a row comes from (see Source; `record` counts through all files), its tokens, those of them that are learnt,
the tokens of the whole conversation, and the assistant's turns in the row."""

EAGER_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), **COMMON})
LAZY_FEATURES = Features({"segments": Value("string"), **COMMON})


class Row(NamedTuple):
    """One row to train on: the text that it was made from, and its tokens, which may be fewer than the text's."""

    segments: Sequence[Segment]
    tokens: TokenizedConversation


def assemble(rows: Sequence[tuple[int, Source, Row]], *, lazy: bool) -> pa.Table:
    """A table of rows, with the number and the place of the record that each comes from.

    Args:
        rows: the rows.
        lazy: keep their texts (LAZY_FEATURES) in place of their tokens (EAGER_FEATURES).
    """
    sources = [source for _, source, _ in rows]
    tokens = [row.tokens for _, _, row in rows]
    offsets = np.cumsum([0, *(len(one.input_ids) for one in tokens)], dtype=np.int32)
    labels = _join([one.labels for one in tokens])
    learnt = np.concatenate([[0], np.cumsum(labels != IGNORE_INDEX)]).astype(np.int32)
    columns = {
        "file": [source.file for source in sources],
        "line": [source.line for source in sources],
        "id": [source.id for source in sources],
        "record": [number for number, _, _ in rows],
        "length": np.diff(offsets),
        "supervised": np.diff(learnt[offsets]),
        "full_length": [one.full_length for one in tokens],
        "turns": [len(one.turn_ends) for one in tokens],
    }
    if lazy:
        columns["segments"] = [json.dumps(row.segments) for _, _, row in rows]
    else:
        columns["input_ids"] = pa.ListArray.from_arrays(offsets, _join([one.input_ids for one in tokens]))
        columns["labels"] = pa.ListArray.from_arrays(offsets, labels)
    return pa.table(columns, schema=(LAZY_FEATURES if lazy else EAGER_FEATURES).arrow_schema)


def _join(arrays: Sequence[Ids]) -> Ids:
    return np.concatenate([*arrays, np.empty(0, dtype=np.int32)], dtype=np.int32)


class TokenizeOnAccess:
    """Tokenises rows on access, to what they were found to be when they were checked.

    Args:
        encoder: what they were checked with.
        max_length: the most tokens of a row.
    """

    def __init__(self, encoder: Encoder, max_length: int) -> None:
        self.encoder = encoder
        self.max_length = max_length

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Turn the column `segments` into `input_ids` and `labels`."""
        texts = [[Segment(*part) for part in json.loads(text)] for text in batch["segments"]]
        rows = [self._label(encoded) for encoded in self.encoder.encode(texts, enough=self.max_length)]
        tokens = {name: [getattr(row, name).tolist() for row in rows] for name in ("input_ids", "labels")}
        return {**tokens, **{name: values for name, values in batch.items() if name != "segments"}}

    def _label(self, encoded: Any) -> TokenizedConversation:
        tokens = self.encoder.label(encoded)
        if isinstance(tokens, RejectedRecord):  # the tokenizer has changed since: no row of these
            raise tokens
        return truncate(tokens, self.max_length)
