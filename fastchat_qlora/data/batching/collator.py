"""Sequences -> one batch, without padding or with it."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DataCollatorForSeq2Seq

from fastchat_qlora.data.batching.prefix_index import LEAST_SHARED
from fastchat_qlora.data.batching.prefix_tree import PrefixTree, build_prefix_tree
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX

PADDING_MULTIPLE = 8  # of padded lengths, which suits matrix units
BATCH_INFO = ("num_tokens", "num_computed", "num_supervised", "num_conversations", "sources")
"""Facts about a batch in plain integers and names, known before anything is on a device.

`num_computed` are the tokens of its row or rows without padding, of which `num_tokens` counts a shared one repeatedly.
"""


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

    With `share_prefixes`, conversations that share beginnings are a prefix tree, see `_lay_out_tree`. Their targets are
    unique pairs of a position and the token after it, and `target_copies`, shape (targets of all conversations,), has
    the one of each target; `conversation` and `weights` are those of all targets, as without a tree.

    Args:
        tokenizer: has the padding token and side.
        share_prefixes: compute tokens that conversations share from their beginning on once; not with padding.
    """

    def __init__(self, tokenizer: Any, *, padding_free: bool, share_prefixes: bool = False) -> None:
        self.padding_free, self.share_prefixes = padding_free, share_prefixes
        self.padding_side = tokenizer.padding_side
        self._pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=PADDING_MULTIPLE)

    def __call__(self, sequences: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch of sequences, which have `input_ids`, `labels` and perhaps `weights`."""
        return self.collate(sequences, least_shared=LEAST_SHARED if self.share_prefixes else None)

    def collate(self, sequences: Sequence[dict[str, Any]], *, least_shared: int | None) -> dict[str, Any]:
        """Return a batch of sequences as a prefix tree whose branches save so many tokens, or each by itself."""
        ids = [np.asarray(sequence["input_ids"]) for sequence in sequences]
        tree = build_prefix_tree(ids, least_shared) if self.padding_free and least_shared else None
        targets = [np.asarray(sequence["labels"])[1:] for sequence in sequences]
        supervised = [np.flatnonzero(target != IGNORE_INDEX) for target in targets]
        labels = np.concatenate([target[places] for target, places in zip(targets, supervised, strict=True)])
        if tree:
            inputs = _lay_out_tree(tree)
            positions = [tree.paths[end][places] for end, places in zip(tree.ends, supervised, strict=True)]
        else:
            inputs, starts = self._lay_end_to_end(ids) if self.padding_free else self._pad_to_longest(ids)
            positions = [start + places for start, places in zip(starts, supervised, strict=True)]
        counts, tokens = [len(places) for places in supervised], sum(map(len, ids))
        return (
            inputs
            | _get_targets(np.concatenate(positions), labels, repeats=tree is not None)
            | _get_weights(sequences, supervised)
            | {
                "conversation": torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(counts)),
                "source": torch.tensor([sequence.get("source", 0) for sequence in sequences]),
                "num_tokens": tokens,
                "num_computed": len(tree.ids) if tree else tokens,
                "num_supervised": sum(counts),
                "num_conversations": len(sequences),
                "sources": [tuple(sequence.get(name) for name in ("file", "line", "id")) for sequence in sequences],
            }
        )

    def _lay_end_to_end(self, sequences: Sequence[NDArray[Any]]) -> tuple[dict[str, Any], list[int]]:
        lengths = [len(ids) for ids in sequences]
        starts = [0, *accumulate(lengths)]
        boundaries = torch.tensor(starts, dtype=torch.int32)
        inputs = {
            "input_ids": torch.from_numpy(np.concatenate(sequences)).long()[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "conversation_lengths": tuple(lengths),
        }
        return inputs, starts[:-1]

    def _pad_to_longest(self, sequences: Sequence[NDArray[Any]]) -> tuple[dict[str, Any], list[int]]:
        batch = self._pad([{"input_ids": ids.tolist()} for ids in sequences])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        width = ids.shape[1]
        starts = [
            i * width + (width - len(own) if self.padding_side == "left" else 0) for i, own in enumerate(sequences)
        ]
        # The tokenizer may pad with a token that the model has no embedding for; masked, any other will do.
        return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}, starts


def _lay_out_tree(tree: PrefixTree) -> dict[str, Any]:
    """Return the inputs of a prefix tree, whose branches attend to the path from their root to themselves.

    `position_ids` are depths. `branches` has parent (-1: none) and tokens of each branch, `path_keys`, shape (tokens of
    all paths,), the positions of the keys of each; boundaries and longest are those of branches and of their paths.
    """
    counts, lengths = [tokens for _, tokens in tree.branches], [len(path) for path in tree.paths]
    return {
        "input_ids": torch.from_numpy(tree.ids).long()[None],
        "position_ids": torch.from_numpy(tree.depths)[None],
        "cu_seq_lens_q": torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_length_q": max(counts),
        "max_length_k": max(lengths),
        "branches": tree.branches,
        "path_keys": torch.from_numpy(np.concatenate(tree.paths)),
    }


def _get_targets(positions: NDArray[Any], labels: NDArray[Any], *, repeats: bool) -> dict[str, torch.Tensor]:
    """Return positions and the labels of their next tokens; of repeated pairs one, and which one each target is."""
    if not repeats:
        return {"supervised": torch.from_numpy(positions), "labels": torch.from_numpy(labels).long()}
    width = int(labels.max(initial=0)) + 1
    pairs, copies = np.unique(positions * width + labels, return_inverse=True)
    return {
        "supervised": torch.from_numpy(pairs // width),
        "labels": torch.from_numpy(pairs % width).long(),
        "target_copies": torch.from_numpy(copies),
    }


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
