"""Attention along the paths of prefix trees equals that of each path as a sequence of its own."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastchat_qlora.model.attention.attention import attend_per_conversation
from fastchat_qlora.model.attention.cpu_attention import BLOCK_QUERIES

Branches = tuple[tuple[int, int], ...]
Inputs = list[torch.Tensor]
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


def random_inputs(tokens: int, heads: tuple[int, int], dtype: torch.dtype, width: int = 8) -> Inputs:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(1, count, tokens, width, generator=generator, dtype=FP64).to(dtype).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]


@st.composite
def forests(draw: st.DrawFn) -> Branches:
    """Make branches in depth-first order: a parent is the branch before or above."""
    branches: list[tuple[int, int]] = []
    open_ones = [-1]
    for _ in range(draw(st.integers(1, 7))):
        del open_ones[draw(st.integers(1, len(open_ones))) :]
        branches.append((open_ones[-1], draw(st.integers(1, 9))))
        open_ones.append(len(branches) - 1)
    return tuple(branches)


def list_paths(branches: Branches) -> list[torch.Tensor]:
    """Return the positions in the row of each branch's path."""
    paths: list[torch.Tensor] = []
    start = 0
    for parent, tokens in branches:
        own = torch.arange(start, start + tokens)
        paths.append(torch.cat([paths[parent], own]) if parent >= 0 else own)
        start += tokens
    return paths


def count_tokens(branches: Branches) -> int:
    return sum(tokens for _, tokens in branches)


def reference(
    inputs: Inputs, branches: Branches, *, window: int | None = None, softcap: float | None = None, sinks: bool = False
) -> torch.Tensor:
    """Compute attention over all tokens of the row, with a mask of each token's path; (1, tokens, heads, width)."""
    query, key, value = inputs
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for path, (_, own) in zip(list_paths(branches), branches, strict=True):
        for depth in range(len(path) - own, len(path)):
            allowed[path[depth], path[max(0, depth + 1 - (window or len(path))) : depth + 1]] = True
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks:
        scores = torch.cat([scores, make_sinks(query).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., :tokens] @ value).transpose(1, 2)


def make_sinks(query: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 2, query.shape[1], dtype=query.dtype)


def attend(
    inputs: Inputs, branches: Branches, *, window: int | None = None, softcap: float | None = None, sinks: bool = False
) -> torch.Tensor:
    starts = torch.tensor([0, *(tokens for _, tokens in branches)]).cumsum(0).int()
    paths = list_paths(branches)
    attended, weights = attend_per_conversation(
        torch.nn.Identity(),
        *inputs,
        None,
        sliding_window=window,
        softcap=softcap,
        s_aux=make_sinks(inputs[0]) if sinks else None,
        cu_seq_lens_q=starts,
        max_length_q=max(tokens for _, tokens in branches),
        cu_seq_lens_k=torch.tensor([0, *map(len, paths)]).cumsum(0).int(),
        max_length_k=max(map(len, paths)),
        path_keys=torch.cat(paths),
        branches=branches,
    )
    assert weights is None
    return attended


def with_gradients(attended: torch.Tensor, inputs: Inputs) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, attended.numel(), dtype=attended.dtype).view(attended.shape)
    return [attended, *torch.autograd.grad((attended * weight).sum(), inputs)]


BLOCK = BLOCK_QUERIES
LONG: Branches = ((-1, BLOCK + 3), (0, 2 * BLOCK - 5), (0, 7), (2, BLOCK), (2, 1), (-1, 5))


@pytest.mark.parametrize("more", [{}, {"softcap": 0.7}, {"sinks": True}], ids=["plain", "softcap", "sinks"])
@settings(max_examples=25, deadline=None)
@given(forests(), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.none() | st.integers(1, 30))
@example(LONG, (4, 2), None)
@example(LONG, (4, 2), BLOCK - 1)
def test_equals_attention_under_a_mask_of_each_path(
    more: dict[str, float], branches: Branches, heads: tuple[int, int], window: int | None
) -> None:
    inputs = random_inputs(count_tokens(branches), heads, FP64)
    expected = with_gradients(reference(inputs, branches, window=window, **more), inputs)
    # Capped weights are computed in fp32, and gradients of keys and values summed in fp32.
    for ours, theirs in zip(
        with_gradients(attend(inputs, branches, window=window, **more), inputs), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_bf16_is_as_accurate_as_its_rounding(window: int | None) -> None:
    inputs = random_inputs(count_tokens(LONG), (4, 2), BF16, width=32)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = with_gradients(reference(exact, LONG, window=window), exact)
    for ours, truth in zip(with_gradients(attend(inputs, LONG, window=window), inputs), expected, strict=True):
        assert ours.dtype == BF16
        assert (ours.double() - truth).norm() / truth.norm() < 2**-7


@pytest.mark.parametrize("more", [{}, {"window": 20}, {"sinks": True}], ids=["plain", "window", "sinks"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_branch_changes_no_bit_of_others(dtype: torch.dtype, more: dict[str, int]) -> None:
    """The tokens after it, and gradients of branches beside it, do not depend on its values."""
    inputs = random_inputs(count_tokens(LONG), (4, 2), dtype, width=16)
    start = LONG[0][1]
    changed, others = slice(start, start + LONG[1][1]), torch.ones(count_tokens(LONG), dtype=torch.bool)
    others[changed] = False
    moved = [tensor.detach().clone() for tensor in inputs]
    for tensor in moved:
        tensor[:, :, changed] *= -3
    before, after = (attend(tensors, LONG, **more)[:, others] for tensors in (inputs, moved))
    assert torch.equal(before, after)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_drops_weights_of_the_whole_path(softcap: float | None) -> None:
    """Equal scores and values of 1 leave the share of weights that are kept."""
    branches: Branches = ((-1, 300), *[(0, 1)] * 50)
    inputs = [torch.zeros(1, 2, 350, 8), torch.zeros(1, 2, 350, 8), torch.ones(1, 2, 350, 8)]
    torch.manual_seed(0)
    attended, _ = attend_per_conversation(
        None, *inputs, None, dropout=0.5, softcap=softcap, branches=branches, cu_seq_lens_q=torch.tensor([0, 350])
    )
    kept = attended[0, 300:, :, 0] * 301 / 2
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert 120 < kept.mean() < 180
    assert kept.unique().numel() > 5
