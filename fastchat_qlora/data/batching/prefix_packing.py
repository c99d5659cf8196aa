"""Sequences that begin alike -> packed sequences in which each token that they share is counted once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastchat_qlora.data.batching.packing import pack_best_fit
from fastchat_qlora.data.batching.prefix_index import Ints, PrefixIndex, count_up

MOST_TRAINED = 16  # times its computed tokens that a packed sequence may train on: attention reads them all


class Units(NamedTuple):
    """What stays together: the sequences of a conversation that begin alike, in the order of a tree."""

    sequences: Ints  # shape (sequences,): those of one unit after those of another
    starts: Ints  # shape (units + 1,)
    computed: Ints  # tokens of each by itself
    trained: Ints  # of each
    shared: Ints  # tokens that each shares with the one before it


class Parts(NamedTuple):
    """Parts of a tree that fit into one packed sequence, each a range of Units.sequences."""

    starts: Ints
    stops: Ints
    costs: Ints


class Fork(NamedTuple):
    """A beginning of units that do not fit into one packed sequence together."""

    depth: int  # its tokens
    parent: int  # the index of the fork before it; -1 for none
    parts: Parts


class Row(NamedTuple):
    """The sequences of a packed sequence, the tokens that it computes, and the first place of one of them."""

    sequences: list[int]
    cost: int
    first: int


class PrefixPacker:
    """A packer that fills packed sequences by the tokens that they compute.

    A tree that does not fit is cut, and each of its parts has the beginning again. A packed sequence of `capacity`
    tokens may so train on many more. Attention reads all of them, so they are limited to MOST_TRAINED times the
    capacity: behind a fork a part takes no smaller share of the room left than of that limit.

    Args:
        conversations: shape (sequences,): the number of the conversation of each.
        capacity: tokens that a packed sequence computes, at least those of the longest sequence.
    """

    def __init__(self, index: PrefixIndex, conversations: Ints, capacity: int) -> None:
        self._capacity = capacity
        self._units = _make_units(index, conversations, capacity)
        self._forks = self._cut()

    def pack(self, order: Ints) -> list[list[int]]:
        """Return the sequences of each packed sequence; the number of these does not depend on the order.

        Args:
            order: all sequences; of parts with equal costs, that of the first sequence is placed first.
        """
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        places = np.append(places[self._units.sequences], 0)
        waiting: list[list[Row]] = [[] for _ in self._forks]
        for number, fork in reversed([*enumerate(self._forks)]):
            rows = self._fill(fork, waiting[number], places)
            if fork.parent < 0:
                return [row.sequences for row in rows]
            waiting[fork.parent] += rows
        return []

    def _fill(self, fork: Fork, filled: Sequence[Row], places: Ints) -> list[Row]:
        """Pack the parts behind a fork, and rows that were filled behind later ones.

        Args:
            places: shape (sequences + 1,): the place in the order of each of Units.sequences.
        """
        (starts, stops, costs), sequences = fork.parts, self._units.sequences
        firsts = np.minimum.reduceat(places, np.stack([starts, stops], axis=1).ravel())[::2]
        firsts = np.append(firsts, [row.first for row in filled]).astype(np.int64)
        costs = np.append(costs, [row.cost - fork.depth for row in filled]).astype(np.int64)
        parts = [sequences[start:stop].tolist() for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        parts += [row.sequences for row in filled]
        order = np.argsort(firsts)
        costs, placed = costs[order].tolist(), order.tolist()
        return [
            Row(
                [number for i in own for number in parts[placed[i]]],
                fork.depth + sum(costs[i] for i in own),
                int(firsts[placed[min(own)]]),
            )
            for own in pack_best_fit(costs, self._capacity - fork.depth)
        ]

    def _cut(self) -> list[Fork]:
        """Return the forks of the tree at which it has to be cut, each after the one before it in the tree."""
        _, starts, computed, trained, shared = self._units
        added, trained = (np.append(0, np.cumsum(tokens)) for tokens in (computed - shared, trained))
        forks: list[Fork] = []
        todo = [(0, len(computed), 0, -1)]
        while todo:
            first, last, depth, parent = todo.pop()
            edges = np.array([first, *(np.flatnonzero(shared[first + 1 : last] == depth) + first + 1), last])
            begins, ends, room = edges[:-1], edges[1:], self._capacity - depth
            costs = computed[begins] - depth + added[ends] - added[begins + 1]
            limit = MOST_TRAINED * self._capacity
            costs = np.maximum(costs, -((trained[begins] - trained[ends]) * room // limit))  # rounded up
            fits = (costs <= room) | (ends == begins + 1)
            for begin, end in zip(begins[~fits].tolist(), ends[~fits].tolist(), strict=True):
                todo.append((begin, end, int(shared[begin + 1 : end].min()), len(forks)))
            forks.append(Fork(depth, parent, Parts(starts[begins[fits]], starts[ends[fits]], costs[fits])))
        return forks


def _make_units(index: PrefixIndex, conversations: Ints, capacity: int) -> Units:
    """Return the units: of a conversation that does not fit into a packed sequence each sequence is one."""
    ordered, shared = index.ordered
    tree = np.cumsum(shared == 0)
    place = np.lexsort((conversations[ordered], tree))
    sequences, owner = ordered[place], np.stack([tree, conversations[ordered]])[:, place]
    first = np.append(True, (owner[:, 1:] != owner[:, :-1]).any(0))[: len(place)]
    ranks, lengths = index.rank[sequences], index.lengths[sequences]
    common = np.zeros(len(place), dtype=np.int64)
    follows = np.flatnonzero(~first)
    common[follows] = index.count_common(ranks[follows - 1], ranks[follows])
    computed, trained = (np.add.reduceat(tokens, np.flatnonzero(first)) for tokens in (lengths - common, lengths))
    first |= ((computed > capacity) | (trained > MOST_TRAINED * capacity))[np.cumsum(first) - 1]
    common[first] = 0
    starts = np.flatnonzero(first)
    computed, trained = (np.add.reduceat(tokens, starts) for tokens in (lengths - common, lengths))
    least = np.minimum.reduceat(np.where(first, lengths, common), starts)
    order = np.argsort(place[starts])
    sizes = np.diff(np.append(starts, len(place)))[order]
    starts, computed, trained, least = starts[order], computed[order], trained[order], least[order]
    begun = np.zeros(len(order), dtype=np.int64)
    follows = np.flatnonzero(owner[0, starts[1:]] == owner[0, starts[:-1]])
    between = index.count_common(ranks[starts[follows]], ranks[starts[follows + 1]])
    begun[follows + 1] = np.minimum(between, np.minimum(least[follows], least[follows + 1]))
    sequences = sequences[np.repeat(starts, sizes) + count_up(sizes)]
    return Units(sequences, np.append(0, np.cumsum(sizes)), computed, trained, begun)
