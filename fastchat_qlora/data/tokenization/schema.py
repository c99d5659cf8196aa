"""Sequences -> a table with their sources; and texts -> tokens on access, where the table keeps texts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value
from numpy.typing import NDArray

from fastchat_qlora.data.batching.prefix_index import LEAST_SHARED, PREFIX_HASHES, hash_prefixes
from fastchat_qlora.data.conversation import Segment
from fastchat_qlora.data.conversation_hash import ConversationHashes
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
    "weight": Value("float64"),
    "full_length": Value("int32"),
    "turns": Value("int32"),
    "thoughts": Value("int8"),
    **{f"{name}_hash": Value("uint64") for name in ConversationHashes._fields},
}
"""A sequence's source (`record` counts through all files), its tokens, the supervised ones among them, the sum of their
weights in the loss (null where each is 1), the tokens of the whole conversation, the assistant turns in the sequence,
their thoughts (a ThoughtKind), and the hashes of its record's conversation."""

TOKEN_COLUMNS = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "weights": List(Value("float32"))}
"""Tokens, their labels, and the weights of supervised ones in the loss: null where all of them are 1."""

EAGER_FEATURES = Features({**TOKEN_COLUMNS, **COMMON_COLUMNS})
LAZY_FEATURES = Features({"segments": Value("string"), PREFIX_HASHES: List(Value("uint64")), **COMMON_COLUMNS})


def build_table(
    sequences: Sequence[tuple[int, Source, LabeledText]],
    hashes: Mapping[int, ConversationHashes],
    thoughts: Sequence[int],
    *,
    lazy: bool,
) -> pa.Table:
    """Return a table of sequences, each with the number and source of its record, whose hashes are given, and thoughts.

    If `lazy`, it has their texts (LAZY_FEATURES) in place of their tokens (EAGER_FEATURES), and hashes by which those
    that begin alike are found.
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
        "weight": [None if one.weights is None else float(one.weights.sum(dtype=np.float64)) for one in tokens],
        "full_length": [one.full_length for one in tokens],
        "turns": [len(one.turn_ends) for one in tokens],
        "thoughts": thoughts,
    }
    for i, name in enumerate(ConversationHashes._fields):
        columns[f"{name}_hash"] = [hashes[number][i] for number, _, _ in sequences]
    ids = _concatenate([one.input_ids for one in tokens])
    if lazy:
        counts = np.diff(offsets) // LEAST_SHARED
        hashes_from = np.cumsum([0, *counts], dtype=np.int32)
        columns["segments"] = [json.dumps(sequence.segments) for _, _, sequence in sequences]
        columns[PREFIX_HASHES] = pa.ListArray.from_arrays(hashes_from, hash_prefixes(ids, offsets[:-1], counts))
    else:
        columns["input_ids"] = pa.ListArray.from_arrays(offsets, ids)
        columns["labels"] = pa.ListArray.from_arrays(offsets, labels)
        columns["weights"] = _list_weights([one.weights for one in tokens])
    return pa.table(columns, schema=(LAZY_FEATURES if lazy else EAGER_FEATURES).arrow_schema)


def _list_weights(weights: Sequence[NDArray[np.float32] | None]) -> pa.Array:
    """Return a column of weights, null for sequences without; so it takes four bytes a sequence where none has any."""
    given = [one for one in weights if one is not None]
    offsets = np.cumsum([0, *(0 if one is None else len(one) for one in weights)], dtype=np.int32)
    values = np.concatenate([*given, np.empty(0, dtype=np.float32)], dtype=np.float32)
    return pa.ListArray.from_arrays(offsets, values, mask=pa.array([one is None for one in weights], pa.bool_()))


def _concatenate(arrays: Sequence[Ids]) -> Ids:
    return np.concatenate([*arrays, np.empty(0, dtype=np.int32)], dtype=np.int32)


class TokenizeOnAccess:
    """A transform of lazy datasets, from texts to tokens, with the same encoder as in their check."""

    def __init__(self, encoder: Encoder, max_length: int) -> None:
        self.encoder = encoder
        self.max_length = max_length

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Replace the columns of texts and of hashes by TOKEN_COLUMNS."""
        texts = [[Segment(*part) for part in json.loads(text)] for text in batch["segments"]]
        encoded = self.encoder.encode(texts, enough=self.max_length)
        labeled = [truncate(self.encoder.label(text)[0].tokens, self.max_length) for text in encoded]
        tokens = {name: [_to_list(getattr(one, name)) for one in labeled] for name in TOKEN_COLUMNS}
        return {**tokens, **{name: batch[name] for name in batch if name not in ("segments", PREFIX_HASHES)}}


def _to_list(array: NDArray[Any] | None) -> list[Any] | None:
    return None if array is None else array.tolist()
