"""Token ids of a dataset -> the sequences that begin alike, for plans of batches; the collator compares ids itself.

Beginnings are compared by hashes of their first 32, 64, ... tokens, so what two sequences share is rounded down.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
PrefixHashes = NDArray[np.uint64]

LEAST_SHARED = 32  # tokens: a shorter beginning is computed again, and what is shared is known in steps of so many
PREFIX_HASHES = "prefix_hashes"  # column of datasets without tokens, see hash_prefixes
SLICE_TOKENS = 2**16  # hashed at once, so that memory stays bounded
MULTIPLIER = 0x9E3779B97F4A7C15  # of the hash; odd, so that it has an inverse modulo 2**64


@dataclass(frozen=True, eq=False)
class PrefixIndex:
    """An order of all sequences in which those that begin alike stand side by side.

    It is that of a tree, depth first: what two sequences share is the least that neighbors share between them.
    """

    rank: Ints  # shape (sequences,): the place of each in the order
    shared: NDArray[np.int32]  # shape (sequences,): tokens that the one at each place shares with the one before it
    lengths: Ints  # shape (sequences,): tokens of each
    copies: Ints  # shape (sequences,): how often each stands before in the dataset, which repeats some

    def count_computed(self, indices: Any) -> int:
        """Return the tokens that a pass of these sequences computes, none of them twice in `indices`."""
        return int(self.count_each(np.asarray(indices, dtype=np.int64), np.zeros(len(indices), dtype=np.int64)).sum())

    def count_each(self, indices: Ints, passes: Ints) -> Ints:
        """Return the tokens that each of several passes computes, by the number of the pass of each sequence."""
        counts = np.bincount(passes, self.lengths[indices]).astype(np.int64)
        return counts - np.bincount(*self.find_saved(indices, passes), len(counts)).astype(np.int64)

    def find_saved(self, indices: Ints, passes: Ints) -> tuple[Ints, NDArray[np.int32]]:
        """Return the pass of each sequence that is not the first of one, and its tokens that others compute."""
        order = np.lexsort((self.rank[indices], passes))
        places, passes = self.rank[indices][order], passes[order]
        follows = np.flatnonzero(passes[1:] == passes[:-1])
        return passes[follows], self.count_common(places[follows], places[follows + 1])

    def count_saved(self, indices: Ints, passes: Ints) -> int:
        """Return the tokens that passes need not compute again; arguments as for count_each."""
        return int(self.find_saved(indices, passes)[1].sum())

    def shorten(self, length: int) -> "PrefixIndex":
        """Return the index of the sequences as cut to so many tokens."""
        cut = np.minimum(self.shared, length // LEAST_SHARED * LEAST_SHARED)
        return replace(self, lengths=np.minimum(self.lengths, length), shared=cut)

    def count_shared(self, places: Ints) -> NDArray[np.int32]:
        """Return the tokens that each of these shares with the one before it among them; places are increasing."""
        return np.append(np.zeros(1, dtype=np.int32), self.count_common(places[:-1], places[1:]))[: len(places)]

    def count_common(self, first: Ints, last: Ints) -> NDArray[np.int32]:
        """Return the tokens that two sequences share, of each pair of places, the smaller of which is in `first`."""
        level = np.minimum(np.frexp(last - first)[1] - 1, len(self._minima) - 1)
        common: NDArray[np.int32] = np.minimum(
            self._minima[level, first + 1], self._minima[level, last + 1 - (1 << level)]
        )
        return common

    @property
    def ordered(self) -> tuple[Ints, NDArray[np.int32]]:
        """The sequences in order, each pass over repeated data by itself, and what each shares with the one before.

        Copies of a conversation are to be trained on one after another, so that nothing brings them together.
        """
        if not self.copies.any():
            return np.argsort(self.rank), self.shared
        places = [np.sort(self.rank[self.copies == copy]) for copy in range(self.copies.max() + 1)]
        return np.lexsort((self.rank, self.copies)), np.concatenate([*map(self.count_shared, places)])

    @cached_property
    def _minima(self) -> NDArray[np.int32]:
        """The least of `shared` over 1, 2, 4, ... places from each on, up to a width at which all are 0."""
        levels, width = [self.shared], 1
        while levels[-1].any():
            wider = np.zeros_like(self.shared)
            wider[:-width] = np.minimum(levels[-1][:-width], levels[-1][width:])
            levels.append(wider)
            width *= 2
        return np.stack(levels)


class Prefixes(NamedTuple):
    """PrefixHashes of the beginnings of sequences, those of one after another."""

    hashes: PrefixHashes
    counts: Ints  # of each sequence

    @property
    def starts(self) -> Ints:
        """The index of each sequence's first hash."""
        return _begin(self.counts)


