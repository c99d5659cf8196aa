"""Weights of messages, from the record to the batch: the same tokens, and a column that costs nothing without any."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from families import Padding
from loaded_data import load_splits
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.analysis.statistics import compute_statistics, format_statistics
from fastchat_qlora.data.batching.collator import Collator

USER = {"role": "user", "content": "Hi?"}
RECORDS: list[dict[str, Any]] = [
    {
        "messages": [
            USER,
            {"role": "assistant", "content": "Alpha.", "loss_weight": 0.25},
            USER,
            {"role": "assistant", "content": "Beta."},
        ]
    },
    {"messages": [USER, {"role": "assistant", "content": "Gamma."}]},
    {
        "messages": [
            USER,
            {"role": "assistant", "content": "A", "loss": False},
            USER,
            {"role": "assistant", "content": "B", "weight": 0.5},
        ]
    },
]


def load(records: list[dict[str, Any]], tokenizer: Any, tmp_path: Path, **flags: Any) -> Any:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_splits(path, tokenizer, tmp_path, cache_dir=tmp_path / "cache", mode="worker", **flags)["train"]


def weights_by_text(row: dict[str, Any], tokenizer: Any) -> list[tuple[str, float]]:
    """Return each supervised token with its weight."""
    weights = row["weights"] or [1.0] * len(row["labels"])
    pairs = zip(row["labels"], weights, strict=True)
    return [(tokenizer.decode([label]), weight) for label, weight in pairs if label != -100]


@pytest.mark.parametrize("conv_template", ["auto", "chatml"])
@pytest.mark.parametrize("lazy", [False, True])
def test_weights_reach_the_batch(
    lazy: bool, conv_template: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = load(RECORDS, tokenizer, tmp_path, lazy_preprocess=lazy, conv_template=conv_template)
    plain = [
        {"messages": [{name: turn[name] for name in ("role", "content", "loss") if name in turn} for turn in turns]}
        for turns in (record["messages"] for record in RECORDS)
    ]
    same = load(plain, tokenizer, tmp_path, lazy_preprocess=lazy, conv_template=conv_template)
    for row, other in zip(rows, same, strict=True):
        assert all(row[name] == other[name] for name in ("input_ids", "labels", "supervised"))
        assert other["weights"] is None
    first, second, third = (weights_by_text(row, tokenizer) for row in rows)
    assert rows[1]["weights"] is None and {weight for _, weight in second} == {1.0}
    end = [text for text, _ in first].index("<|im_end|>") + 1
    assert [weight for _, weight in first] == [0.25] * end + [1.0] * (len(first) - end)
    assert third == [("B", 0.5), ("<|im_end|>", 0.5)]
    batch = Collator(Padding(), padding_free=True)([rows[i] for i in range(3)])
    assert batch["weights"].tolist() == [weight for row in (first, second, third) for _, weight in row]


@pytest.mark.parametrize("lazy", [False, True])
def test_statistics_show_the_sum_of_weights(lazy: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = load(RECORDS, tokenizer, tmp_path, lazy_preprocess=lazy)
    total = sum(weight for row in rows for _, weight in weights_by_text(row, tokenizer))
    statistics = compute_statistics(rows)
    assert statistics.weight == pytest.approx(total) and statistics.weight < statistics.supervised
    assert format_statistics(statistics)["weight of these"] == f"{total:.1f}"
    assert compute_statistics(rows.select([2])).weight == 1.0
    assert "weight of these" not in format_statistics(compute_statistics(rows.select([1])))


def test_parts_of_a_split_conversation_keep_their_weights(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    turns = [
        turn for i in range(8) for turn in (USER, {"role": "assistant", "content": f"{i}", "weight": i / 8 + 0.125})
    ]
    rows = load([{"messages": turns}], tokenizer, tmp_path, overlong="split", max_length=60)
    found = [pair for row in rows for pair in weights_by_text(row, tokenizer)]
    assert len(rows) > 1
    assert found == [pair for i in range(8) for pair in ((f"{i}", i / 8 + 0.125), ("<|im_end|>", i / 8 + 0.125))]


def test_column_of_weights_costs_nothing_without_any(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Not more than four bytes a sequence, beside 8 for each token."""
    column = load([RECORDS[1]] * 200, tokenizer, tmp_path).data.column("weights")
    assert column.null_count == 200 and column.type == pa.list_(pa.float32())
    assert column.nbytes <= 200 * 5


@pytest.mark.parametrize(
    ("fields", "train_on", "count"),
    [
        ({"loss": True}, "assistant", 2),
        ({"weight": 0.5}, "assistant", 2),
        ({"loss": False}, "assistant", 0),
        ({"weight": None}, "assistant", 0),
        ({}, "assistant", 0),
        ({"masked": True}, "all", 2),
        ({"loss": True}, "all", 0),
    ],
)
def test_weights_of_other_roles_are_counted(
    fields: dict[str, Any],
    train_on: str,
    count: int,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    notices: pytest.LogCaptureFixture,
) -> None:
    answer = {"role": "assistant", "content": "Yes."}
    load(
        [{"messages": [USER | fields, answer]}] * 2 + [{"messages": [USER, answer]}],
        tokenizer,
        tmp_path,
        train_on=train_on,
    )
    logged = "  a weight of another message than the assistant's has no effect: 2 records"
    assert (logged in "\n".join(notices.messages).split("\n")) == (count == 2)
