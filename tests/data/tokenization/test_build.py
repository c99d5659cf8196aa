"""Number of preprocessing processes, size of batches, and generalized reasons of rejections."""

import json
import os
from typing import Any, NamedTuple

import pytest

from fastchat_qlora.data.sources.readers import RawRecord, Source
from fastchat_qlora.data.tokenization.build import (
    MAX_BATCH_CHARACTERS,
    MAX_BATCH_RECORDS,
    choose_workers,
    generalize,
    make_batches,
)

GIB = 2**30


class WorkersCase(NamedTuple):
    """Workers asked for, cores, bytes of data, and the workers chosen."""

    asked: int | None
    cores: int
    size: int
    chosen: int


@pytest.mark.parametrize(
    "case",
    [
        WorkersCase(None, cores=2, size=100 * GIB, chosen=1),
        WorkersCase(None, cores=7, size=100 * GIB, chosen=1),
        WorkersCase(None, cores=8, size=100 * GIB, chosen=2),
        WorkersCase(None, cores=64, size=100 * GIB, chosen=16),
        WorkersCase(None, cores=64, size=GIB // 4, chosen=4),
        WorkersCase(None, cores=64, size=1000, chosen=1),
        WorkersCase(None, cores=64, size=0, chosen=1),
        WorkersCase(3, cores=2, size=0, chosen=3),
        WorkersCase(1, cores=64, size=100 * GIB, chosen=1),
    ],
    ids=str,
)
def test_workers_follow_cores_and_data(case: WorkersCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(case.cores)), raising=False)
    assert choose_workers(case.asked, case.size) == case.chosen


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("message 3: empty answer", "empty answer"),
        ("message 12: contains the special token '</s>'", "contains the special token ..."),
        ("not a line of JSON in UTF-8: line 1 column 16", "not a line of JSON in UTF-8: line N column N"),
        (
            f"refused: {'very ' * 20}long",
            "refused: very very very very very very very very very very very very very ...",
        ),
        ("no supervised token within the first 512 tokens", "no supervised token within the first N tokens"),
    ],
)
def test_reasons_are_generalized(reason: str, kind: str) -> None:
    assert generalize(reason) == kind


HALF = "x" * (MAX_BATCH_CHARACTERS // 2)


def batch_sizes(values: list[Any]) -> list[int]:
    """Return the number of records in each batch."""
    numbered = list(make_batches(RawRecord(Source("f", i + 1), value) for i, value in enumerate(values)))
    assert [number for batch in numbered for number, _ in batch] == list(range(len(values)))
    return [len(batch) for batch in numbered]


@pytest.mark.parametrize(
    "record",
    [
        HALF.encode(),
        {"instruction": HALF},
        {"messages": [{"role": "user", "content": HALF}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [HALF]}}}]}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": HALF}}}}]},
        {"history": [[HALF, ""]]},
    ],
    ids=["line", "field", "message", "content part", "argument", "tool", "history"],
)
def test_batches_are_limited_by_text_anywhere_in_a_record(record: Any) -> None:
    """Two such records fill a batch; a hundred of them at once would need a hundred times the memory."""
    assert batch_sizes([record] * 5) == [2, 2, 1]


@pytest.mark.parametrize("value", [None, 5, float("nan"), "", [], {}, [None], {"messages": [5]}])
def test_batches_are_limited_by_number(value: Any) -> None:
    assert batch_sizes([value] * (MAX_BATCH_RECORDS + 1)) == [MAX_BATCH_RECORDS, 1]


def test_batches_are_limited_at_any_depth() -> None:
    lists: Any = HALF
    objects: Any = HALF
    for _ in range(100_000):
        lists, objects = [lists], {"a": objects}
    with pytest.raises(RecursionError):
        json.dumps(lists)
    assert batch_sizes([lists, objects, lists]) == [2, 1]
