"""Steps of a run whose sequences share beginnings -> the tokens that its passes compute."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastchat_qlora.data.batching.prefix_index import PrefixIndex
from fastchat_qlora.data.batching.steps import PassSize, StepDataset, StepKey

SAMPLED_SEQUENCES = 8_000  # whose steps are cut into passes, about


class ComputedTokens(NamedTuple):
    """The tokens that passes compute, of a sample of an epoch's steps."""

    largest: int  # of a pass
    lengths: NDArray[np.int64]  # of the sequences
    saved: NDArray[np.int64]  # of sequences in a pass with others: the beginning that need not be computed again

    @property
    def share(self) -> float:
        """Computed tokens of those of all sequences."""
        return 1 - float(self.saved.sum() / self.lengths.sum())


def measure_passes(steps: StepDataset, count: int, prefixes: PrefixIndex, size: PassSize) -> ComputedTokens:
    """Cut steps of the first epoch as the run does, evenly spread ones of `count` where there are many sequences."""
    every = -(-len(prefixes.lengths) // SAMPLED_SEQUENCES)
    cut = (steps.plan(StepKey(0, number, size)) for number in range(0, count, every))
    passes = [np.asarray(indices) for processes in cut for own in processes for indices in own if len(indices)]
    indices, owners = np.concatenate(passes), np.repeat(np.arange(len(passes)), [len(one) for one in passes])
    _, saved = prefixes.find_saved(indices, owners)
    largest = max(int(prefixes.count_each(indices, owners).max()), int(prefixes.lengths.max()))
    return ComputedTokens(largest, prefixes.lengths[indices], saved.astype(np.int64))
