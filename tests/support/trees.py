"""Prefix trees for tests, and attention along their paths by a mask."""

import torch
from hypothesis import strategies as st

from fastchat_qlora.model.attention.attention import attend_per_conversation

Branches = tuple[tuple[int, int], ...]
Inputs = list[torch.Tensor]


def random_inputs(tokens: int, heads: tuple[int, int], dtype: torch.dtype, width: int = 8) -> Inputs:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(1, count, tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
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
