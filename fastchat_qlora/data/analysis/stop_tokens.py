"""The tokens that a model is taught to end its turns with, found where they are learnt."""

from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset

from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX

ROWS = 500
"""Of so many rows, spread over all of them, the ends are looked at."""


def find_stop_tokens(rows: Dataset, tokenizer: Any, max_length: int) -> list[int]:
    """Ids of the tokens that learnt answers end with, the commonest first.

    Counted are the special and added tokens of the vocabulary. An answer that was cut short ends with what happened to
    stand there, and does not count; one that is whole does, also where its row was cut behind it.

    Args:
        rows: of the training data.
        tokenizer: that they were made by.
        max_length: the most tokens of a row, where those that are cut inside of an answer end.
    """
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).astype(int)).tolist()
    batch = rows[chosen]
    names = ("input_ids", "labels", "length", "full_length", "turns")
    can_end = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
    found: Counter[int] = Counter()
    for ids, labels, length, full_length, turns in zip(*(batch[name] for name in names), strict=True):
        learnt = np.asarray(labels) != IGNORE_INDEX
        ends = np.flatnonzero(learnt & ~np.append(learnt[1:], False)).tolist()
        may_be_cut = full_length > length >= max_length and turns <= 1
        for end in ends[:-1] if may_be_cut else ends:
            token = _before_blanks(ids[: end + 1], can_end, tokenizer)
            found.update([token] * (token in can_end))
    return [token for token, _ in found.most_common()]


def _before_blanks(ids: list[int], can_end: set[int], tokenizer: Any) -> int:
    """The last token, without the line break that follows a turn's end where every token is learnt."""
    for token in reversed(ids):
        if token in can_end or tokenizer.decode([token]).strip():
            return token
    return ids[-1]


def describe_stop_tokens(turn_ends: list[int], tokenizer: Any) -> str:
    """What a server has to know beyond the tokenizer's eos_token so that the model stops; empty if nothing."""
    if not turn_ends:
        return "No answer ends within --model_max_length tokens, so the model is not taught to stop; raise it."
    if others := [token for token in turn_ends if token != tokenizer.eos_token_id]:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})" for token in others)
        return (
            f"Turns end with {names}, and the tokenizer's eos_token is {tokenizer.eos_token!r}: a server that looks at "
            "that alone does not stop there; generation_config.json beside the adapter names all."
        )
    return ""
