"""The order of sequences: each once, by seed and epoch alone, in batches as the strategy promises."""

import numpy as np
import pytest
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastchat_qlora.data.batching.sampling import SequenceSampler, StepShape

STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")
LENGTHS = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 1000).astype(int), 8, 2048)
STEP = StepShape(batch=2, processes=2, passes=3)


def order(
    strategy: str, *, seed: int = 7, epoch: int = 0, step: StepShape = STEP, lengths: object = LENGTHS
) -> list[int]:
    sampler = SequenceSampler(np.asarray(lengths), strategy, seed, step)
    sampler.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler)
    return list(sampler)


def cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    step=st.builds(StepShape, st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)),
    strategy=st.sampled_from(STRATEGIES),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
)
def test_each_sequence_comes_once(lengths: list[int], step: StepShape, strategy: str, seed: int, epoch: int) -> None:
    found = order(strategy, seed=seed, epoch=epoch, step=step, lengths=lengths)
    assert sorted(found) == list(range(len(lengths)))
    assert found == order(strategy, seed=seed, epoch=epoch, step=step, lengths=lengths)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seed_and_epoch_decide_the_order(strategy: str) -> None:
    orders = {(seed, epoch): tuple(order(strategy, seed=seed, epoch=epoch)) for seed in (1, 3) for epoch in (0, 1)}
    assert len({*orders.values()}) == (1 if strategy == "sequential" else 4)


def test_random_order_is_that_of_accelerate() -> None:
    sampler = SeedableRandomSampler(range(50), data_seed=11)
    for epoch in (0, 4):
        sampler.set_epoch(epoch)
        assert list(sampler) == order("random", seed=11, epoch=epoch, lengths=LENGTHS[:50])


def waste(indices: list[int]) -> float:
    """Return the share of padding in batches of two."""
    rows = [LENGTHS[batch] for batch in cut(indices, STEP.batch)]
    return 1 - LENGTHS.sum() / sum(len(row) * row.max() for row in rows)


def imbalance(indices: list[int]) -> float:
    """Return the mean of how much more the busiest of two processes has to do in a step than both on average."""
    tokens = LENGTHS[indices][: len(indices) // STEP.total * STEP.total]
    by_process = tokens.reshape(-1, STEP.passes, STEP.processes, STEP.batch).sum((1, 3))
    return float((by_process.max(1) / by_process.mean(1)).mean() - 1)


def test_groups_need_little_padding_and_begin_with_the_longest() -> None:
    grouped = order("group_by_length")
    assert waste(grouped) < 0.03 < 0.25 < waste(order("random"))
    assert LENGTHS[grouped[0]] == LENGTHS.max()


def test_processes_have_as_much_to_do() -> None:
    balanced = order("batch_rebalance")
    assert imbalance(balanced) < 0.1 < 0.18 < imbalance(order("random"))
    assert waste(balanced) < 0.15
    steps = [sorted(step) for step in cut(balanced, STEP.total)]
    draw = np.random.default_rng((7, 0)).permutation(len(LENGTHS)).tolist()
    assert steps == [sorted(step) for step in cut(draw, STEP.total)], "a step is drawn at random"


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_any_sequence_may_be_dropped(strategy: str) -> None:
    """What --dataloader_drop_last leaves out is not always the shortest; the longest comes first in groups."""
    dropped = {order(strategy, seed=seed, lengths=LENGTHS[:13])[-1] for seed in range(200)}
    assert dropped == {*range(13)} - ({int(LENGTHS[:13].argmax())} if strategy == "group_by_length" else set())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("skipped", [0, 2])
def test_processes_share_the_order(strategy: str, processes: int, skipped: int) -> None:
    """Each takes every so many of its batches, also after a resume within an epoch."""
    step = StepShape(2, processes, 2)
    expected = cut(order(strategy, epoch=2, step=step, lengths=LENGTHS[:16]), 2)
    shares = []
    for process in range(processes):
        sampler = SequenceSampler(LENGTHS[:16], strategy, 7, step)
        loader = DataLoader(range(16), sampler=sampler, batch_size=2, collate_fn=lambda batch: batch)
        prepared = prepare_data_loader(loader, num_processes=processes, process_index=process)
        prepared = skip_first_batches(prepared, skipped) if skipped else prepared
        sampler.set_epoch(2)
        prepared.set_epoch(2)
        shares.append(list(prepared))
    assert [batch for turn in zip(*shares, strict=True) for batch in turn] == expected[skipped * processes :]
