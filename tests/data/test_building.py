"""How many processes preprocess."""

import os

import pytest

from fastchat_qlora.data.building import choose_workers

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
