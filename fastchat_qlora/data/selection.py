"""Tokenized conversations -> those that a run uses: without duplicates, a share of each source, some of them repeated.

The seed decides what is taken. All is done by numbers of records, after the cache, so that other settings tokenize
nothing again.
"""

import logging
from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from fastchat_qlora.config.mixture import DataEntry
from fastchat_qlora.data.analysis.duplicates import (
    Finding,
    FindingKind,
    RecordTable,
    find_duplicates,
    find_leaked,
    find_leaks,
    find_other_answers,
)
from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.dataset import LoadedData, LoadMode, SourceCounts, Splits, summarize
from fastchat_qlora.errors import UserError, raise_errors

logger = logging.getLogger(__name__)

SAMPLING, REPEATING = 1, 2  # streams of random numbers, beside that of --eval_split


class Selection:
    """The choice among the accepted records of one flag; its arrays have the shape (records,)."""

    def __init__(self, data: LoadedData) -> None:
        self.data = data
        self.table = RecordTable.read(data.sequences)
        self.sources = get_column(data.sequences, "source")[self.table.rows]
        self.is_dropped = np.zeros(len(self.sources), dtype=bool)
        self.is_sampled = np.ones(len(self.sources), dtype=bool)
        self.findings: list[Finding] = []
        self.errors: list[str] = []

    @property
    def used(self) -> NDArray[np.int64]:
        """The indices of the records that are used."""
        return np.flatnonzero(self.is_sampled & ~self.is_dropped)

    def find_duplicates(self, duplicates: str) -> None:
        """Count the records that stood before in the same data, and drop them if that is asked for."""
        finding, found = find_duplicates(self.table)
        self.findings += [finding, find_other_answers(self.table)]
        self.is_dropped[found] = duplicates == "drop"

    def sample(self, seed: int) -> None:
        """Take the share and the number of conversations that each entry asks for."""
        for i, source in enumerate(self.data.sources):
            among = np.flatnonzero((self.sources == i) & ~self.is_dropped)
            size = _count_sampled(source.entry, len(among))
            if not source.read and len(self.sources):
                self.errors.append(f"{self.data.flag} {source.entry}: has no records; leave it out, or give others")
            left_out = np.random.default_rng((seed, SAMPLING)).permutation(among)[size:]
            self.is_sampled[left_out] = False
            if len(among) and not size:
                self.errors.append(
                    f"{self.data.flag} {source.entry}: takes 0 of {len(among)} conversations; give a larger share"
                )

    def find_leaks(self, training: "Selection", duplicates: str) -> None:
        """Count the records that are trained on too, and drop them if that is asked for."""
        self.findings += find_leaks(self.table, self.used, training.table, training.used)
        if duplicates == "drop":
            self.is_dropped |= find_leaked(self.table, training.table, training.used) & self.is_sampled

    def find_errors(self, duplicates: str) -> list[str]:
        """Return errors about duplicates that must not be there, and about nothing that is left."""
        flag, equal = self.data.flag, (FindingKind.DUPLICATE, FindingKind.LEAK)
        found = [finding for finding in self.findings if finding.kind in equal and finding.size]
        if duplicates == "error" and found:
            described = "; ".join(finding.describe() for finding in found)
            return [*self.errors, f"--duplicates error: {flag} has {described}; remove them, or drop them by the flag"]
        if len(self.table.rows) and not len(self.used) and not self.errors:
            return [f"{flag}: no conversation is left: {self.is_dropped.sum()} are duplicates; give others"]
        return self.errors

    def apply(self) -> LoadedData:
        """Return the data with the used records only, and with all counts."""
        data, records = self.data, get_column(self.data.sequences, "record")
        used = np.isin(records, records[self.table.rows[self.used]])
        return data._replace(
            sequences=data.sequences if used.all() else data.sequences.select(np.flatnonzero(used)),
            sources=[self._count(i, source) for i, source in enumerate(data.sources)],
            findings=self.findings,
        )

    def _count(self, index: int, source: SourceCounts) -> SourceCounts:
        own = self.sources == index
        return source._replace(
            dropped=int((own & self.is_dropped).sum()),
            not_sampled=int((own & ~self.is_dropped & ~self.is_sampled).sum()),
        )


def _count_sampled(entry: DataEntry, available: int) -> int:
    """Return the number of conversations that an entry takes of those there are."""
    size = round(entry.share * available)
    return size if entry.max_samples is None else min(size, entry.max_samples)


