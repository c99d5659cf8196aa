"""How many processes preprocess, and which rejections are counted as one kind."""

import os

import pytest

from fastchat_qlora.data.building import choose_workers, kind_of

GIB = 2**30


@pytest.mark.parametrize(
    ("asked", "cores", "size", "workers"),
    [
        (None, 2, 100 * GIB, 1),
        (None, 7, 100 * GIB, 1),
        (None, 8, 100 * GIB, 2),
        (None, 64, 100 * GIB, 16),
        (None, 64, GIB // 4, 4),
        (None, 64, 1000, 1),
        (None, 64, 0, 1),
        (3, 2, 0, 3),
        (1, 64, 100 * GIB, 1),
    ],
)
def test_workers_follow_cores_and_data(
    asked: int | None, cores: int, size: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert choose_workers(asked, size) == workers


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
        ("nothing to learn stands within the first 512 tokens", "nothing to learn stands within the first N tokens"),
    ],
)
def test_reasons_that_differ_only_in_details_are_one_kind(reason: str, kind: str) -> None:
    assert kind_of(reason) == kind
