"""Sequences that begin alike: the index of a dataset against a comparison of all ids."""

from itertools import chain, takewhile

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_qlora.data.batching import prefix_index
from fastchat_qlora.data.batching.prefix_index import LEAST_SHARED, build_prefix_index, find_clusters

Ids = list[int]

LENGTHS = st.sampled_from([1, 31, 32, 33, 64, 100])
PIECES = st.builds(lambda token, length: [token] * length, st.integers(0, 2), LENGTHS)
SEQUENCES = st.lists(
    st.lists(PIECES, min_size=1, max_size=4).map(lambda parts: [*chain.from_iterable(parts)]), min_size=1, max_size=12
)


def make_dataset(sequences: list[Ids]) -> Dataset:
    """Return a dataset as the cache has it: in several chunks."""
    column = pa.chunked_array(
        [pa.array(sequences[i : i + 3], pa.list_(pa.int32())) for i in range(0, len(sequences), 3)]
    )
    return Dataset(pa.table({"input_ids": column, "length": pa.array([len(ids) for ids in sequences], pa.int32())}))


def count_common(one: Ids, other: Ids) -> int:
    """Return the tokens that both begin with, rounded down."""
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return common - common % LEAST_SHARED


def list_prefixes(ids: Ids) -> list[tuple[int, ...]]:
    return [tuple(ids[:end]) for end in range(LEAST_SHARED, len(ids) + 1, LEAST_SHARED)]


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.data())
def test_index_shares_what_ids_share(sequences: list[Ids], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=20))
    rows = data.draw(st.sampled_from([rows, list(range(len(sequences)))[1:] or [0]]))  # with a mapping, or a slice
    index = build_prefix_index(make_dataset(sequences).select(rows))
    chosen = [sequences[row] for row in rows]
    assert sorted(index.rank.tolist()) == list(range(len(rows)))
    places = np.argsort(index.rank)
    for i, first in enumerate(places.tolist()):
        for j in range(i + 1, len(rows)):
            assert index.count_shared(np.array([i, j]))[1] == count_common(chosen[first], chosen[places[j]])
    part = data.draw(st.sets(st.integers(0, len(rows) - 1)).map(sorted))
    own = [chosen[number] for number in part]
    distinct = {prefix for ids in own for prefix in list_prefixes(ids)}
    assert index.count_computed(part) == LEAST_SHARED * len(distinct) + sum(len(ids) % LEAST_SHARED for ids in own)


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.integers(1, 6), st.data())
def test_clusters_are_the_largest_groups_that_fit(sequences: list[Ids], most: int, data: st.DataObject) -> None:
    """Group by all prefixes, as the definition has it."""
    numbers = data.draw(st.lists(st.integers(0, 5), min_size=len(sequences), max_size=len(sequences)))
    index = build_prefix_index(make_dataset(sequences))
    groups = {prefix: set[int]() for ids in sequences for prefix in [(), *list_prefixes(ids)]}
    for i, ids in enumerate(sequences):
        for prefix in [(), *list_prefixes(ids)]:
            groups[prefix].add(i)
    conversations = {prefix: {numbers[i] for i in members} for prefix, members in groups.items()}
    best: dict[int, tuple[int, int]] = {}
    for prefix, own in conversations.items():
        parent = prefix[:-LEAST_SHARED]
        if prefix and 1 < len(own) <= most and (not parent or len(conversations[parent]) > most):
            members = sorted(index.rank[[*groups[prefix]]])
            shared = int(index.count_shared(np.array(members))[1:].min())
            for number in own:
                best[number] = min(best.get(number, (0, 0)), (-shared, int(members[0])))
    expected = [{number for number in best if best[number] == key} for key in set(best.values())]
    found = find_clusters(index, np.array(numbers), most)
    assert sorted(map(sorted, found)) == sorted(sorted(own) for own in expected if len(own) > 1)


def test_order_of_sequences_that_share_nothing_stays() -> None:
    sequences = [[i] * 50 for i in range(20)]
    index = build_prefix_index(make_dataset(sequences))
    assert index.rank.tolist() == list(range(20))
    assert index.count_computed(range(20)) == 20 * 50
    assert find_clusters(index, np.arange(20), 4) == []


def test_answers_to_one_question_are_a_cluster_behind_a_system_prompt() -> None:
    system, questions = [1] * 100, [[7 + i] * 64 for i in range(3)]
    sequences = [[*system, *questions[i % 3], 20 + i] for i in range(9)]
    index = build_prefix_index(make_dataset(sequences))
    clusters = [one.tolist() for one in find_clusters(index, np.arange(9) + 100, 4)]
    assert clusters == [[100, 103, 106], [101, 104, 107], [102, 105, 108]]
    assert index.count_computed([0, 3, 1]) == 165 + 5 + (165 - 96)
    assert find_clusters(index, np.arange(9), 2) == []  # any two share the system prompt


def test_slices_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    parts = [random.integers(0, 1000, size).tolist() for size in (40, 70, 200)]
    sequences = [parts[i % 3] + random.integers(0, 1000, 1 + i * 7 % 90).tolist() for i in range(40)]
    whole, part = make_dataset(sequences), make_dataset(sequences[:13])
    dataset = concatenate_datasets([whole, part])
    expected = build_prefix_index(dataset)
    monkeypatch.setattr(prefix_index, "SLICE_TOKENS", 100)
    sliced = build_prefix_index(dataset)
    assert (sliced.rank == expected.rank).all() and (sliced.shared == expected.shared).all()
    assert expected.count_computed([0, 40]) - len(sequences[0]) == len(sequences[0]) % LEAST_SHARED


def test_dataset_of_short_sequences_and_empty_selection() -> None:
    index = build_prefix_index(make_dataset([[1, 2], [1, 2], [3]]))
    assert index.count_computed([0, 1, 2]) == 5
    assert index.count_computed([]) == 0
