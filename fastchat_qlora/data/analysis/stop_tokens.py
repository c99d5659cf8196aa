"""Supervised sequences -> the tokens that a model learns to end its turns with."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX

MAX_SAMPLED_SEQUENCES = 500  # spread over all of them


def find_stop_tokens(sequences: Dataset, tokenizer: Any, max_length: int, *, supervises_all: bool = False) -> list[int]:
    """Return the ids of the special and added tokens that end answers and stand nowhere else in them.

    The most frequent comes first. A token that ends answers and also stands between their parts, such as the close tag
    of a call, is none, unless no other ends them. An answer that was cut short ends anywhere, and does not count; a
    whole one does, also where its sequence was cut after it.

    Args:
        max_length: tokens of a sequence that was cut inside an answer.
        supervises_all: of prompts too (--train_on all), so that a sequence's last answer alone shows its end.
    """
    chosen = np.linspace(0, len(sequences) - 1, min(MAX_SAMPLED_SEQUENCES, len(sequences))).astype(int)
    batch = sequences[np.unique(chosen).tolist()]
    names = ("input_ids", "labels", "length", "full_length", "turns")
    can_end = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
    ends: Counter[int] = Counter()
    inside: set[int] = set()
    for ids, labels, length, full_length, turns in zip(*(batch[name] for name in names), strict=True):
        spans = find_supervised(labels)
        may_be_cut = full_length > length >= max_length and turns <= 1
        if supervises_all:
            is_end = spans and spans[-1][1] == len(ids) and not may_be_cut  # else a masked answer comes last
            ends.update([_get_last_token(ids, can_end, tokenizer)] if is_end else [])
            continue
        ends.update(ids[end - 1] for _, end in (spans[:-1] if may_be_cut else spans))
        if turns <= len(spans):  # else a span may be of several answers
            inside.update(token for start, end in spans for token in ids[start : end - 1])
    found = [token for token, _ in ends.most_common() if token in can_end]
    return [token for token in found if token not in inside] or found[:1]


def find_supervised(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return the start and the end of each run of supervised tokens."""
    supervised = np.concatenate([[False], np.asarray(labels) != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(supervised[1:] != supervised[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _get_last_token(ids: Sequence[int], can_end: set[int], tokenizer: Any) -> int:
    """Return the last token before the line break that a named template writes behind a turn."""
    for token in reversed(ids):
        if token in can_end or tokenizer.decode([token]).strip():
            return token
    return ids[-1]


def describe_stop_tokens(stop_tokens: list[int], tokenizer: Any) -> str:
    """Describe what a server needs beyond the tokenizer's eos_token for the model to stop; empty if nothing."""
    if not stop_tokens:
        return "No answer ends within --model_max_length tokens, so the model does not learn to stop; raise it."
    if others := [token for token in stop_tokens if token != tokenizer.eos_token_id]:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})" for token in others)
        return (
            f"Turns end with {names}, and the tokenizer's eos_token is {tokenizer.eos_token!r}: a server that uses "
            "only eos_token does not stop there; generation_config.json beside the adapter names all."
        )
    return ""


def make_id_list(value: Any) -> list[Any]:
    """Return the tokens of a setting that may be one id, several or None."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
