"""Packed sequences in which each shared token counts once: full by what they compute; as before where none is."""

from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefix_index import SEQUENCES, Ids, list_prefixes, make_dataset

from fastchat_qlora.data.batching.packing import PackingSampler, pack_best_fit
from fastchat_qlora.data.batching.prefix_index import LEAST_SHARED, PrefixIndex, build_prefix_index
from fastchat_qlora.data.batching.prefix_packing import MOST_TRAINED, PrefixPacker
from fastchat_qlora.data.batching.prefix_tree import build_prefix_tree


def pack_epochs(index: PrefixIndex, numbers: list[int], capacity: int, epochs: int = 3) -> list[list[list[int]]]:
    packer = PrefixPacker(index, np.array(numbers), capacity)
    sampler = PackingSampler(index.lengths, capacity, seed=1, pack=packer.pack)
    packed = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        packed.append([*sampler])
        assert len(packed[-1]) == len(sampler)
    return packed


def require_room(row: list[Ids], capacity: int) -> None:
    """Require that a row has as few tokens as it may: by its distinct beginnings of whole blocks, and once laid out."""
    blocks = {prefix for ids in row for prefix in list_prefixes(ids)}
    counted = LEAST_SHARED * len(blocks) + sum(len(ids) % LEAST_SHARED for ids in row)
    tree = build_prefix_tree([np.array(ids) for ids in row])
    assert 0 < (len(tree.ids) if tree else sum(map(len, row))) <= counted <= capacity


@settings(max_examples=80, deadline=None)
@given(SEQUENCES, st.integers(400, 700), st.data())
def test_rows_hold_each_sequence_once_and_compute_no_more_than_fits(
    sequences: list[Ids], capacity: int, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=30))
    numbers = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    index = build_prefix_index(make_dataset(sequences).select(rows))
    for packed in pack_epochs(index, numbers, capacity):
        assert sorted(number for row in packed for number in row) == list(range(len(rows)))
        for row in packed:
            require_room([sequences[rows[number]] for number in row], capacity)


@settings(max_examples=80, deadline=None)
@given(SEQUENCES, st.data())
def test_what_a_conversation_shares_is_in_one_row_where_it_fits(sequences: list[Ids], data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 3), min_size=len(sequences), max_size=len(sequences)))
    index = build_prefix_index(make_dataset(sequences))
    conversations = defaultdict(list)
    for i, number in enumerate(numbers):
        if len(sequences[i]) >= LEAST_SHARED:
            conversations[number, tuple(sequences[i][:LEAST_SHARED])].append(i)
    for packed in pack_epochs(index, numbers, 400):
        row_of = {number: i for i, row in enumerate(packed) for number in row}
        for own in conversations.values():
            if index.count_computed(own) <= 400:
                assert len({row_of[number] for number in own}) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(90, 200))
def test_sequences_that_share_nothing_are_packed_as_by_length(lengths: list[int], capacity: int) -> None:
    index = build_prefix_index(make_dataset([[i] * length for i, length in enumerate(lengths)]))
    packer = PrefixPacker(index, np.arange(len(lengths)) // 2, capacity)
    shared, plain = (PackingSampler(lengths, capacity, 5, pack) for pack in (packer.pack, None))
    assert len(shared) == len(plain) == len(pack_best_fit(lengths, capacity))
    for epoch in range(2):
        shared.set_epoch(epoch)
        plain.set_epoch(epoch)
        assert [*shared] == [*plain]


def test_group_that_is_too_large_is_cut_and_each_piece_has_its_beginning() -> None:
    """Behind 96 tokens lie 40 pieces of 64, of which six fit into 512; others share nothing."""
    sequences = [[1] * 96 + [10 + i] * 64 for i in range(40)] + [[100 + i] * 200 for i in range(10)]
    index = build_prefix_index(make_dataset(sequences))
    for packed in pack_epochs(index, [*range(50)], 512):
        assert len(packed) == 7 + 5
        together = sorted(sum(number < 40 for number in row) for row in packed)
        assert together == [0, 0, 0, 0, 0, 4, 6, 6, 6, 6, 6, 6]
        assert sorted(index.count_computed(row) for row in packed) == [352, *[400] * 5, *[480] * 6]


def test_tokens_to_train_on_are_limited() -> None:
    sequences = [[1] * 256 + [2 + i] * 8 for i in range(400)]
    index = build_prefix_index(make_dataset(sequences))
    capacity = 1024
    for packed in pack_epochs(index, [*range(400)], capacity):
        trained = [int(index.lengths[row].sum()) for row in packed]
        assert MOST_TRAINED * capacity * 0.9 < max(trained) <= MOST_TRAINED * capacity
        assert len(packed) == 7


def test_copies_of_a_conversation_come_into_rows_of_their_own() -> None:
    """Repeated data is trained on one pass after another, and a row of copies would be one pass with more weight."""
    sequences = [[1] * 64 + [10 + i] * 64 for i in range(6)]
    index = build_prefix_index(make_dataset(sequences).select([*range(6), *range(6), 0]))
    assert index.copies.tolist() == [0] * 6 + [1] * 6 + [2]
    for packed in pack_epochs(index, [*range(6), *range(6), 0], 448):
        assert sorted(map(sorted, packed)) == [[*range(6)], [*range(6, 12)], [12]]