def select_data(loaded: Splits[LoadedData], duplicates: str, seed: int, mode: LoadMode = "main") -> Splits[LoadedData]:
    """Choose the conversations that a run uses, and log the counts of all that were read.

    Args:
        duplicates: value of the flag of that name.

    Raises:
        UserError: an entry takes nothing, nothing is left, or there are duplicates and `duplicates` is error.
    """
    selections = [Selection(data) for data in loaded.named().values()]
    for selection in selections:
        selection.find_duplicates(duplicates)
        selection.sample(seed)
    for selection in selections[1:]:
        selection.find_leaks(selections[0], duplicates)
    selected = [selection.apply() for selection in selections]
    for data in selected:
        logger.info(summarize(data))
    errors = [error for selection in selections for error in selection.find_errors(duplicates)]
    if mode != "preview":
        raise_errors(errors)
    for error in errors:
        logger.warning(f"Training would stop here: {error}")
    return Splits(*selected)


def split_datasets(loaded: Splits[LoadedData], eval_split: float, seed: int) -> Splits[Dataset]:
    """Return the sequences to train on, repeated as their sources ask, and to evaluate on.

    Whole conversations are moved, and equal ones together: none must be trained on and then evaluated on.

    Args:
        eval_split: share or number of training conversations to evaluate on, chosen by the seed.
    """
    sequences, sources = loaded.train.sequences, loaded.train.sources
    if not eval_split:
        evaluated = loaded.eval and repeat_sequences(loaded.eval.sequences, loaded.eval.sources, seed)
        return Splits(repeat_sequences(sequences, sources, seed), evaluated)
    records = get_column(sequences, "record")
    conversations, rows = np.unique(records, return_index=True)
    size = int(eval_split if eval_split >= 1 else eval_split * len(conversations))
    held_out = _hold_out(get_column(sequences, "conversation_hash")[rows], size, seed)
    if not 0 < len(held_out) < len(conversations):
        together = ", since equal ones stay together," if 0 < size < len(conversations) else ""
        taken = f"{max(size, len(held_out))} of {len(conversations)} conversations{together}"
        raise UserError(
            f"--eval_split {eval_split:g}: takes {taken} and leaves nothing on one side; give another share or count, "
            "or --eval_data_path"
        )
    if len(held_out) != size:
        logger.info(f"--eval_split {eval_split:g}: {len(held_out)} are held out, since equal ones stay together.")
    is_held_out = np.isin(records, conversations[held_out])
    trained, evaluated = (sequences.select(np.flatnonzero(chosen)) for chosen in (~is_held_out, is_held_out))
    return Splits(repeat_sequences(trained, sources, seed), evaluated)


def _hold_out(hashes: NDArray[np.uint64], size: int, seed: int) -> NDArray[np.int64]:
    """Return `size` indices in random order, or nearly so many: all of those with equal hashes or none."""
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(hashes))
    if size >= len(hashes):
        return order
    _, first = np.unique(group[order], return_index=True)
    chosen, room = [], size
    groups = group[order][np.sort(first)].tolist()
    for one in groups:
        if counts[one] <= room:
            chosen.append(one)
            room -= counts[one]
    return order[np.isin(group[order], chosen or groups[: min(size, 1)])]


def repeat_sequences(sequences: Dataset, sources: Sequence[SourceCounts], seed: int) -> Dataset:
    """Return the sequences of an epoch, in which those of some sources stand several times.

    Each pass through the data is in its order. A fraction repeats so many more conversations once, chosen by the seed.
    """
    repeats = np.array([source.entry.repeat for source in sources])
    if not len(sources) or repeats.max() == 1:
        return sequences
    record, source = get_column(sequences, "record"), get_column(sequences, "source")
    passes = [np.flatnonzero((repeats >= number + 1)[source]) for number in range(int(repeats.max()))]
    passes.append(np.flatnonzero(np.isin(record, _choose_repeated(record, source, repeats % 1, seed))))
    return sequences.select(np.concatenate(passes))


def _choose_repeated(
    record: NDArray[np.int64], source: NDArray[np.int64], fractions: NDArray[np.float64], seed: int
) -> NDArray[np.int64]:
    """Return the records that are repeated once more, for the fraction of each source."""
    chosen = []
    for index, fraction in enumerate(fractions.tolist()):
        own = np.unique(record[source == index])
        chosen.append(np.random.default_rng((seed, REPEATING)).permutation(own)[: round(fraction * len(own))])
    return np.concatenate(chosen)
