"""Lengths -> packed sequences: each conversation once, nothing too long, the same for the same seed and epoch."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_qlora.data.batching.packing import PackingSampler, pack_best_fit

Row = list[int]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)), capacity


def naive(lengths: list[int], capacity: int) -> list[int]:
    """Return the room left in each bin by a direct implementation of best-fit decreasing."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else capacity
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


def lengths_in(rows: list[Row], lengths: list[int]) -> list[list[int]]:
    return sorted(sorted(lengths[index] for index in row) for row in rows)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_each_conversation_is_packed_once_within_capacity(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    rows = pack_best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= capacity for row in rows)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_packing_is_best_fit_decreasing(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    rooms = sorted(capacity - sum(lengths[index] for index in row) for row in pack_best_fit(lengths, capacity))
    assert rooms == naive(lengths, capacity)


@settings(max_examples=100, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_order_of_conversations_does_not_matter(problem: tuple[list[int], int], order: random.Random) -> None:
    lengths, capacity = problem
    shuffled = order.sample(lengths, len(lengths))
    assert lengths_in(pack_best_fit(shuffled, capacity), shuffled) == lengths_in(
        pack_best_fit(lengths, capacity), lengths
    )


def test_packed_sequences_are_nearly_full() -> None:
    """Lengths are distributed as in chats: many short ones and a long tail.

    In their original order, packed sequences would be a fifth empty.
    """
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 2000).astype(int), 8, 2048)
    rows = pack_best_fit(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) > 0.99


LENGTHS = [5, 9, 3, 3, 7, 2, 8, 4, 4, 6, 1, 9, 5, 5, 3]


def rows_of(sampler: PackingSampler, epoch: int) -> list[Row]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_seed_and_epoch_decide_the_packing() -> None:
    one, same, other = (PackingSampler(LENGTHS, 10, seed) for seed in (7, 7, 8))
    second = rows_of(one, 1)
    assert rows_of(one, 0) != second, "another epoch, other rows in another order"
    assert rows_of(same, 1) == second == rows_of(one, 1)
    assert rows_of(other, 1) != second
    for epoch in range(4):
        rows = rows_of(one, epoch)
        assert len(rows) == len(one)
        assert sorted(index for row in rows for index in row) == list(range(len(LENGTHS)))
        assert all(sum(LENGTHS[index] for index in row) <= 10 for row in rows)


def test_conversations_of_equal_length_change_places() -> None:
    """Otherwise two of them would share a packed sequence in every epoch."""
    sampler = PackingSampler([5] * 8, 10, seed=1)
    partners = {tuple(sorted(row)) for epoch in range(10) for row in rows_of(sampler, epoch) if 0 in row}
    assert len(partners) > 2
