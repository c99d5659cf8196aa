"""Conversations of one batch: the targets of each, and the boundaries between them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import Padding
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded_data import load_splits
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.batching.collator import BATCH_INFO, Collator
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX

LAYOUTS = ("end to end", "padded on the right", "padded on the left")


def collator(tokenizer: Any, layout: str) -> Collator:
    tokenizer.padding_side = "left" if layout.endswith("left") else "right"
    return Collator(tokenizer, padding_free=layout == "end to end")


def targets(batch: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Return (conversation, token before, supervised token) of each target, read from the batch."""
    before = batch["input_ids"].flatten()[batch["supervised"]]
    return list(zip(batch["conversation"].tolist(), before.tolist(), batch["labels"].tolist(), strict=True))


def expected_targets(rows: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    return [
        (i, row["input_ids"][place - 1], row["labels"][place])
        for i, row in enumerate(rows)
        for place in range(1, len(row["labels"]))
        if row["labels"][place] != IGNORE_INDEX
    ]


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    ids = draw(st.lists(st.integers(1, 500), min_size=1, max_size=20))
    supervised = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return {"input_ids": ids, "labels": [i if keep else IGNORE_INDEX for i, keep in zip(ids, supervised, strict=True)]}


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(rows=st.lists(conversations(), min_size=1, max_size=5))
def test_targets_are_all_supervised_tokens_but_first_ones(layout: str, rows: list[dict[str, Any]]) -> None:
    """The token before a conversation's first token belongs to its neighbor, so a first token is no target."""
    batch = collator(Padding(), layout)(rows)
    assert targets(batch) == expected_targets(rows)
    *counted, sources = [batch[name] for name in BATCH_INFO]
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert counted == [tokens, tokens, len(expected_targets(rows)), len(rows)]
    assert all(type(count) is int for count in counted), "counted without a device"
    assert sources == [(None, None, None)] * len(rows), "nothing is known of these"


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(conversations(), min_size=1, max_size=5))
def test_end_to_end_batch_has_all_tokens_and_boundaries(rows: list[dict[str, Any]]) -> None:
    batch = collator(Padding(), "end to end")(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["input_ids"].tolist() == [[token for row in rows for token in row["input_ids"]]]
    assert batch["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    for boundaries in (batch["cu_seq_lens_q"], batch["cu_seq_lens_k"]):
        assert boundaries.dtype == torch.int32
        assert boundaries[0] == 0 and boundaries.diff().tolist() == lengths
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    assert batch["conversation_lengths"] == tuple(lengths)
    assert "attention_mask" not in batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_mask_goes_by_length(side: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """The mask depends on the length, not on the token.

    Both sequences contain the padding token itself, which stays visible. The padding that is masked is the first token
    of the vocabulary, which every model can embed.
    """
    pad = tokenizer.pad_token_id
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, pad, pad], "labels": [-100, pad, pad], "id": "ignored", "reason": ""},
        {"input_ids": [7, 8, 9, 10, pad], "labels": [-100, -100, 9, 10, pad], "id": None, "reason": ""},
    ]
    batch = collator(tokenizer, f"padded on the {side}")(rows)
    assert set(batch) == {"input_ids", "attention_mask", "supervised", "labels", "conversation", "source", *BATCH_INFO}
    width = batch["input_ids"].shape[1]
    assert width >= 5
    for i, row in enumerate(rows):
        filling = width - len(row["input_ids"])
        for name, values, filler in (
            ("input_ids", row["input_ids"], 0),
            ("attention_mask", [1] * len(row["input_ids"]), 0),
        ):
            added = [filler] * filling
            assert batch[name][i].tolist() == (values + added if side == "right" else added + values)
    assert targets(batch) == [(0, 5, pad), (0, pad, pad), (1, 8, 9), (1, 9, 10), (1, 10, pad)]
    seen = batch["attention_mask"].flatten()
    assert seen[batch["supervised"]].all(), "nothing is predicted from padding"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lazy", [False, True])
def test_batch_of_a_dataset_has_all_targets(
    lazy: bool, layout: str, data_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    train = load_splits(data_file, tokenizer, tmp_path, lazy_preprocess=lazy)["train"]
    rows = [train[i] for i in range(4)]
    lengths = [len(row["input_ids"]) for row in rows]
    batch = collator(tokenizer, layout)(rows)
    assert targets(batch) == expected_targets(rows) != []
    if layout == "end to end":
        assert batch["cu_seq_lens_q"].diff().tolist() == lengths
    else:
        assert batch["attention_mask"].sum(dim=1).tolist() == lengths
        real = batch["input_ids"][batch["attention_mask"].bool()]
        assert real.tolist() == [token for row in rows for token in row["input_ids"]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_stand_beside_their_targets(layout: str) -> None:
    """A conversation without weights has 1 for each target; a batch of such conversations has none."""
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weights": None},
        {"input_ids": [8, 9, 10, 11], "labels": [8, -100, 10, 11], "weights": [0.5, 0.0, 0.25, 1.0]},
    ]
    batch = collator(Padding(), layout)(rows)
    assert batch["labels"].tolist() == [6, 7, 10, 11]
    assert batch["weights"].tolist() == [1.0, 1.0, 0.25, 1.0] and batch["weights"].dtype == torch.float32
    assert "weights" not in collator(Padding(), layout)(rows[:1])


def test_width_is_rounded_up_to_a_multiple_of_eight(tokenizer: PreTrainedTokenizerFast) -> None:
    for longest, width in ((5, 8), (8, 8), (9, 16)):
        rows = [{"input_ids": [5] * length, "labels": [5] * length} for length in (2, longest)]
        batch = collator(tokenizer, "padded on the right")(rows)
        assert {tuple(batch[name].shape) for name in ("input_ids", "attention_mask")} == {(2, width)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_may_have_no_targets(layout: str, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = collator(tokenizer, layout)([{"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX] * 3}])
    assert batch["num_supervised"] == 0
    for name in ("supervised", "labels", "conversation"):
        assert batch[name].shape == (0,) and batch[name].dtype == torch.long, name
