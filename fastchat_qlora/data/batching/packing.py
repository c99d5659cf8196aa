"""Lengths -> rows: which conversations are laid end to end so that rows are full."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastchat_qlora.data.batching.collator import count_max_batch_tokens


def get_column(rows: Any, name: str) -> Any:
    """A column of numbers as a NumPy array, of the rows that a dataset selects."""
    values = rows.data.column(name).to_numpy()
    return values if rows._indices is None else values[rows._indices.column(0).to_numpy()]


def pack_best_fit(lengths: Sequence[int] | np.ndarray[Any, Any], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room for it.

    It needs at most 11/9 of the fewest rows possible, and 6/9 of a row (Dosa 2007); with conversations it fills
    rows to 99 % and more. Rows with the same room left are kept under that number, and one integer has a bit for each
    number under which there are any: the lowest bit at or above a length is found by arithmetic, not by search.

    Args:
        lengths: tokens of each conversation, from 1 to `capacity`; of equal lengths the first is placed first.
        capacity: the most tokens of a row.

    Returns:
        The rows, each with the indices of its conversations. How many there are, and what lengths each holds, depend
        on the lengths only, not on their order.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> the rows that have it
    occupied = 0
    for index in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[index])
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        occupied |= 1 << (room - length)
    return rows


class PackingSampler(torch.utils.data.Sampler[list[int]]):
    """The rows of an epoch in random order, each as the indices of its conversations.

    Seed and epoch decide everything, so a resumed run sees the rows it would have seen. Conversations of one length
    change places from epoch to epoch, and so do the rows; how many rows there are does not change.

    Args:
        lengths: tokens of each conversation.
        capacity: the most tokens of a row.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray[Any, Any], capacity: int, seed: int) -> None:
        self.capacity = capacity
        self._lengths, self._seed = np.asarray(lengths), seed
        self._epoch = 0
        self._count = len(pack_best_fit(self._lengths, capacity))

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self._seed, self._epoch))
        order = random.permutation(len(self._lengths))
        rows = pack_best_fit(self._lengths[order], self.capacity)
        for row in random.permutation(len(rows)).tolist():
            yield order[rows[row]].tolist()


class PackedDataset(torch.utils.data.Dataset[list[Any]]):
    """A dataset of conversations that is asked for rows of them.

    Args:
        conversations: a dataset that takes a list of indices and gives each column as a list.
        sampler: says which conversations make a row.
    """

    def __init__(self, conversations: Any, sampler: PackingSampler) -> None:
        self.conversations = conversations
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next.

        Of several processes each has its share of the rows, and on a resume in the middle of an epoch accelerate finds
        no way through to the sampler and turns to the dataset (1.15, `DataLoaderShard.set_epoch`).
        """
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, row: list[int]) -> list[dict[str, Any]]:
        return [self.conversations[index] for index in row]

    def __getitems__(self, rows: list[list[int]]) -> list[dict[str, Any]]:
        """The conversations of several rows, one after the other; DataLoader asks for a batch in this way."""
        return self[[index for row in rows for index in row]]


def find_max_batch_tokens(rows: Any, batch_size: int, *, padding_free: bool) -> int:
    """The most tokens that a micro-batch of so many rows can have, padding included."""
    if isinstance(rows, PackedDataset):
        return int(min(batch_size, len(rows)) * rows.sampler.capacity)
    return count_max_batch_tokens(get_column(rows, "length"), batch_size, padding_free=padding_free)
