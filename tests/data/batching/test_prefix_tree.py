"""A prefix tree holds its sequences, each shared token once, and shares no beginning that saves too little."""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from families import Padding
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_qlora.data.batching.collator import BATCH_INFO, Collator
from fastchat_qlora.data.batching.prefix_tree import LEAST_SHARED, PrefixTree, build_prefix_tree
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX

BASE = list(range(100, 300))


class Layout(NamedTuple):
    """Sequences, and the branches that they are laid down as; none where nothing is worth sharing."""

    sequences: list[list[int]]
    branches: tuple[tuple[int, int], ...] | None = None


LAYOUTS = {
    "nothing shared": Layout([[1, 2, 3], [4, 5, 6]]),
    "one alone": Layout([BASE]),
    "one token too few": Layout([[*BASE[:31], 1], [*BASE[:31], 2]]),
    "just enough": Layout([[*BASE[:32], 1], [*BASE[:32], 2]], ((-1, 32), (0, 1), (0, 1))),
    "few tokens of many": Layout([[*BASE[:16], i] for i in range(3)], ((-1, 16), (0, 1), (0, 1), (0, 1))),
    "equal": Layout([BASE, BASE, [1, 2]], ((-1, 200), (-1, 2))),
    "one a prefix of another": Layout([BASE, BASE[:50]], ((-1, 200),)),
    "a prefix of two": Layout([[*BASE[:60], 1], [*BASE[:60], 2], BASE[:40]], ((-1, 60), (0, 1), (0, 1))),
    "a chain": Layout([[*BASE[: 40 * i], 1, 2, 3] for i in (1, 2, 3)], ((-1, 40), (0, 3), (0, 40), (2, 3), (2, 43))),
    "too little between": Layout(
        [[*BASE[:50], 1], [*BASE[:50], 2], [*BASE[:40], 3]], ((-1, 40), (0, 11), (0, 11), (0, 1))
    ),
    "little between, but a block": Layout(
        [[*BASE[:64], 1], [*BASE[:64], 2], [*BASE[:40], 3]], ((-1, 40), (0, 24), (1, 1), (1, 1), (0, 1))
    ),
}


def read_back(tree: PrefixTree, sequences: list[list[int]]) -> None:
    """Require that each sequence stands on its path, in its depths."""
    for ids, end in zip(sequences, tree.ends, strict=True):
        path = tree.paths[end][: len(ids)]
        assert tree.ids[path].tolist() == ids
        assert tree.depths[path].tolist() == list(range(len(ids)))


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)
def test_branches(case: Layout) -> None:
    tree = build_prefix_tree([np.array(ids) for ids in case.sequences])
    assert (tree and tree.branches) == case.branches
    if tree:
        read_back(tree, case.sequences)


@st.composite
def forests(draw: st.DrawFn) -> list[list[int]]:
    """Draw sequences that go on from a place in an earlier one, or begin anew."""
    sequences: list[list[int]] = []
    for i in range(draw(st.integers(1, 8))):
        origin = sequences[draw(st.integers(0, i - 1))] if i and draw(st.integers(0, 4)) else []
        kept = origin[: draw(st.sampled_from([len(origin), 20, 32, 40, 70]))]
        tail = [1000 * i + k for k in range(draw(st.sampled_from([0, 1, 5, 32, 45])))]
        sequences.append([*kept, *tail] or [7])
    return sequences


