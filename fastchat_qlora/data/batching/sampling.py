"""A sampling strategy, seed and epoch -> the order in which sequences are trained on."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

GROUPED_STEPS = 50  # optimizer steps that group_by_length draws its batches of, at most
LEAST_GROUPS = 4  # of steps in an epoch, so that small data is not in order of length


class StepShape(NamedTuple):
    """Sequences of a full optimizer step."""

    batch: int  # of a process in one pass
    processes: int
    passes: int  # of each process

    @property
    def at_once(self) -> int:
        """Sequences of all processes in one pass."""
        return self.batch * self.processes

    @property
    def total(self) -> int:
        """Sequences of the step."""
        return self.at_once * self.passes


class SequenceSampler(torch.utils.data.Sampler[int]):
    """The sequences of an epoch in the order of a sampling strategy, which only seed and epoch decide.

    Each process takes every so many of the batches that are cut from it. transformers' samplers do not take part in
    resuming: group_by_length draws from the global generator, and batch_rebalance has a seed of its own (5.23).
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray[Any, Any], strategy: str, seed: int, step: StepShape
    ) -> None:
        self._lengths, self._strategy, self._seed, self._step = np.asarray(lengths), strategy, seed, step
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = np.arange(len(self))
        if self._strategy == "random":  # as accelerate's SeedableRandomSampler draws it
            generator = torch.Generator().manual_seed(self._seed + self._epoch)
            order = torch.randperm(len(self), generator=generator).numpy()
        elif self._strategy != "sequential":
            order = np.random.default_rng((self._seed, self._epoch)).permutation(len(self))
            order = (group_by_length if self._strategy == "group_by_length" else rebalance)(
                order, self._lengths, self._step
            )
        yield from order.tolist()


def group_by_length(
    order: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], step: StepShape
) -> np.ndarray[Any, Any]:
    """Return many steps at a time sorted by length, so that a batch needs little padding; the longest comes first.

    Memory that does not suffice is then seen in the first step.
    """
    steps = max(1, min(len(order) // (step.total * LEAST_GROUPS), GROUPED_STEPS))
    grouped = _sort_windows(order, lengths, steps * step.total, step)
    longest = int(np.argmax(lengths[grouped]))
    grouped[[0, longest]] = grouped[[longest, 0]]
    return grouped


def rebalance(order: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], step: StepShape) -> np.ndarray[Any, Any]:
    """Return each step sorted by length, with its batches dealt so that all processes have as many tokens.

    The number of sequences in a batch stays: transformers' BatchRebalanceSampler makes larger ones of short sequences.
    """
    balanced = _sort_windows(order, lengths, step.total, step)
    full = len(order) - len(order) % step.at_once
    for start in range(0, full, step.total):
        window = balanced[start : min(start + step.total, full)]
        batches = window.reshape(-1, step.batch)
        window[:] = batches[_deal(lengths[batches].sum(1).tolist(), step.processes)].ravel()
    return balanced


def _deal(costs: Sequence[int], processes: int) -> list[int]:
    """Give each batch, the largest first, to the process with the least so far; all get as many batches.

    For example batches of 9, 4, 3 and 2 tokens for two processes: one gets 9 and 2, the other 4 and 3.

    Returns:
        The batches in the order in which the processes take turns.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    totals = [0] * processes
    for batch, cost in enumerate(costs):
        open_shares = (process for process in range(processes) if len(shares[process]) < len(costs) // processes)
        least = min(open_shares, key=totals.__getitem__)
        shares[least].append(batch)
        totals[least] += cost
    return [batch for turn in zip(*shares, strict=True) for batch in turn]


def _sort_windows(
    order: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], window: int, step: StepShape
) -> np.ndarray[Any, Any]:
    """Return each window sorted by length, the longest first.

    Sequences beyond the last full pass stay as they are: --dataloader_drop_last drops any of them, not the shortest.
    """
    full = len(order) - len(order) % step.at_once
    windows = [order[start : min(start + window, full)] for start in range(0, full, window)]
    return np.concatenate([*(part[np.argsort(-lengths[part], kind="stable")] for part in windows), order[full:]])
