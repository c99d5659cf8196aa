"""The cut of a step into passes: each sequence once, as many for each process, none too large, all about equal."""

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import skip_first_batches
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastchat_qlora.data.batching.sampling import ConversationSampler, find_conversations
from fastchat_qlora.data.batching.steps import (
    CostModel,
    Passes,
    PassSize,
    StepCollator,
    StepDataset,
    StepKey,
    StepSampler,
    StepShape,
    plan_step,
)

PLAIN, PADDED = CostModel(1e-4), CostModel(1e-4, is_padded=True)


def sharegpt_lengths(count: int, longest: int, seed: int) -> Any:
    return np.clip(np.random.default_rng(seed).lognormal(6.6, 1.1, count).astype(int), 16, longest)


def computed(lengths: Any, shared: Any, own: list[int]) -> int:
    """Return the tokens of a pass whose sequences lie side by side where they share something."""
    total = 0
    for before, place in zip([None, *own], own, strict=False):
        least = 0 if before is None else int(min(shared[before + 1 : place + 1]))
        total += int(lengths[place]) - least
    return total


@settings(max_examples=150, deadline=None)
@given(data=st.data(), processes=st.integers(1, 5), preferred=st.integers(1, 300), room=st.integers(0, 300))
def test_every_sequence_is_in_one_pass(data: st.DataObject, processes: int, preferred: int, room: int) -> None:
    pairs = data.draw(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 99)), min_size=1, max_size=40))
    lengths = np.array([length for length, _ in pairs])
    shared = np.array([min(own, *pairs[max(0, i - 1)][:1], length) for i, (length, own) in enumerate(pairs)])
    shared[0] = 0
    size = PassSize(preferred, preferred + room)
    for cost, given_shared in ((PLAIN, shared), (PLAIN, None), (PADDED, None)):
        plan = plan_step(lengths, processes, size, cost, given_shared)
        assert sorted(place for own in plan for one in own for place in one) == list(range(len(lengths)))
        assert len(plan) == processes and len({len(own) for own in plan}) == 1
        most = max(size.most if given_shared is not None else size.preferred, int(lengths.max()) + 7)
        for one in (one for own in plan for one in own if one):
            if cost.is_padded:
                width = -(-int(lengths[one].max()) // 8) * 8
                assert len(one) * width <= max(preferred, -(-int(lengths.max()) // 8) * 8)
            else:
                none = np.zeros_like(lengths) if given_shared is None else given_shared
                assert computed(lengths, none, one) <= most
        assert plan == plan_step(lengths, processes, size, cost, given_shared), "no randomness"


@pytest.mark.parametrize("longest", [2048, 4096])
@pytest.mark.parametrize("processes", [2, 8, 64])
@pytest.mark.parametrize(("preferred", "attention"), [(1536, 1.6e-4), (8192, 2e-5)])
def test_processes_hardly_wait(processes: int, longest: int, preferred: int, attention: float) -> None:
    waiting, fullness = [], []
    for seed in range(4):
        lengths = sharegpt_lengths(16 * processes, longest, seed)
        plan = plan_step(lengths, processes, PassSize(preferred, preferred), CostModel(attention))
        cost = lengths * (1 + attention * lengths)
        loads = [sum(cost[one].sum() for one in own) for own in plan]
        waiting.append(1 - np.mean(loads) / max(loads))
        tokens = [lengths[one].sum() for own in plan for one in own]
        fullness.append(max(tokens) / max(preferred, lengths.max()))
    assert np.mean(waiting) < 0.01 and max(fullness) <= 1


def test_idle_processes_have_empty_passes() -> None:
    assert plan_step(np.array([5, 5, 5]), 2, PassSize(6, 6), PLAIN) == [[[0], [2]], [[1], []]]
    assert plan_step(np.array([5]), 3, PassSize(6, 6), PLAIN) == [[[0]], [[]], [[]]]


def test_what_shares_most_stays_together() -> None:
    """Sixteen conversations behind one prompt: a pass as long as memory allows, or cut where the least is shared."""
    lengths, shared = np.full(16, 1750), np.full(16, 1500)
    shared[[0, 4, 8, 12]] = [0, 1400, 1300, 1400]
    assert plan_step(lengths, 1, PassSize(1500, 8000), PLAIN, shared) == [[[*range(16)]]]
    halves = plan_step(lengths, 1, PassSize(1500, 5000), PLAIN, shared)
    assert halves == [[[*range(8)], [*range(8, 16)]]]
    assert plan_step(lengths, 2, PassSize(1500, 8000), PLAIN, shared) == [[[*range(8)]], [[*range(8, 16)]]]
    little = np.where(np.arange(16) == 8, 32, shared)
    cut = plan_step(lengths, 1, PassSize(1500, 20_000), PLAIN, little)
    assert cut == halves, "what shares little is cut for passes of the preferred size"


def make_data(seed: int, conversations: int = 23) -> Dataset:
    """Return conversations of one to three sequences, whose ids say which they are."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, 4, conversations)
    records = np.repeat(np.arange(conversations), counts)
    lengths = random.integers(3, 60, len(records))
    ids = [[index] * length for index, length in enumerate(lengths.tolist())]
    return Dataset.from_dict({"record": records, "length": lengths, "input_ids": ids, "labels": ids})


def read(dataset: Dataset, shape: StepShape, process: int, size: PassSize, skipped: int = 0) -> list[Passes]:
    """Return the sequences of each pass of the steps of the third epoch, as a loader of a process yields them."""
    bounds = find_conversations(dataset)
    units = ConversationSampler(bounds, np.array(dataset["length"]), "random", 7, shape.total)
    names = StepSampler(-(-len(units) // shape.total), size)
    names.epoch = 2

    def collate(sequences: list[dict[str, Any]]) -> dict[str, Any]:
        return {"sequences": [one["input_ids"][0] for one in sequences], "labels": sequences[0]["labels"]}

    steps = StepDataset(dataset, units, shape, process, PLAIN)
    loader = DataLoader(steps, batch_sampler=names, collate_fn=StepCollator(collate))
    loader = skip_first_batches(loader, skipped) if skipped else loader
    return [[[] if one.get("num_tokens") == 0 else one["sequences"] for one in step] for step in loader]


@pytest.mark.parametrize("size", [PassSize(64, 64), PassSize(units=2)], ids=["tokens", "conversations"])
@pytest.mark.parametrize("processes", [1, 3])
def test_loader_yields_whole_steps(processes: int, size: PassSize) -> None:
    """All sequences of a conversation are in one step, of any process; a resumed loader yields the rest."""
    dataset, shape = make_data(1), StepShape(2, 2, processes)
    shares = [read(dataset, shape, process, size) for process in range(processes)]
    assert [read(dataset, shape, process, size, skipped=1) for process in range(processes)] == [
        share[1:] for share in shares
    ]
    records = np.array(dataset["record"])
    seen: list[int] = []
    for step in zip(*shares, strict=True):
        assert len({len(passes) for passes in step}) == 1
        found = [one for passes in step for own in passes for one in own]
        assert len({*records[found]}) == min(shape.total, 23 - len({*records[seen]}))
        seen += found
    assert sorted(seen) == list(range(len(dataset)))


def test_steps_of_an_epoch_are_those_of_the_seed() -> None:
    dataset = make_data(3)
    bounds, lengths = find_conversations(dataset), np.array(dataset["length"])
    units = ConversationSampler(bounds, lengths, "random", 7, 4)
    units.set_epoch(1)
    drawn = list(units)
    ends = [0, *accumulate(map(len, drawn))]
    steps = StepDataset(dataset, units, StepShape(2, 1, 2), 0, PLAIN)
    plan = steps.plan(StepKey(1, 1, PassSize(64, 64)))
    assert sorted(one for own in plan for found in own for one in found) == sorted(
        [one for unit in drawn for one in unit][ends[4] : ends[8]]
    )
