"""A sampling strategy, seed and epoch -> the order in which conversations are trained on."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastchat_qlora.data.batching.packing import PackedDataset, PackingSampler, get_column
from fastchat_qlora.data.batching.prefix_index import PrefixIndex, find_clusters

GROUPED_STEPS = 50  # optimizer steps that group_by_length draws its batches of, at most
LEAST_GROUPS = 4  # of steps in an epoch, so that small data is not in order of length
CLUSTERED = ("random", "batch_rebalance")  # strategies whose order may change so that clusters stay together
WAITING = 64  # clusters that wait for a step with enough room, at most


def find_conversations(dataset: Any) -> NDArray[np.int64]:
    """Return where each conversation of a dataset begins, and its end; the sequences of one stand side by side.

    A repeated conversation counts as another one.
    """
    records = dataset.data.column("record").to_numpy()
    rows = np.arange(len(records)) if dataset._indices is None else dataset._indices.column(0).to_numpy().astype(int)
    records = records[rows]
    begins = np.flatnonzero((records[1:] != records[:-1]) | (rows[1:] <= rows[:-1])) + 1
    return np.concatenate([[0], begins, [len(rows)]])


def number_conversations(bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of the conversation of each sequence, for what find_conversations returns."""
    sizes = np.diff(bounds)
    return np.repeat(np.arange(len(sizes)), sizes)


class ConversationSampler(torch.utils.data.Sampler[list[int]]):
    """The conversations of an epoch, each as the indices of its sequences, in the order of a sampling strategy.

    Only seed and epoch decide it. transformers' samplers do not take part in resuming: group_by_length draws from the
    global generator, and batch_rebalance has a seed of its own (5.23).

    Args:
        bounds: from find_conversations.
        lengths: tokens of each sequence.
        strategy: value of --train_sampling_strategy; batch_rebalance sorts each step, which is balanced anyway.
        per_step: conversations of all processes in an optimizer step.
        clusters: conversations that are to be in one step.
    """

    def __init__(
        self,
        bounds: NDArray[np.int64],
        lengths: NDArray[Any],
        strategy: str,
        seed: int,
        per_step: int,
        clusters: Sequence[NDArray[np.int64]] = (),
    ) -> None:
        self._bounds, self._strategy, self._seed, self._per_step = bounds, strategy, seed, per_step
        self._lengths = np.add.reduceat(lengths, bounds[:-1])
        self._clusters = clusters if strategy in CLUSTERED else ()
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[list[int]]:
        for conversation in self._draw().tolist():
            yield list(range(self._bounds[conversation], self._bounds[conversation + 1]))

    def _draw(self) -> NDArray[np.int64]:
        if self._strategy == "sequential":
            return np.arange(len(self))
        if self._strategy == "random":  # as accelerate's SeedableRandomSampler draws it
            generator = torch.Generator().manual_seed(self._seed + self._epoch)
            order = torch.randperm(len(self), generator=generator).numpy()
        else:
            order = np.random.default_rng((self._seed, self._epoch)).permutation(len(self))
        if self._strategy == "group_by_length":
            return group_by_length(order, self._lengths, self._per_step)
        if len(self._clusters):
            order = keep_together(order, self._clusters, self._per_step)
        if self._strategy == "batch_rebalance":
            return _sort_windows(order, self._lengths, self._per_step, self._per_step)
        return order


def build_sampler(
    dataset: Any, strategy: str, seed: int, per_step: int, prefixes: PrefixIndex | None
) -> ConversationSampler | PackingSampler:
    """Build a sampler whose order is decided by the seed and the epoch; what shares prefixes comes into one step."""
    if isinstance(dataset, PackedDataset):
        return dataset.sampler
    bounds, lengths = find_conversations(dataset), get_column(dataset, "length")
    clusters = [] if prefixes is None else find_clusters(prefixes, number_conversations(bounds), per_step)
    return ConversationSampler(bounds, lengths, strategy, seed, per_step, clusters)


def count_saved_by_steps(sampler: Any, prefixes: PrefixIndex, per_step: int) -> int:
    """Return the tokens of an epoch that need no second computation in steps of so many units of a sampler."""
    units = [*sampler]
    steps = np.repeat(np.arange(len(units)) // per_step, [len(unit) for unit in units])
    return prefixes.count_saved(np.concatenate([np.asarray(unit) for unit in units]), steps)


def group_by_length(order: NDArray[np.int64], lengths: NDArray[Any], per_step: int) -> NDArray[np.int64]:
    """Return many steps at a time sorted by length, so that a batch needs little padding; the longest comes first.

    Memory that does not suffice is then seen in the first step.
    """
    steps = max(1, min(len(order) // (per_step * LEAST_GROUPS), GROUPED_STEPS))
    grouped = _sort_windows(order, lengths, steps * per_step, per_step)
    longest = int(np.argmax(lengths[grouped]))
    grouped[[0, longest]] = grouped[[longest, 0]]
    return grouped


def _sort_windows(order: NDArray[np.int64], lengths: NDArray[Any], window: int, per_step: int) -> NDArray[np.int64]:
    """Return each window sorted by length, the longest first.

    Conversations beyond the last full step stay as they are: --dataloader_drop_last drops any of them, not the
    shortest.
    """
    full = len(order) - len(order) % per_step
    windows = [order[start : min(start + window, full)] for start in range(0, full, window)]
    return np.concatenate([*(part[np.argsort(-lengths[part], kind="stable")] for part in windows), order[full:]])


def keep_together(order: NDArray[np.int64], clusters: Sequence[NDArray[np.int64]], per_step: int) -> NDArray[np.int64]:
    """Return an order in which a step has all of a cluster or none, as far as there is room.

    A cluster stands where its first conversation stood. One that does not fit into a step any more waits for the next
    one, and others go before it.
    """
    of = np.full(len(order), -1)
    for number, members in enumerate(clusters):
        of[members] = number
    _, first = np.unique(np.where(of < 0, len(clusters) + np.arange(len(of)), of)[order], return_index=True)
    leaders = order[np.sort(first)].tolist()
    found: list[int] = []
    waiting: list[list[int]] = []
    for leader in leaders:
        waiting.append([leader] if of[leader] < 0 else clusters[of[leader]].tolist())
        while waiting:
            room = per_step - len(found) % per_step
            fitting = next((i for i, group in enumerate(waiting) if len(group) <= room), None)
            if fitting is None and len(waiting) < WAITING:
                break
            found += waiting.pop(fitting or 0)
    return np.array([*found, *(one for group in waiting for one in group)])