@settings(max_examples=150, deadline=None)
@given(sequences=forests())
def test_trees_hold_their_sequences_once(sequences: list[list[int]]) -> None:
    arrays = [np.array(ids) for ids in sequences]
    tree, total = build_prefix_tree(arrays), sum(map(len, sequences))
    ordered = sorted(sequences)
    common = [
        next((k for k, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
        for x, y in pairwise(ordered)
    ]
    if tree is None:
        # Few tokens between two branchings are not worth one, and so on down to the root.
        assert max(common, default=0) < 3 * LEAST_SHARED
        return
    read_back(tree, sequences)
    assert total - sum(common) <= len(tree.ids) <= total - LEAST_SHARED
    blocks = {tuple(ids[:end]) for ids in sequences for end in range(LEAST_SHARED, len(ids) + 1, LEAST_SHARED)}
    planned = LEAST_SHARED * len(blocks) + sum(len(ids) % LEAST_SHARED for ids in sequences)
    assert len(tree.ids) <= planned, "what is planned by blocks is never longer"
    assert len(tree.ids) == sum(tokens for _, tokens in tree.branches)
    assert all(parent < index and tokens > 0 for index, (parent, tokens) in enumerate(tree.branches))
    for (parent, tokens), path in zip(tree.branches, tree.paths, strict=True):
        above = tree.paths[parent] if parent >= 0 else path[:0]
        assert path[: -tokens or None][: len(above)].tolist() == above.tolist() and len(path) == len(above) + tokens
        assert (np.diff(path[len(above) :]) == 1).all()
    other = build_prefix_tree([(9000 - ids) for ids in arrays])
    assert other and other.branches == tree.branches, "the order of tokens counts for nothing"
    assert (other.ids == 9000 - tree.ids).all()


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw sequences of a forest, each supervised where it likes."""
    found = []
    for ids in draw(forests()):
        keep = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        labels = [i if supervised else IGNORE_INDEX for i, supervised in zip(ids, keep, strict=True)]
        found.append({"input_ids": ids, "labels": labels})
    return found


@settings(max_examples=100, deadline=None)
@given(rows=rows())
def test_targets_of_a_tree_are_those_of_its_sequences(rows: list[dict[str, Any]]) -> None:
    plain = Collator(Padding(), padding_free=True)(rows)
    batch = Collator(Padding(), padding_free=True, share_prefixes=True)(rows)
    if "branches" not in batch:
        assert_equal(batch, plain)
        return
    copies = batch["target_copies"]
    assert batch["labels"][copies].tolist() == plain["labels"].tolist()
    for name in ("input_ids", "position_ids"):
        found = batch[name][0][batch["supervised"][copies]]
        assert found.tolist() == plain[name][0][plain["supervised"]].tolist(), name
    pairs = torch.stack([batch["supervised"], batch["labels"]])
    assert pairs.shape == pairs.unique(dim=1).shape and copies.unique().tolist() == list(range(pairs.shape[1]))
    assert batch["num_computed"] == batch["input_ids"].numel() < plain["num_computed"] == batch["num_tokens"]
    same = ("conversation", "source", *(name for name in BATCH_INFO if name != "num_computed"))
    assert_equal({name: batch[name] for name in same}, {name: plain[name] for name in same})


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
        else:
            assert found[name] == value, name


def test_inputs_of_a_tree() -> None:
    rows = [{"input_ids": [*BASE[:33], *tail], "labels": [*BASE[:33], *tail]} for tail in ([1], [2, 3])]
    batch = Collator(Padding(), padding_free=True, share_prefixes=True)(rows)
    assert batch["branches"] == ((-1, 33), (0, 1), (0, 2))
    assert batch["input_ids"].tolist() == [[*BASE[:33], 1, 2, 3]]
    assert batch["position_ids"].tolist() == [[*range(33), 33, 33, 34]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 33, 34, 36] and batch["cu_seq_lens_k"].tolist() == [0, 33, 67, 102]
    assert batch["cu_seq_lens_q"].dtype == batch["cu_seq_lens_k"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (33, 35)
    shared = list(range(33))
    assert batch["path_keys"].tolist() == [*shared, *shared, 33, *shared, 34, 35]
    assert batch["supervised"].tolist() == [*range(32), 32, 32, 34], "the last shared token has two next ones"
    assert batch["target_copies"].tolist() == [*range(33), *range(32), 33, 34]
    assert "conversation_lengths" not in batch


def test_padded_batches_share_nothing() -> None:
    rows = [{"input_ids": BASE, "labels": BASE}] * 2
    batch = Collator(Padding(), padding_free=False, share_prefixes=True)(rows)
    assert batch["input_ids"].shape == (2, 200) and "branches" not in batch
