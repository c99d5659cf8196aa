"""Conversations -> one batch, without padding or with it."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForSeq2Seq

from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX

MULTIPLE = 8
"""Of which padded lengths are: kind to matrix units."""

BATCH_INFO = ("num_tokens", "num_supervised", "num_conversations", "sources")
"""What a batch says of itself in plain integers and names, written down before anything is on a device."""


def count_max_batch_tokens(lengths: np.ndarray[Any, Any], batch_size: int, *, padding_free: bool) -> int:
    """The most tokens that a batch of so many conversations can have, padding included."""
    longest = np.sort(lengths)[-batch_size:]
    return int(longest.sum() if padding_free else len(longest) * -(-longest[-1] // MULTIPLE) * MULTIPLE)


class Collator:
    """Lay conversations end to end in one row, or pad them to the longest one.

    A batch holds, beside what the model takes:

    - `supervised`: shape (targets,), the positions in the flattened batch whose next token is learnt;
    - `labels`: shape (targets,), those next tokens;
    - `conversation`: shape (targets,), the index of the conversation that each belongs to;
    - the integers of ACCOUNT.

    The first token of a conversation is never a target: nothing of its own comes before it.

    Without padding the model takes `input_ids` and `position_ids` of shape (1, tokens), positions starting anew with
    each conversation, and says where conversations meet under the names that transformers gives FlashAttention:
    `cu_seq_lens_q` and `cu_seq_lens_k` (int32, shape (conversations + 1,)), `max_length_q` and `max_length_k`; the
    lengths are there once more as integers, in `conversation_lengths`, for backends that go through them one by one.
    With padding it takes `input_ids` and `attention_mask` of shape (conversations, length), the length rounded up to a
    multiple of 8; the mask goes by length and not by token, for the padding token may well occur in a text.

    Args:
        tokenizer: has the padding token and side.
        padding_free: lay end to end.
    """

    def __init__(self, tokenizer: Any, *, padding_free: bool) -> None:
        self.padding_free = padding_free
        self._side = tokenizer.padding_side
        self._pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=MULTIPLE)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of rows that have `input_ids` and `labels`, IGNORE_INDEX where nothing is learnt."""
        lengths = [len(row["input_ids"]) for row in rows]
        if self.padding_free:
            inputs, starts = self._end_to_end(rows, lengths)
        else:
            inputs, starts = self._padded(rows, lengths)
        targets = [np.asarray(row["labels"])[1:] for row in rows]
        learnt = [np.flatnonzero(target != IGNORE_INDEX) for target in targets]
        positions = [start + places for start, places in zip(starts, learnt, strict=True)]
        counts = [len(places) for places in learnt]
        return inputs | {
            "supervised": torch.from_numpy(np.concatenate(positions)),
            "labels": torch.from_numpy(
                np.concatenate([target[places] for target, places in zip(targets, learnt, strict=True)])
            ).long(),
            "conversation": torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)),
            "num_tokens": sum(lengths),
            "num_supervised": sum(counts),
            "num_conversations": len(rows),
            "sources": [(row.get("file"), row.get("line"), row.get("id")) for row in rows],
        }

    def _end_to_end(self, rows: Sequence[dict[str, Any]], lengths: list[int]) -> tuple[dict[str, Any], list[int]]:
        starts = [0, *accumulate(lengths)]
        boundaries = torch.tensor(starts, dtype=torch.int32)
        inputs = {
            "input_ids": torch.from_numpy(np.concatenate([np.asarray(row["input_ids"]) for row in rows])).long()[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "conversation_lengths": tuple(lengths),
        }
        return inputs, starts[:-1]

    def _padded(self, rows: Sequence[dict[str, Any]], lengths: list[int]) -> tuple[dict[str, Any], list[int]]:
        batch = self._pad([{"input_ids": row["input_ids"]} for row in rows])
        width = batch["input_ids"].shape[1]
        on_the_left = self._side == "left"
        starts = [row * width + (width - length) * on_the_left for row, length in enumerate(lengths)]
        # The tokenizer may pad with a token that the model has no embedding for; masked, any other does as well.
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}, starts