def hash_prefixes(ids: NDArray[Any], starts: NDArray[Any], counts: NDArray[Any]) -> PrefixHashes:
    """Return the hashes of the first 32, 64, ... ids of sequences, `counts` of each, which lie from `starts` on.

    They are polynomials modulo 2**64 (Karp and Rabin 1987), found for all at once as differences of one running sum.
    """
    powers, inverses = _compute_powers(max(2 * SLICE_TOKENS, 1 << len(ids).bit_length()))
    sums = np.zeros(len(ids) + 1, dtype=np.uint64)
    np.cumsum(ids.astype(np.uint64) * powers[: len(ids)], out=sums[1:])
    begins = np.repeat(starts, counts)
    hashes: PrefixHashes = (sums[begins + LEAST_SHARED * (count_up(counts) + 1)] - sums[begins]) * inverses[begins]
    return hashes


@lru_cache(maxsize=2)
def _compute_powers(size: int) -> tuple[PrefixHashes, PrefixHashes]:
    """Return the powers of the multiplier, and their inverses."""
    factors = (MULTIPLIER, pow(MULTIPLIER, -1, 2**64))
    powers, inverses = (np.multiply.accumulate(np.full(size, factor, dtype=np.uint64)) for factor in factors)
    return powers, inverses


def _begin(counts: NDArray[Any]) -> Ints:
    """Return where each begins of so many that lie one after another."""
    begins: Ints = np.cumsum(counts) - counts
    return begins


def count_up(counts: NDArray[Any]) -> Ints:
    """Return 0, 1, ... for each count, one after another."""
    return np.arange(counts.sum()) - np.repeat(_begin(counts), counts)


def build_prefix_index(dataset: Any) -> PrefixIndex:
    """Build the index of a dataset's sequences; those that share nothing keep their order and come first.

    About a second for 100 million tokens.
    """
    data, indices = dataset.data, dataset._indices
    rows = np.arange(len(dataset)) if indices is None else indices.column(0).to_numpy().astype(np.int64)
    begin_alike = _find_alike(data, rows)
    together, alone = np.flatnonzero(begin_alike), np.flatnonzero(~begin_alike)
    read = np.unique(rows[together])
    prefixes = _read_prefixes(data, read)
    own = np.searchsorted(read, rows[together])
    order, depths = _sort_prefixes(prefixes.hashes, prefixes.starts[own], prefixes.counts[own])
    rank = np.empty(len(rows), dtype=np.int64)
    rank[np.concatenate([alone, together[order]])] = np.arange(len(rows))
    shared = np.concatenate([np.zeros(len(alone), dtype=np.int32), LEAST_SHARED * depths])
    lengths = data.column("length").to_numpy()[rows].astype(np.int64)
    return PrefixIndex(rank, shared, lengths, _count_copies(rows))


def _count_copies(rows: Ints) -> Ints:
    """Return how often each row stands before."""
    order = np.argsort(rows, kind="stable")
    _, sizes = np.unique(rows, return_counts=True)
    copies = np.empty(len(rows), dtype=np.int64)
    copies[order] = count_up(sizes)
    return copies


def _find_alike(data: Any, rows: Ints) -> NDArray[np.bool_]:
    """Return whether each of these rows of a table has the first tokens of another of them."""
    read = np.unique(rows)
    first = _read_prefixes(data, read, most=1)
    alike = np.searchsorted(read, rows)
    is_long = first.counts[alike] > 0
    hashes = first.hashes[first.starts[alike[is_long]]]
    _, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    found = np.zeros(len(rows), dtype=bool)
    found[is_long] = sizes[group] > 1
    return found


def _read_prefixes(data: Any, rows: Ints, most: int | None = None) -> Prefixes:
    """Return the hashes of rows of a table, which are increasing, or the first ones of each."""
    stored = PREFIX_HASHES in data.column_names
    hashes, counts, done = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)], 0
    for offsets, values in _slice_lists(data.column(PREFIX_HASHES if stored else "input_ids")):
        own = rows[slice(*np.searchsorted(rows, [done, done + len(offsets) - 1]))] - done
        done += len(offsets) - 1
        starts, ends = offsets[own], offsets[own + 1]
        available = (ends - starts) // (1 if stored else LEAST_SHARED)
        counts.append(available if most is None else np.minimum(available, most))
        if stored:
            hashes.append(values[np.repeat(starts, counts[-1]) + count_up(counts[-1])])
        elif len(own):
            hashes.append(_hash_rows(values, starts, counts[-1], most))
    return Prefixes(np.concatenate(hashes), np.concatenate(counts))


def _hash_rows(values: NDArray[Any], starts: Ints, counts: Ints, most: int | None) -> PrefixHashes:
    if most is None:
        first, last = starts[0], starts[-1] + LEAST_SHARED * counts[-1]
        return hash_prefixes(values[first:last], starts - first, counts)
    kept = np.repeat(starts, LEAST_SHARED * counts) + count_up(LEAST_SHARED * counts)  # not the rest of each
    return hash_prefixes(values[kept], LEAST_SHARED * _begin(counts), counts)


