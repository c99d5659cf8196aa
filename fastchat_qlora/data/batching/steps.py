"""Conversations of an optimizer step -> the passes of each process: as full, and as long, as one another.

A step is what the optimizer learns from, all its sequences in all processes. How it is cut into forward passes
(micro-batches) follows from their tokens: `plan_step`. Nothing here looks at token ids; lengths and a PrefixIndex tell
what a pass computes.
"""

import math
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastchat_qlora.data.batching.collator import BATCH_INFO, PADDING_MULTIPLE
from fastchat_qlora.data.batching.packing import PackedDataset, get_column
from fastchat_qlora.data.batching.prefix_index import PrefixIndex
from fastchat_qlora.data.batching.sampling import find_conversations
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX

LITTLE_WAITING = 0.01  # share of a step; as little is not worth passes of unequal cost
MOST_REPEATED = 0.05  # share of its tokens that a group may compute again so that passes have the preferred size

IDLE = "is_idle"  # of a sequence that only keeps a process in step with the others
NOTHING: dict[str, Any] = {name: [] if name == "sources" else 0 for name in BATCH_INFO}

PREFERRED_TOKENS, PREFERRED_TOKENS_ON_ACCELERATOR = {"cpu": 1536}, 8192
"""Tokens of a pass from which on longer ones are hardly faster, and need more memory."""

Passes = list[list[int]]  # sequences of each pass


class PassSize(NamedTuple):
    """Limits of a pass: in tokens, or in conversations."""

    preferred: int = 0  # tokens, if no sequence is longer
    most: int = 0  # tokens up to which sequences that share a beginning stay together
    units: int = 0  # conversations, or packed sequences, in place of tokens

    def scale(self, share: float) -> "PassSize":
        """Return a share of it."""
        return PassSize(*(math.ceil(share * limit) for limit in self))


class StepShape(NamedTuple):
    """Conversations, or packed sequences, of an optimizer step."""

    batch: int  # --per_device_train_batch_size
    accumulation: int  # --gradient_accumulation_steps
    processes: int

    @property
    def total(self) -> int:
        """Those of all processes."""
        return self.batch * self.accumulation * self.processes


class Cutting(NamedTuple):
    """How the optimizer steps of a run are cut into passes."""

    size: PassSize
    flag: str = "off"  # --micro_batch_tokens as given
    attention: float = 0.0  # see CostModel
    prefixes: PrefixIndex | None = None  # of the dataset, if what sequences share may be computed once
    must_share: bool = False  # --share_prefixes True

    @property
    def is_auto(self) -> bool:
        """Whether the size may follow from memory."""
        return self.flag == "auto"

    def to_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has of it."""
        return {"flag": self.flag, "size": [*self.size]}


def get_preferred_tokens(device_type: str) -> int:
    """Return the tokens of a pass that suit a kind of device."""
    return PREFERRED_TOKENS.get(device_type, PREFERRED_TOKENS_ON_ACCELERATOR)


def bound_pass_tokens(
    dataset: Any, size: PassSize, per_step: int, *, padding_free: bool, max_length: int | None = None
) -> int:
    """Return the most tokens of a pass whose sequences share nothing, padding included.

    Args:
        dataset: of sequences, or packed.
        per_step: conversations, or packed sequences, of a step.
        max_length: to which sequences would be cut, if they are not.
    """
    lengths = get_column(get_sequences(dataset), "length")
    lengths = lengths if max_length is None else np.minimum(lengths, max_length)
    width = int(lengths.max()) if padding_free else int(-(-lengths.max() // PADDING_MULTIPLE) * PADDING_MULTIPLE)
    if isinstance(dataset, PackedDataset):
        tokens, counts = np.full(len(dataset), min(dataset.sampler.capacity, max_length or np.inf)), None
    else:
        begins = find_conversations(dataset)
        tokens, counts = np.add.reduceat(lengths, begins[:-1]), np.diff(begins)
    sizes = np.sort(tokens if padding_free or counts is None else counts * width)
    if size.units:
        return int(sizes[-size.units :].sum())
    return int(min(max(size.preferred, width), sizes[-per_step:].sum()))


def get_sequences(dataset: Any) -> Any:
    """Return the sequences of a dataset, which may be packed."""
    return dataset.conversations if isinstance(dataset, PackedDataset) else dataset


def count_units(dataset: Any) -> int:
    """Return the number of conversations of a dataset, or of packed sequences: what the batch size counts."""
    return len(dataset) if isinstance(dataset, PackedDataset) else len(find_conversations(dataset)) - 1


class CostModel(NamedTuple):
    """The cost of a sequence in the cost of a token's linear layers."""

    attention: float = 0.0  # of the square of a sequence's length: keys of all its tokens
    is_padded: bool = False  # sequences of a pass cost as much as its longest


