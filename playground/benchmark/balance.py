"""The share of an optimizer step that ranks wait for the slowest one, by simulation over published lengths.

    python playground/benchmark/balance.py --report playground/benchmark/balance.md

Nothing is trained. The cost of a sequence is its tokens, and attention's part that grows with their square, as in an 8B
Llama or in SmolLM2-135M. Conversations are assigned to ranks

- at random, as by a shuffled sampler: each rank takes as many;
- by transformers' `train_sampling_strategy="batch_rebalance"`, its own sampler, in passes that it pads;
- by this program's `plan_step`, which cuts the step into passes without padding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from conversations import SHAPES, Shape
from machine import make_table
from numpy.typing import NDArray
from transformers.trainer_pt_utils import BatchRebalanceSampler

from fastchat_qlora.data.batching.steps import CostModel, PassSize, plan_step

Lengths = NDArray[np.int64]
Passes = list[list[Lengths]]  # of each rank, the lengths in each of its passes

RANKS, CONVERSATIONS = (2, 8, 64, 512), (1, 4, 16)
STEPS = {2: 100, 8: 50, 64: 10, 512: 3}  # that are drawn, by ranks
SLOW = 4_000  # conversations of a step from which on batch_rebalance is left out: 8,192 take it 14 s
PER_PASS = 4  # conversations of a rank in a pass of batch_rebalance: its per_device_train_batch_size
AGENT_TOKENS = (1_829, 8_192, 16_384, 23_840, 32_768, 65_536, 69_274, 89_876, 156_000)
AGENT_SHARES = (0.0, 0.0715, 0.3513, 0.5, 0.6161, 0.9327, 0.95, 0.99, 1.0)  # of trajectories that are not longer
MIXED = 0.5  # share of reasoning in the mix, the rest is of ShareGPT's lengths
CHARACTERS = 3.0  # of a token in mathematics, by which published characters become tokens
SEED = 20


class Model(NamedTuple):
    """A model by the cost of attention, and by the tokens of a pass."""

    name: str
    attention: float
    pass_tokens: int


def weigh_attention(hidden: int, layers: int, parameters: float) -> float:
    """Return the cost of a key of attention in that of a token's linear layers, forward and backward.

    Products with keys and values take 4 x hidden operations forward and twice as many backward, but causal masks hide
    half of them. Frozen linear layers take 2 for a parameter in each direction.
    """
    return 3 * 4 * hidden * layers / 2 / (4 * parameters)


MODELS = (
    Model("8B Llama", weigh_attention(4096, 32, 7.5e9), 8192),
    Model("SmolLM2-135M", weigh_attention(576, 30, 134.5e6), 1536),
)


def draw_shape(shape: Shape, most: int, random: np.random.Generator, count: int) -> Lengths:
    """Return the tokens of conversations of a shape."""

    def draw(mean: float, sigma: float, size: int) -> NDArray[np.float64]:
        return random.lognormal(np.log(mean) - sigma**2 / 2, sigma, size)

    exchanges = np.minimum(random.geometric(1 / shape.mean_exchanges, count), shape.most_exchanges)
    owners = np.repeat(np.arange(count), exchanges)
    tokens = draw(shape.user_tokens, shape.user_sigma, len(owners))
    tokens += draw(shape.assistant_tokens, shape.assistant_sigma, len(owners))
    return np.bincount(owners, tokens).clip(2, most).astype(np.int64)


def draw_agent(random: np.random.Generator, count: int) -> Lengths:
    """Return the tokens of coding agents' trajectories, evenly on a logarithmic scale between published quantiles.

    They are those of the card of thoughtworks/agentic-coding-trajectories: 15,000 trajectories of SWE-rebench and
    SWE-smith, by ranges and percentiles.
    """
    return np.exp(np.interp(random.random(count), AGENT_SHARES, np.log(AGENT_TOKENS))).astype(np.int64)


def draw_reasoning(random: np.random.Generator, count: int) -> Lengths:
    """Return the tokens of a mix of reasoning traces and of conversations like ShareGPT's.

    Traces are log-normal with the median and the mean of the answers in SFT-Math-45k (from OpenR1-Math-220k): 12,980
    and 16,254 characters, at most 60,000. The 90th percentile is then 30,600 characters; the card says 32,888.
    """
    median, mean, most = 12_980 / CHARACTERS, 16_254 / CHARACTERS, 60_000 / CHARACTERS
    traces = random.lognormal(np.log(median), np.sqrt(2 * np.log(mean / median)), count).clip(2, most)
    talks = draw_shape(SHAPES["sharegpt"], 16_384, random, count)
    return np.where(random.random(count) < MIXED, traces, talks).astype(np.int64)


DRAWN = {
    "ShareGPT-like": lambda random, count: draw_shape(SHAPES["sharegpt"], 8_192, random, count),
    "Alpaca-like": lambda random, count: draw_shape(SHAPES["alpaca"], 8_192, random, count),
    "coding agents": draw_agent,
    "reasoning and chat": draw_reasoning,
}


def assign_at_random(lengths: Lengths, ranks: int) -> Passes:
    """Return as many conversations for each rank, one after the other."""
    return [[one[None] for one in own] for own in lengths.reshape(ranks, -1)]


class Rebalancing(BatchRebalanceSampler):  # type: ignore[misc]  # transformers is untyped
    """transformers' sampler, of which one step is asked for all ranks at once."""

    def assign(self) -> list[list[list[int]]]:
        """Return the conversations of each pass of each rank."""
        assigned: list[list[list[int]]] = self._assign(list(range(len(self.lengths))), self.lengths)
        return assigned


