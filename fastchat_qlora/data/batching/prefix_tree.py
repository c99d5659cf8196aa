"""Sequences of ids -> a forest in which tokens that several share from their beginning on stand once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LEAST_SHARED = 32
"""Tokens that a branch must save: attention reads its keys once more for each branch that follows."""

Ids = np.ndarray[Any, Any]


class PrefixTree(NamedTuple):
    """A row of branches in depth-first order; each follows the last token of its parent.

    For example [1 2 3 4], [1 2 5] and [6] are the branches 1 2, 3 4, 5 and 6, the middle two with the first as parent.
    """

    branches: tuple[tuple[int, int], ...]  # parent, -1 for a root, and tokens of each
    ids: Ids  # shape (tokens of the row,)
    depths: Ids  # of the row's tokens: the place of each in its sequences
    paths: list[Ids]  # of each branch: places in the row of the tokens from its root to its own last one
    ends: list[int]  # of each sequence: a branch on whose path it lies, from the first place on


class _Node(NamedTuple):
    """A beginning that sequences share."""

    depth: int  # its tokens
    sequence: int  # one that has it
    parts: list[Any]  # what goes on from there: nodes, and the indices of sequences


def build_prefix_tree(sequences: Sequence[Ids]) -> PrefixTree | None:
    """Return the tree of some sequences, which their order does not change; None if they share nothing worth it."""
    # Bytes of big-endian numbers are in the order of the numbers, and compared by the machine's memcmp.
    keys = [ids.astype(">u4").tobytes() for ids in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = [0, *(_count_common(sequences[a], sequences[b]) for a, b in zip(order, order[1:], strict=False))]
    if sum(shared) < LEAST_SHARED:
        return None
    lengths = [len(ids) for ids in sequences]
    roots = _find_shared(order, shared, lengths)
    if not any(isinstance(part, _Node) for part in roots):
        return None
    return _lay_out(roots, sequences, lengths)


def _count_common(first: Ids, second: Ids) -> int:
    """Return the number of tokens that two sequences begin with alike."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    place = int(differs.argmax()) if length else 0
    return place if length and differs[place] else length


def _find_shared(order: Sequence[int], shared: Sequence[int], lengths: Sequence[int]) -> list[Any]:
    """Return nodes and sequences at the root, from the order of the sequences and what each shares with the one before.

    `path` holds the nodes to which the last sequence belongs. One that the next sequence does not reach is complete: it
    stays if that saves enough, or else its parts go on from its parent.
    """
    path = [_Node(0, 0, [])]
    for sequence, common in zip([*order, -1], [*shared, 0], strict=True):
        while path[-1].depth > common:
            node = path.pop()
            if path[-1].depth < common:
                path.append(_Node(common, node.sequence, []))
            saved = (len(node.parts) - 1) * (node.depth - path[-1].depth)
            path[-1].parts.extend([node] if saved >= LEAST_SHARED else node.parts)
        if sequence >= 0 and lengths[sequence] == path[-1].depth:
            path[-1].parts.append(sequence)
        elif sequence >= 0:
            path.append(_Node(lengths[sequence], sequence, [sequence]))
    return path[0].parts


def _lay_out(roots: Sequence[Any], sequences: Sequence[Ids], lengths: Sequence[int]) -> PrefixTree:
    branches, pieces, ends = list[tuple[int, int]](), list[Ids](), [0] * len(sequences)
    starts, todo = list[int](), [(part, -1, 0) for part in reversed(roots)]
    while todo:
        part, parent, start = todo.pop()
        node = part if isinstance(part, _Node) else _Node(lengths[part], part, [part])
        following = [part for part in node.parts if isinstance(part, _Node) or lengths[part] > node.depth]
        for part in node.parts:
            if not isinstance(part, _Node) and lengths[part] == node.depth:
                ends[part] = len(branches)
        if len(following) == 1:  # the others end within its branch, which need not be cut for them
            todo.append((following[0], parent, start))
            continue
        todo.extend((part, len(branches), node.depth) for part in reversed(following))
        branches.append((parent, node.depth - start))
        pieces.append(sequences[node.sequence][start : node.depth])
        starts.append(start)
    tokens = np.array([count for _, count in branches])
    firsts = np.cumsum(tokens) - tokens
    depths = np.arange(tokens.sum()) + np.repeat(np.array(starts) - firsts, tokens)
    paths = list[Ids]()
    for (parent, count), first in zip(branches, firsts.tolist(), strict=True):
        own = np.arange(first, first + count)
        paths.append(own if parent < 0 else np.concatenate([paths[parent], own]))
    return PrefixTree(tuple(branches), np.concatenate(pieces), depths, paths, ends)