class _Piece(NamedTuple):
    """Sequences that stay in one pass, of consecutive places."""

    start: int
    stop: int
    cost: float
    tokens: int


class _Bin(NamedTuple):
    """A pass, or the share of a process."""

    cost: float
    tokens: int
    items: list[Any]  # pieces, or sequences


def plan_step(
    lengths: NDArray[Any],
    processes: int,
    size: PassSize,
    cost: CostModel,
    shared: NDArray[Any] | None = None,
) -> list[Passes]:
    """Cut a step into passes, so that all processes have as many, which cost about the same.

    Args:
        lengths: tokens of each sequence.
        shared: of each sequence, the tokens from its beginning on that the one before it has too.

    Returns:
        For each process its passes, the largest first, each as increasing places in `lengths`; a pass is empty if
        there are not enough sequences.
    """
    if cost.is_padded:
        pieces, places = _cut_by_width(lengths, processes, size, cost)
        shares = _deal([_Bin(piece.cost, piece.tokens, [piece]) for piece in pieces], processes)
    else:
        pieces, places = _cut_by_tokens(lengths, shared, processes, size, cost.attention), np.arange(len(lengths))
        shares = _fill(pieces, processes, size)
    return [
        [sorted(place for piece in one.items for place in places[piece.start : piece.stop].tolist()) for one in share]
        for share in shares
    ]


def _cut_by_tokens(
    lengths: NDArray[Any], shared: NDArray[Any] | None, processes: int, size: PassSize, attention: float
) -> list[_Piece]:
    """Return the sequences, those that share a beginning as one piece where it may be computed in one pass."""
    lengths = lengths.astype(np.float64)
    common = np.zeros_like(lengths) if shared is None else shared.astype(np.float64)
    own_cost = lengths * (1 + attention * lengths)
    begins = np.append(np.flatnonzero(common == 0), len(lengths))
    if len(begins) == len(lengths) + 1:
        return [
            _Piece(place, place + 1, *values)
            for place, values in enumerate(zip(own_cost.tolist(), lengths.astype(int).tolist(), strict=True))
        ]
    groups = _Groups(lengths, common, attention)
    pieces = [groups.measure(*bounds) for bounds in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True)]
    return groups.cut(pieces, processes, size)


class _Groups:
    """Sequences that share beginnings, in the order in which those that share most are neighbors."""

    def __init__(self, lengths: NDArray[np.float64], common: NDArray[np.float64], attention: float) -> None:
        self._common = common
        self._common_cost = common * (1 + attention * common)
        self._tokens = np.concatenate([[0], np.cumsum(lengths - common)])
        self._costs = np.concatenate([[0], np.cumsum(lengths * (1 + attention * lengths) - self._common_cost)])

    def measure(self, start: int, stop: int) -> _Piece:
        """Return the piece of some places, whose first sequence shares nothing of it."""
        cost = self._costs[stop] - self._costs[start] + self._common_cost[start]
        tokens = self._tokens[stop] - self._tokens[start] + self._common[start]
        return _Piece(start, stop, float(cost), int(tokens))

    def cut(self, pieces: list[_Piece], processes: int, size: PassSize) -> list[_Piece]:
        """Cut pieces that are too large, where the least is shared; the largest first."""
        total = sum(piece.cost for piece in pieces)
        done = [piece for piece in pieces if piece.stop - piece.start == 1]
        heap = [(-piece.cost, piece) for piece in pieces if piece.stop - piece.start > 1]
        heapify(heap)
        while heap:
            _, piece = heappop(heap)
            place = self._find_cut(piece)
            again, again_tokens = self._common_cost[place], self._common[place]
            # What other processes wait less, against what is computed more.
            shortens = piece.cost - total / processes > again
            is_cheap = piece.tokens > size.preferred and again_tokens <= MOST_REPEATED * piece.tokens
            if not (piece.tokens > size.most or shortens or is_cheap):
                done.append(piece)
                continue
            total += again
            for part in (self.measure(piece.start, place), self.measure(place, piece.stop)):
                if part.stop - part.start > 1:
                    heappush(heap, (-part.cost, part))
                else:
                    done.append(part)
        return done

    def _find_cut(self, piece: _Piece) -> int:
        """Return the place before which the least is shared, and of these the one nearest to the middle."""
        common = self._common[piece.start + 1 : piece.stop]
        places = piece.start + 1 + np.flatnonzero(common == common.min())
        middle = (self._costs[piece.start] + self._costs[piece.stop]) / 2
        return int(places[np.abs(self._costs[places] - middle).argmin()])