def assign_by_transformers(lengths: Lengths, ranks: int) -> Passes:
    """Return the passes of batch_rebalance."""
    passes = max(1, len(lengths) // ranks // PER_PASS)
    sampler = Rebalancing(lengths.tolist(), len(lengths), ranks, passes)
    return [[lengths[one] for one in own] for own in sampler.assign()]


def assign_by_cost(lengths: Lengths, ranks: int, model: Model) -> Passes:
    """Return the passes of this program."""
    size = PassSize(model.pass_tokens, model.pass_tokens)
    planned = plan_step(lengths, ranks, size, CostModel(model.attention))
    return [[lengths[one] if one else lengths[:0] for one in own] for own in planned]


def measure_cost(passes: Passes, attention: float, *, is_padded: bool) -> NDArray[np.float64]:
    """Return the cost of each pass of each rank, shape (ranks, passes)."""

    def measure(lengths: Lengths) -> float:
        if is_padded and len(lengths):
            lengths = np.full(len(lengths), lengths.max())
        return float((lengths * (1 + attention * lengths)).sum())

    return np.array([[measure(one) for one in own] for own in passes])


class Waiting(NamedTuple):
    """Costs summed over steps, as the mean over ranks and as the slowest rank has them."""

    mean: float = 0.0
    slowest: float = 0.0
    slowest_passes: float = 0.0  # if ranks wait for each other in each pass, as under ZeRO-3 and FSDP

    def add(self, costs: NDArray[np.float64]) -> Waiting:
        """Return the sum with a step's."""
        step = Waiting(costs.sum(1).mean(), costs.sum(1).max(), costs.max(0).sum())
        return Waiting(*(a + b for a, b in zip(self, step, strict=True)))

    @property
    def share(self) -> float:
        """The share of the time that ranks wait at the end of steps."""
        return 1 - self.mean / self.slowest

    @property
    def share_in_passes(self) -> float:
        """The same if they wait in each pass."""
        return 1 - self.mean / self.slowest_passes


class Outcome(NamedTuple):
    """How long ranks wait with each assignment, at the least, and the seconds of this program's plan of a step."""

    at_random: Waiting
    by_transformers: Waiting | None
    by_cost: Waiting
    least: Waiting  # the longest conversation has a rank of its own
    seconds: float


def simulate(steps: Iterable[Lengths], ranks: int, model: Model, *, is_slow: bool = False) -> Outcome:
    """Assign steps of conversations in all ways; batch_rebalance is left out if it `is_slow`."""
    at_random, by_transformers, by_cost, least = (Waiting() for _ in range(4))
    seconds: list[float] = []
    for lengths in steps:
        each = lengths * (1 + model.attention * lengths)
        mean = each.sum() / ranks
        least = least.add(np.array([[max(mean, each.max())], [2 * mean - max(mean, each.max())]]))
        costs = measure_cost(assign_at_random(lengths, ranks), model.attention, is_padded=False)
        at_random = at_random.add(costs)
        if not is_slow:
            costs = measure_cost(assign_by_transformers(lengths, ranks), model.attention, is_padded=True)
            by_transformers = by_transformers.add(costs)
        began = time.process_time()
        passes = assign_by_cost(lengths, ranks, model)
        seconds.append(time.process_time() - began)
        by_cost = by_cost.add(measure_cost(passes, model.attention, is_padded=False))
    return Outcome(at_random, None if is_slow else by_transformers, by_cost, least, statistics.mean(seconds))


HEADINGS = (
    *("data", "ranks", "conversations of each", "at random", "batch_rebalance", "this program", "at least"),
    *("in each pass", "time: random / this", "batch_rebalance / this", "ms to plan"),
)


def list_rows(model: Model, ranks: Iterable[int], limit: int | None = None) -> Iterable[list[str]]:
    """Yield the lines of a model's table; at most so many steps are drawn for each."""
    for name, draw in DRAWN.items():
        random = np.random.default_rng(SEED)
        for count in ranks:
            for conversations in CONVERSATIONS:
                total = count * conversations
                steps = [draw(random, total) for _ in range(min(STEPS[count], limit or STEPS[count]))]
                found = simulate(steps, count, model, is_slow=total >= SLOW)
                yield [name, str(count), str(conversations), *describe(found)]


def describe(found: Outcome) -> list[str]:
    """Return the numbers of a line."""
    ours, theirs = found.by_cost, found.by_transformers
    return [
        f"{100 * found.at_random.share:.1f}",
        f"{100 * theirs.share:.1f}" if theirs else "-",
        *(f"{100 * share:.1f}" for share in (ours.share, found.least.share, ours.share_in_passes)),
        *(f"{other.slowest / ours.slowest:.2f}" if other else "-" for other in (found.at_random, theirs)),
        f"{1000 * found.seconds:.1f}",
    ]


EXPLANATION = """\
Percent of a step's time that the mean rank waits for the slowest, over {steps} random steps. A sequence costs its \
tokens plus {attention:.1e} of their square. With `batch_rebalance` (transformers {transformers}, {per_pass} \
conversations of a rank in a pass) the padding of its passes is work, not waiting, and is seen in the time; with \
{slow:,} conversations and more it is left out (a step of 8,192 takes it 14 s to plan). This program's passes have \
{pass_tokens:,} tokens, or one sequence. *At least*: the rank of the longest conversation has no other. *In \
each pass*: if ranks wait for each other there, as under ZeRO-3 and FSDP."""

SOURCES = """\
`playground/benchmark/balance.py` wrote this; nothing is trained. Lengths: ShareGPT-like and Alpaca-like as in \
`conversations.py` (WildChat's exchanges; at most 8,192 tokens); coding agents by the quantiles on the card of \
thoughtworks/agentic-coding-trajectories (median 23,840 tokens); reasoning and chat: half of it ShareGPT-like, half \
as the answers of SFT-Math-45k, from OpenR1-Math-220k (mean 16,254 characters, median 12,980, at 3 a token)."""


def write_report(models: Iterable[Model], ranks: Iterable[int], limit: int | None = None) -> str:
    """Return the page in Markdown."""
    steps = ", ".join(f"{min(STEPS[count], limit or STEPS[count])} with {count} ranks" for count in ranks)
    lines = ["# Waiting for the slowest rank", "", SOURCES]
    for model in models:
        explanation = EXPLANATION.format(
            steps=steps,
            attention=model.attention,
            transformers=version("transformers"),
            per_pass=PER_PASS,
            slow=SLOW,
            pass_tokens=model.pass_tokens,
        )
        lines += ["", f"## {model.name}", "", explanation, "", *make_table(HEADINGS, list_rows(model, ranks, limit))]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate everything, or a part, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--report", type=Path, help="Markdown file")
    parser.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=list(RANKS))
    parser.add_argument("--steps", type=int, help="at most, for a trial")
    arguments: Any = parser.parse_args()
    report = write_report(MODELS, arguments.ranks, arguments.steps)
    print(report, end="")
    if arguments.report:
        arguments.report.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