def _slice_lists(column: Any) -> Iterator[tuple[Ints, NDArray[Any]]]:
    """Yield the offsets of a column's lists and their values, some rows at a time."""
    for chunk in column.chunks:
        offsets, values = chunk.offsets.to_numpy().astype(np.int64), chunk.values.to_numpy()
        edges = np.searchsorted(offsets, np.arange(offsets[0], offsets[-1], SLICE_TOKENS))
        edges = np.unique([*edges.tolist(), 0, len(chunk)])
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            start = offsets[first]
            yield offsets[first : last + 1] - start, values[start : offsets[last]]


def _sort_prefixes(hashes: PrefixHashes, starts: Ints, counts: Ints) -> tuple[Ints, NDArray[np.int32]]:
    """Return the order of a tree of sequences, and how many hashes each has in common with the one before it.

    From one hash to the next, groups of equal ones are cut into smaller ones; sequences that are alone drop out.
    """
    order, depths = np.arange(len(starts)), np.zeros(len(starts), dtype=np.int32)
    places, group = np.arange(len(starts)), np.zeros(len(starts), dtype=np.int64)  # of groups of two and more
    depth = 0
    while len(places):
        members = order[places]
        is_longer = counts[members] > depth
        keys = hashes[np.where(is_longer, starts[members] + depth, 0)]
        keys[~is_longer] = 0
        follows = group[1:] == group[:-1]
        mixed = np.unique(group[1:][follows & ((keys[1:] != keys[:-1]) | (is_longer[1:] != is_longer[:-1]))])
        if len(mixed):
            chosen = np.flatnonzero(np.isin(group, mixed))
            sorting = chosen[np.lexsort((keys[chosen], is_longer[chosen], group[chosen]))]
            order[places[chosen]] = members[sorting]
            keys[chosen], is_longer[chosen] = keys[sorting], is_longer[sorting]
        depth += 1
        alike = np.concatenate([[False], follows & is_longer[1:] & is_longer[:-1] & (keys[1:] == keys[:-1])])
        depths[places[alike]] = depth
        kept = alike | np.append(alike[1:], False)
        places, group = places[kept], np.cumsum(~alike)[kept]
    return order, depths


def find_clusters(index: PrefixIndex, conversations: Ints, most: int) -> list[Ints]:
    """Return groups of at most `most` conversations that save computation in one optimizer step.

    Those of a group share more than any two of the next larger group do, which is too large for a step: a system
    prompt of all data needs no groups, since every step has it, but the answers to one question behind it do.

    Args:
        conversations: shape (sequences,): the number of the conversation of each sequence.
        most: at least 1.

    Returns:
        Groups of two and more, increasing, none of which has a conversation of another.
    """
    names, own = np.unique(conversations, return_inverse=True)
    order, shared = index.ordered
    places, members = np.arange(len(own)), own[order]
    first = shared == 0  # of a group
    found = [np.empty((3, 0), dtype=np.int64)]  # conversations, what those of their group share, and its first place
    while len(places):
        least = _find_least(shared[places], first)
        group, starts = np.cumsum(first) - 1, np.flatnonzero(first)
        pairs = np.unique(group * len(names) + members[places])
        sizes = np.bincount(pairs // len(names))
        fitting = pairs[((sizes > 1) & (sizes <= most))[pairs // len(names)]]
        begin = starts[fitting // len(names)]
        found.append(np.stack([fitting % len(names), least[begin], places[begin]]))
        too_large = sizes[group] > most
        first = (first | (shared[places] == least))[too_large]
        places = places[too_large]
    return [names[chosen] for chosen in _choose_deepest(np.concatenate(found, axis=1))]


def _find_least(shared: NDArray[np.int32], first: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return the least that neighbors in a group share, for each of its places."""
    inner = np.where(first, np.iinfo(np.int32).max, shared)
    least: NDArray[np.int32] = np.minimum.reduceat(inner, np.flatnonzero(first))[np.cumsum(first) - 1]
    return least


def _choose_deepest(found: Ints) -> list[Ints]:
    """Return the members of groups of two and more, each in the group that shares most of those that it is found in."""
    members, _, groups = found[:, np.lexsort((found[2], -found[1], found[0]))]
    kept = np.append(True, members[1:] != members[:-1])[: len(members)]
    order = np.argsort(groups[kept], kind="stable")
    members, groups = members[kept][order], groups[kept][order]
    clusters = np.split(members, np.flatnonzero(groups[1:] != groups[:-1]) + 1)
    return sorted((one for one in clusters if len(one) > 1), key=lambda one: int(one[0]))
