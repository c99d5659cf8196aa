"""Branches of prefix trees laid down in one row, and the blocks of their attention."""

import functools
from typing import NamedTuple

Branches = tuple[tuple[int, int], ...]
"""Parent (-1: none) and tokens of each branch, depth-first; a branch follows the last token of its parent.

Conversations that share nothing are branches without parents.
"""


class Branch(NamedTuple):
    """A branch in its row."""

    parent: int
    before: int  # tokens of its path before it
    path: tuple[slice, ...]  # of the row, root first, itself last

    @property
    def own(self) -> slice:
        """The branch's own tokens in the row."""
        return self.path[-1]

    @property
    def depths(self) -> slice:
        """The branch's own tokens in its path."""
        return slice(self.before, self.before + self.own.stop - self.own.start)


@functools.lru_cache(maxsize=64)
def lay_out_branches(branches: Branches) -> tuple[Branch, ...]:
    """Return each branch with its place and its path."""
    laid_out: list[Branch] = []
    start = 0
    for parent, tokens in branches:
        before, path = (laid_out[parent].depths.stop, laid_out[parent].path) if parent >= 0 else (0, ())
        laid_out.append(Branch(parent, before, (*path, slice(start, start + tokens))))
        start += tokens
    return tuple(laid_out)


class Block(NamedTuple):
    """Adjacent queries of a branch, and the keys that any of them attends to."""

    queries: slice  # of the row
    keys: slice  # of the path; the last one is that of the last query


def split_branch(branch: Branch, most_queries: int, window: int | None) -> list[Block]:
    """Return a branch's queries in blocks; the keys of the first `window` tokens up to each, or all if None."""
    blocks = []
    for start in range(branch.own.start, branch.own.stop, most_queries):
        stop, depth = min(start + most_queries, branch.own.stop), branch.before + start - branch.own.start
        first = 0 if window is None else max(0, depth - window + 1)
        blocks.append(Block(slice(start, stop), slice(first, depth + stop - start)))
    return blocks