def _cut_by_width(
    lengths: NDArray[Any], processes: int, size: PassSize, cost: CostModel
) -> tuple[list[_Piece], NDArray[np.int64]]:
    """Return pieces of sequences of similar length, each a pass, and the order that they are cut from.

    A pass has as many positions as its sequences times the longest. There are no more passes than are needed, and the
    largest is as small as it can be then.
    """
    places = np.argsort(-lengths, kind="stable")
    widths = (-(-lengths[places] // PADDING_MULTIPLE) * PADDING_MULTIPLE).tolist()
    low, high = widths[0], max(size.preferred, widths[0])
    passes = -(-len(_split_widths(widths, high)) // processes) * processes
    while low < high:
        middle = (low + high) // 2
        if len(_split_widths(widths, middle)) <= passes:
            high = middle
        else:
            low = middle + 1
    bounds = [*_split_widths(widths, high), len(widths)]
    pieces = []
    for start, stop in pairwise(bounds):
        width, count = widths[start], stop - start
        pieces.append(_Piece(start, stop, count * width * (1 + cost.attention * width), count * width))
    return pieces, places


def _split_widths(widths: Sequence[int], positions: int) -> list[int]:
    """Return where each pass of up to so many positions begins, of decreasing widths."""
    begins, start = [0], 0
    for place, _ in enumerate(widths):
        if (place + 1 - start) * widths[start] > positions and place > start:
            start = place
            begins.append(start)
    return begins


def _fill(pieces: Sequence[_Piece], processes: int, size: PassSize) -> list[list[_Bin]]:
    """Return the passes of each process: the fewest of the preferred size, filled evenly.

    A piece above that size is a pass by itself, and then others may be as large.
    """
    small = [piece.tokens for piece in pieces if piece.tokens <= size.preferred]
    capacity = max(size.preferred, *(piece.tokens for piece in pieces))
    needed = len(pieces) - len(small) + sum(small) / size.preferred
    most = -(-len(pieces) // processes)
    passes = min(most, max(1, math.ceil(needed / processes)))
    ordered = sorted(pieces, key=lambda piece: (-piece.cost, piece.start))
    while True:
        bins = _fill_evenly(ordered, passes * processes)
        if passes >= most or all(one.tokens <= capacity for one in bins):
            break
        passes += 1
    shares = _deal(bins, processes)
    if _compute_waiting(shares) <= LITTLE_WAITING:
        return shares
    # Few pieces in a pass make passes of unequal cost; processes have more of them.
    by_process = [_fill_evenly(own.items, passes) for own in _fill_evenly(ordered, processes)]
    others = [sorted(own, key=lambda one: -one.cost) for own in by_process]
    fits = all(one.tokens <= capacity for own in others for one in own)
    return others if fits and _compute_waiting(others) < _compute_waiting(shares) else shares


def _fill_evenly(pieces: Sequence[_Piece], count: int) -> list[_Bin]:
    """Give each piece, the most costly first, to the bin with the least so far (LPT, Graham 1969)."""
    bins: list[list[_Piece]] = [[] for _ in range(count)]
    heap = [(0.0, number) for number in range(count)]
    for piece in pieces:
        total, number = heap[0]
        bins[number].append(piece)
        heapreplace(heap, (total + piece.cost, number))
    return [_Bin(total, sum(piece.tokens for piece in bins[number]), bins[number]) for total, number in heap]


def _compute_waiting(shares: Sequence[Sequence[_Bin]]) -> float:
    """Return the share of a step that processes wait for the slowest."""
    costs = [sum(one.cost for one in share) for share in shares]
    return 1 - sum(costs) / (len(costs) * max(costs))


def _deal(bins: Sequence[_Bin], processes: int) -> list[list[_Bin]]:
    """Give passes to processes, in turns of the most costly: the process with the least gets the most."""
    ordered = sorted(bins, key=lambda one: -one.cost)
    shares: list[list[_Bin]] = [[] for _ in range(processes)]
    totals = [0.0] * processes
    for start in range(0, len(ordered), processes):
        turn = ordered[start : start + processes]
        turn += [_Bin(0.0, 0, [])] * (processes - len(turn))
        by_total = sorted(range(processes), key=totals.__getitem__)
        for process, one in zip(by_total, turn, strict=True):
            shares[process].append(one)
            totals[process] += one.cost
    return shares


class StepKey(NamedTuple):
    """Name of an optimizer step."""

    epoch: int
    number: int  # in the epoch
    size: PassSize  # of its passes


class StepSampler(torch.utils.data.Sampler[list[StepKey]]):
    """The names of an epoch's steps, for a DataLoader that makes one batch of each."""

    def __init__(self, steps: int, size: PassSize) -> None:
        self._steps = steps
        self.epoch, self.size = 0, size  # of the steps that are named from now on

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[StepKey]]:
        for number in range(self._steps):
            yield [StepKey(self.epoch, number, self.size)]


class StepDataset(torch.utils.data.Dataset[list[list[dict[str, Any]]]]):
    """The steps of a run by their names, as one process takes them: the sequences of each of its passes.

    A pass of a process that has less to do than the others is a sequence of two tokens without targets, since all
    strategies need the same passes of all processes.

    Args:
        sequences: the dataset.
        units: yields the sequences of each conversation or packed sequence of an epoch.
        process: of those in `shape`.
        prefixes: a PrefixIndex of the dataset, if what sequences share is computed once.
    """

    def __init__(
        self,
        sequences: Any,
        units: Any,
        shape: StepShape,
        process: int,
        cost: CostModel,
        prefixes: PrefixIndex | None = None,
    ) -> None:
        self._sequences, self._units, self._shape, self._process = sequences, units, shape, process
        self._cost, self._prefixes = cost, prefixes
        self._lengths = get_column(sequences, "length") if prefixes is None else prefixes.lengths
        self._drawn: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, key: StepKey) -> list[list[dict[str, Any]]]:
        return [self._read(indices) for indices in self.plan(key)[self._process]]

    def plan(self, key: StepKey) -> list[Passes]:
        """Return for each process the sequences of each of its passes."""
        units = self._draw(key.epoch)[key.number * self._shape.total : (key.number + 1) * self._shape.total]
        if key.size.units:
            return self._cut_by_units(units, key.size.units)
        indices, shared = np.concatenate([np.asarray(unit) for unit in units]), None
        if self._prefixes is not None:
            indices = indices[np.argsort(self._prefixes.rank[indices], kind="stable")]
            shared = self._prefixes.count_shared(self._prefixes.rank[indices])
        cut = plan_step(self._lengths[indices], self._shape.processes, key.size, self._cost, shared)
        return [[indices[places].tolist() if places else [] for places in own] for own in cut]

    def _draw(self, epoch: int) -> list[list[int]]:
        if self._drawn[0] != epoch:
            self._units.set_epoch(epoch)
            self._drawn = (epoch, list(self._units))
        return self._drawn[1]

    def _cut_by_units(self, units: list[list[int]], count: int) -> list[Passes]:
        bins = []
        for start in range(0, len(units), count):
            sequences = [one for unit in units[start : start + count] for one in unit]
            tokens = int(self._lengths[sequences].sum())
            bins.append(_Bin(float(tokens), tokens, sequences))
        return [[one.items for one in share] for share in _deal(bins, self._shape.processes)]

    def _read(self, indices: list[int]) -> list[dict[str, Any]]:
        if indices:
            return list(self._sequences.__getitems__(indices))
        ids = self._sequences[0]["input_ids"][:2]
        return [{"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids), IDLE: True}]


class StepCollator:
    """A collator of the passes of one step, each by a data.batching.collator.Collator."""

    def __init__(self, collator: Any) -> None:
        self._collate = collator

    def __call__(self, steps: Sequence[list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
        """Return the batch of each pass of the step."""
        ((passes),) = steps
        return [self._collate(sequences) | (NOTHING if IDLE in sequences[0] else {}) for sequences in passes]
