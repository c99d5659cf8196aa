"""Lengths of sequences -> packed sequences that are nearly full."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

Pack = Callable[[np.ndarray[Any, Any]], list[list[int]]]


def get_column(dataset: Any, name: str) -> Any:
    """Return a column of numbers of a dataset as a NumPy array, for the rows that the dataset selects."""
    values = dataset.data.column(name).to_numpy()
    return values if dataset._indices is None else values[dataset._indices.column(0).to_numpy()]


def pack_best_fit(lengths: Sequence[int] | np.ndarray[Any, Any], capacity: int) -> list[list[int]]:
    """Pack by best-fit decreasing: the longest first, each into the fullest bin that still has room for it.

    It needs at most 11/9 of the fewest bins possible, and 6/9 of a bin (Dosa 2007); with conversations, bins are 99 %
    full and more. Bins are kept by the room left in them, and one integer has a bit for each room that some bin has, so
    that the smallest sufficient room is found by arithmetic, not by search. For example, rooms of 2 and 5 tokens give
    the bits 100100; for a length of 3, a shift by 3 leaves 100, whose lowest bit is number 2, so the room is 3 + 2.

    Args:
        lengths: tokens of each conversation, from 1 to `capacity`; of equal lengths the first is placed first.
        capacity: tokens of a bin.

    Returns:
        The indices of the conversations in each bin. The number of bins and the lengths in each depend on the lengths
        only, not on their order.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = defaultdict(list)  # room left -> the bins that have it
    occupied = 0
    for index in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[index])
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                occupied ^= 1 << room
        else:
            room, chosen = capacity, []
            bins.append(chosen)
        chosen.append(index)
        by_room[room - length].append(chosen)
        occupied |= 1 << (room - length)
    return bins


class PackingSampler(torch.utils.data.Sampler[list[int]]):
    """The packed sequences of an epoch in random order, each as the indices of its conversations.

    Seed and epoch decide everything, so a resumed run sees the same sequences. Conversations of equal length change
    places from epoch to epoch, and so do the sequences; their number does not change.

    Args:
        lengths: tokens of each conversation.
        capacity: tokens of a packed sequence.
        pack: returns the conversations of each packed sequence from those of all in random order, as
            PrefixPacker.pack does; best-fit by length by default.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray[Any, Any], capacity: int, seed: int, pack: Pack | None = None
    ) -> None:
        self.capacity = capacity
        self._lengths, self._seed = np.asarray(lengths), seed
        self._pack = pack or self._pack_by_length
        self._epoch, self._drawn = 0, -1
        self._rows: list[list[int]] = []  # of the epoch that was drawn last

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that comes next."""
        self._epoch = epoch

    def without_sharing(self) -> "PackingSampler":
        """Return one that packs by length."""
        return PackingSampler(self._lengths, self.capacity, self._seed)

    def __len__(self) -> int:
        return len(self._rows or self._draw())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._draw())

    def _draw(self) -> list[list[int]]:
        if self._drawn != self._epoch:
            random = np.random.default_rng((self._seed, self._epoch))
            rows = self._pack(random.permutation(len(self._lengths)))
            self._rows = [rows[i] for i in random.permutation(len(rows)).tolist()]
            self._drawn = self._epoch
        return self._rows

    def _pack_by_length(self, order: np.ndarray[Any, Any]) -> list[list[int]]:
        return [order[own].tolist() for own in pack_best_fit(self._lengths[order], self.capacity)]


class PackedDataset(torch.utils.data.Dataset[list[Any]]):
    """Conversations, and the sampler that packs them."""

    def __init__(self, conversations: Any, sampler: PackingSampler) -> None:
        self.conversations = conversations
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)
