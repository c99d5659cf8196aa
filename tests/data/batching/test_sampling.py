"""The order of conversations: each once, by seed and epoch alone, as the strategy promises, clusters in one step."""

import numpy as np
import pytest
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_qlora.data.batching.sampling import ConversationSampler, find_conversations

STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")
LENGTHS = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 1000).astype(int), 8, 2048)
PER_STEP = 12


def order(
    strategy: str, *, seed: int = 7, epoch: int = 0, per_step: int = PER_STEP, lengths: object = LENGTHS
) -> list[int]:
    """Return the order of conversations of one sequence each."""
    values = np.asarray(lengths)
    sampler = ConversationSampler(np.arange(len(values) + 1), values, strategy, seed, per_step)
    sampler.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler)
    return [one for (one,) in sampler]


def cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    per_step=st.integers(1, 40),
    strategy=st.sampled_from(STRATEGIES),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
)
def test_each_sequence_comes_once(lengths: list[int], per_step: int, strategy: str, seed: int, epoch: int) -> None:
    found = order(strategy, seed=seed, epoch=epoch, per_step=per_step, lengths=lengths)
    assert sorted(found) == list(range(len(lengths)))
    assert found == order(strategy, seed=seed, epoch=epoch, per_step=per_step, lengths=lengths)


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
    rows = [LENGTHS[batch] for batch in cut(indices, 2)]
    return 1 - LENGTHS.sum() / sum(len(row) * row.max() for row in rows)


def test_groups_need_little_padding_and_begin_with_the_longest() -> None:
    grouped = order("group_by_length")
    assert waste(grouped) < 0.03 < 0.25 < waste(order("random"))
    assert LENGTHS[grouped[0]] == LENGTHS.max()


def test_balanced_steps_are_drawn_at_random_and_sorted() -> None:
    balanced = order("batch_rebalance")
    assert waste(balanced) < 0.15
    draw = np.random.default_rng((7, 0)).permutation(len(LENGTHS)).tolist()
    steps = cut(balanced, PER_STEP)
    assert [sorted(step) for step in steps] == [sorted(step) for step in cut(draw, PER_STEP)]
    assert all((np.diff(LENGTHS[step]) <= 0).all() for step in steps[:-1])


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_any_sequence_may_be_dropped(strategy: str) -> None:
    """What --dataloader_drop_last leaves out is not always the shortest; the longest comes first in groups."""
    dropped = {order(strategy, seed=seed, lengths=LENGTHS[:13])[-1] for seed in range(200)}
    assert dropped == {*range(13)} - ({int(LENGTHS[:13].argmax())} if strategy == "group_by_length" else set())


def test_conversations_are_the_sequences_of_a_record_side_by_side() -> None:
    """Also where rows are selected, and where a record is repeated, even directly after itself."""
    data = Dataset.from_dict({"record": [3, 3, 5, 6, 6, 6]})
    assert find_conversations(data).tolist() == [0, 2, 3, 6]
    assert find_conversations(data.select([2, 3, 4, 5, 3, 4, 5, 0])).tolist() == [0, 1, 4, 7, 8]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 60), per_step=st.integers(2, 12), seed=st.integers(0, 99))
def test_clusters_stay_in_one_step(data: st.DataObject, count: int, per_step: int, seed: int) -> None:
    """All but those for which there is no room; conversations of no cluster keep their order."""
    sizes = data.draw(st.lists(st.integers(2, per_step), max_size=5))
    shuffled = np.random.default_rng(seed).permutation(count)
    clusters = [part for part in np.split(shuffled, np.cumsum(sizes))[:-1] if len(part) > 1]
    bounds, lengths = np.arange(count + 1), np.ones(count, dtype=int)
    plain = [one for (one,) in ConversationSampler(bounds, lengths, "random", seed, per_step)]
    found = [one for (one,) in ConversationSampler(bounds, lengths, "random", seed, per_step, clusters)]
    assert sorted(found) == list(range(count))
    clustered = {int(one) for cluster in clusters for one in cluster}
    assert [one for one in found if one not in clustered] == [one for one in plain if one not in clustered]
    place = {one: index // per_step for index, one in enumerate(found)}
    split = [cluster for cluster in clusters if len({place[int(one)] for one in cluster}) > 1]
    assert len(split) <= 1 if len(clustered) < count // 2 else len(split) <= len(clusters)
