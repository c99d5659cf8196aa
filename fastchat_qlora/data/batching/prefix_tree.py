"""Sequences of ids -> a forest in which tokens that several share from their beginning on stand once."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastchat_qlora.data.batching.prefix_index import LEAST_SHARED


class PrefixTree(NamedTuple):
    """A row of branches in depth-first order; each follows the last token of its parent.

    For example [1 2 3 4], [1 2 5] and [6] are the branches 1 2, 3 4, 5 and 6, the middle two with the first as parent.
    """

    branches: tuple[tuple[int, int], ...]  # parent, -1 for a root, and tokens of each
    ids: NDArray[Any]  # shape (tokens of the row,)
    depths: NDArray[Any]  # of the row's tokens: the place of each in its sequences
    paths: list[NDArray[Any]]  # of each branch: places in the row of the tokens from its root to its own last one
    ends: list[int]  # of each sequence: a branch on whose path it lies, from the first place on


class _Node(NamedTuple):
    """A beginning that sequences share; a sequence that continues alone is a node without children."""

    depth: int  # its tokens
    sequence: int  # one that has it, the first in its order
    children: list[Any]  # nodes that continue from there


def build_prefix_tree(sequences: Sequence[NDArray[Any]], least: int = LEAST_SHARED) -> PrefixTree | None:
    """Return the tree of some sequences; None if they share nothing worth it, which is to save so many tokens.

    Branches are in the order of the sequences, not of their tokens, so that other tokens move none of them.
    """
    # Bytes of big-endian numbers are in the order of the numbers, and compared by the machine's memcmp.
    keys = [ids.astype(">u4").tobytes() for ids in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    holders = [*range(len(keys))]  # of each sequence: itself, or one that continues from its end
    for place in reversed(range(len(order) - 1)):
        first, second = order[place : place + 2]
        if keys[second].startswith(keys[first]):
            holders[first] = holders[second]
    leaves = [sequence for sequence in order if holders[sequence] == sequence]
    shared = [0, *(match_beginnings(sequences[a], sequences[b]) for a, b in pairwise(leaves))]
    total = sum(map(len, sequences))
    if total - sum(len(sequences[leaf]) for leaf in leaves) + sum(shared) < least:
        return None
    tree = _lay_out(_find_nodes(leaves, shared, sequences, least), sequences)
    ends = [tree.ends[holder] for holder in holders]
    return tree._replace(ends=ends) if total - len(tree.ids) >= least else None


def match_beginnings(first: NDArray[Any], second: NDArray[Any]) -> int:
    """Return the number of tokens that two sequences begin with alike; neither is a prefix of the other."""
    length = min(len(first), len(second))
    return int((first[:length] != second[:length]).argmax())


def _find_nodes(
    leaves: Sequence[int], shared: Sequence[int], sequences: Sequence[NDArray[Any]], least: int
) -> list[_Node]:
    """Return the roots, from sequences in order and the tokens that each shares with the one before.

    `path` leads to the last sequence. A node that the next sequence does not reach is complete: it stays if that saves
    `least` tokens, or if a block of as many ends in it, which a PrefixIndex counts as shared, so that no row is longer
    than it was planned. Else its children become those of its parent.
    """
    path = [_Node(0, 0, [])]
    for sequence, common in zip([*leaves, -1], [*shared, 0], strict=True):
        while path[-1].depth > common:
            node = _sort_children(path.pop())
            if path[-1].depth < common:
                path.append(_Node(common, node.sequence, []))
            saved = (len(node.children) - 1) * (node.depth - path[-1].depth)
            is_planned = node.depth // least > path[-1].depth // least
            keeps = not node.children or is_planned or saved >= least
            path[-1].children.extend([node] if keeps else node.children)
        if sequence >= 0:
            path.append(_Node(len(sequences[sequence]), sequence, []))
    return _sort_children(path[0]).children


def _sort_children(node: _Node) -> _Node:
    children = sorted(node.children, key=lambda child: child.sequence)
    return _Node(node.depth, children[0].sequence if children else node.sequence, children)


def _lay_out(roots: Sequence[_Node], sequences: Sequence[NDArray[Any]]) -> PrefixTree:
    branches, pieces, starts = list[tuple[int, int]](), list[NDArray[Any]](), list[int]()
    ends = [0] * len(sequences)
    todo = [(root, -1, 0) for root in reversed(roots)]
    while todo:
        node, parent, start = todo.pop()
        todo.extend((child, len(branches), node.depth) for child in reversed(node.children))
        ends[node.sequence] = len(branches)  # for the last time as a leaf
        branches.append((parent, node.depth - start))
        pieces.append(sequences[node.sequence][start : node.depth])
        starts.append(start)
    tokens = np.array([count for _, count in branches])
    firsts = np.cumsum(tokens) - tokens
    depths = np.arange(tokens.sum()) + np.repeat(np.array(starts) - firsts, tokens)
    paths = list[NDArray[Any]]()
    for (parent, count), first in zip(branches, firsts.tolist(), strict=True):
        own = np.arange(first, first + count)
        paths.append(own if parent < 0 else np.concatenate([paths[parent], own]))
    return PrefixTree(tuple(branches), np.concatenate(pieces), depths, paths, ends)
