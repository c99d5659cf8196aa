"""Supervised sequences -> the tokens that a model learns to end its turns with."""

from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset

from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX

MAX_SAMPLED_SEQUENCES = 500  # spread over all of them


def find_stop_tokens(sequences: Dataset, tokenizer: Any, max_length: int) -> list[int]:
    """Return the ids of the special and added tokens that supervised answers end with, the most frequent first.

    An answer that was cut short ends anywhere, and does not count; a whole one does, also where its sequence was cut
    after it.

    Args:
        max_length: tokens of a sequence that was cut inside an answer.
    """
    chosen = np.linspace(0, len(sequences) - 1, min(MAX_SAMPLED_SEQUENCES, len(sequences))).astype(int)
    batch = sequences[np.unique(chosen).tolist()]
    names = ("input_ids", "labels", "length", "full_length", "turns")
    can_end = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
    found: Counter[int] = Counter()
    for ids, labels, length, full_length, turns in zip(*(batch[name] for name in names), strict=True):
        supervised = np.asarray(labels) != IGNORE_INDEX
        ends = np.flatnonzero(supervised & ~np.append(supervised[1:], False)).tolist()
        may_be_cut = full_length > length >= max_length and turns <= 1
        last = [_get_last_token(ids[: end + 1], can_end, tokenizer) for end in (ends[:-1] if may_be_cut else ends)]
        found.update(token for token in last if token in can_end)
    return [token for token, _ in found.most_common()]


def _get_last_token(ids: list[int], can_end: set[int], tokenizer: Any) -> int:
    """Return the last token before the line break that follows a turn's end where every token is supervised."""
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
