"""Sequences -> one batch, without padding or with it."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForSeq2Seq

from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX

PADDING_MULTIPLE = 8  # of padded lengths, which suits matrix units
BATCH_INFO = ("num_tokens", "num_supervised", "num_conversations", "sources")
"""Facts about a batch in plain integers and names, known before anything is on a device."""


def count_max_batch_tokens(lengths: np.ndarray[Any, Any], batch_size: int, *, padding_free: bool) -> int:
    """Return the tokens of the largest possible batch of so many conversations, padding included."""
    longest = np.sort(lengths)[-batch_size:]
    width = -(-longest[-1] // PADDING_MULTIPLE) * PADDING_MULTIPLE
    return int(longest.sum() if padding_free else len(longest) * width)


class Collator:
    """A collator of conversations: end to end in one sequence, or padded to the longest one.

    Beside the model's inputs a batch contains BATCH_INFO and:

    - `supervised`: shape (targets,), the positions in the flattened batch whose next token is supervised;
    - `labels`: shape (targets,), those next tokens;
    - `conversation`: shape (targets,), the index of the conversation of each;
    - `weights`: shape (targets,) in fp32, their weights in the loss, only where a conversation has any.
    - `source`: shape (conversations,), the index of the entry of the data flag that each is of.

    The first token of a conversation is never a target: nothing of its own precedes it.

    Without padding the inputs are `input_ids` and `position_ids` of shape (1, tokens), with positions that restart in
    each conversation, and the boundaries of conversations under transformers' names for FlashAttention:
    `cu_seq_lens_q` and `cu_seq_lens_k` (int32, shape (conversations + 1,)), `max_length_q` and `max_length_k`; as
    integers in `conversation_lengths`, for backends that attend to one conversation after the other.
    With padding they are `input_ids` and `attention_mask` of shape (conversations, length), the length rounded up to
    PADDING_MULTIPLE; the mask goes by length, not by token, since a text may contain the padding token.

    Args:
        tokenizer: has the padding token and side.
    """

    def __init__(self, tokenizer: Any, *, padding_free: bool) -> None:
        self.padding_free = padding_free
        self.padding_side = tokenizer.padding_side
        self._pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=PADDING_MULTIPLE)

    def __call__(self, sequences: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch of sequences, which have `input_ids`, `labels` and perhaps `weights`."""
        lengths = [len(sequence["input_ids"]) for sequence in sequences]
        lay_out = self._lay_end_to_end if self.padding_free else self._pad_to_longest
        inputs, starts = lay_out(sequences, lengths)
        targets = [np.asarray(sequence["labels"])[1:] for sequence in sequences]
        supervised = [np.flatnonzero(target != IGNORE_INDEX) for target in targets]
        positions = [start + places for start, places in zip(starts, supervised, strict=True)]
        labels = [target[places] for target, places in zip(targets, supervised, strict=True)]
        counts = [len(places) for places in supervised]
        return (
            inputs
            | _get_weights(sequences, supervised)
            | {
                "supervised": torch.from_numpy(np.concatenate(positions)),
                "labels": torch.from_numpy(np.concatenate(labels)).long(),
                "conversation": torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(counts)),
                "source": torch.tensor([sequence.get("source", 0) for sequence in sequences]),
                "num_tokens": sum(lengths),
                "num_supervised": sum(counts),
                "num_conversations": len(sequences),
                "sources": [tuple(sequence.get(name) for name in ("file", "line", "id")) for sequence in sequences],
            }
        )

    def _lay_end_to_end(
        self, sequences: Sequence[dict[str, Any]], lengths: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        starts = [0, *accumulate(lengths)]
        boundaries = torch.tensor(starts, dtype=torch.int32)
        ids = np.concatenate([np.asarray(sequence["input_ids"]) for sequence in sequences])
        inputs = {
            "input_ids": torch.from_numpy(ids).long()[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "conversation_lengths": tuple(lengths),
        }
        return inputs, starts[:-1]

    def _pad_to_longest(
        self, sequences: Sequence[dict[str, Any]], lengths: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        batch = self._pad([{"input_ids": sequence["input_ids"]} for sequence in sequences])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        width = ids.shape[1]
        starts = [
            i * width + (width - length if self.padding_side == "left" else 0) for i, length in enumerate(lengths)
        ]
        # The tokenizer may pad with a token that the model has no embedding for; masked, any other will do.
        return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}, starts


def _get_weights(sequences: Sequence[dict[str, Any]], supervised: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return the weights of the targets (places in each sequence, without its first token), if there are any."""
    given = [sequence.get("weights") for sequence in sequences]
    if all(weights is None for weights in given):
        return {}
    own = [
        np.ones(len(places)) if weights is None else np.asarray(weights)[1:][places]
        for weights, places in zip(given, supervised, strict=True)
    ]
    return {"weights": torch.from_numpy(np.concatenate(own)).float()}
