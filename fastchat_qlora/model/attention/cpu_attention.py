"""Attention in blocks along the paths of prefix trees: on a CPU, and with attention sinks on any device.

Torch's CPU kernel of FlashAttention has no causal mask for queries behind a prefix, and its backward is slowed by many
small products. With AMX its forward is the faster one in bf16, so it is used there.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastchat_qlora.model.attention.branches import Block, Branch, split_branch
from fastchat_qlora.model.ops.cpu_products import HALF, get_product_dtype

BLOCK_QUERIES = 128  # whose scores for 1,024 keys and 9 heads take 4.5 MiB in fp32


class BlockSettings(NamedTuple):
    """The branches of a row, and the settings of an attention layer."""

    branches: tuple[Branch, ...]
    scale: float  # of the scores
    window: int | None  # tokens of its path that a token attends to, itself included; all before it if None


def attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    settings: BlockSettings,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention along the paths of prefix trees, in blocks of queries against all keys before their end.

    Only the three inputs are saved for backward, which computes the weights again.

    Args:
        query: shape (1, heads, tokens, head size).
        key, value: shape (1, key heads, tokens, head size); heads are a multiple of key heads.
        settings: see BlockSettings.
        sinks: score of each head's attention sink, which has no value; shape (heads,), frozen.

    Returns:
        A tensor of shape (1, tokens, heads, size of a value).
    """
    attended: torch.Tensor = _BlockAttention.apply(query, key, value, sinks, settings)  # type: ignore[no-untyped-call]
    return attended


class _BlockAttention(torch.autograd.Function):
    """Attention on (key heads, queries x heads per key head, head size), a block of queries at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        settings: BlockSettings,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.settings = settings
        attended = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        work = _Work(query, key, value, sinks, settings)
        for branch in settings.branches:
            work.enter(branch)
            if branch.parent < 0 and work.prefers_kernel:
                attended[:, branch.own] = _call_kernel((query, key, value), branch, settings.scale)
                continue
            for block in split_branch(branch, BLOCK_QUERIES, settings.window):
                weights = work.compute_weights(work.take(query, block), block)
                work.put(attended.transpose(1, 2), block, weights @ work.values[:, block.keys])
        return attended

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        settings: BlockSettings = ctx.settings
        grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        grad_attended, scale = grad_outputs[0].transpose(1, 2), settings.scale
        work, sums = _Work(query, key, value, sinks, settings), _Sums(grad_key, grad_value, settings.branches)
        buffer = work.allocate_scores()
        for branch in settings.branches:
            work.enter(branch)
            sums.enter(branch)
            for block in split_branch(branch, BLOCK_QUERIES, settings.window):
                rows, grad, keys = work.take(query, block), work.take(grad_attended, block), block.keys
                weights = work.compute_weights(rows, block)
                _add_product(sums.values[:, keys], weights.transpose(1, 2), grad)
                grad_weights = _multiply_scaled(grad, work.values[:, keys].transpose(1, 2), out=buffer)
                grad_scores = _multiply_by_softmax_gradient(grad_weights, weights)
                work.put(grad_query, block, _multiply_scaled(grad_scores, work.keys[:, keys], scale))
                _add_product(sums.keys[:, keys], grad_scores.transpose(1, 2), rows, scale)
        sums.leave()
        return grad_query, grad_key, grad_value, None, None


def _call_kernel(inputs: tuple[torch.Tensor, ...], branch: Branch, scale: float) -> torch.Tensor:
    """Return torch's attention of a branch without a parent, shape (1, tokens, heads, size of a value)."""
    query, key, value = (tensor[:, :, branch.own] for tensor in inputs)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)


class _Work:
    """The keys and values of the path of one branch at a time, of branches entered depth-first."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        settings: BlockSettings,
    ) -> None:
        self._dtype = get_product_dtype(query.dtype, query.device)
        self._settings, self._sinks = settings, sinks
        self._inputs = key[0], value[0]
        longest = max(branch.depths.stop for branch in settings.branches)
        self.keys, self.values = (
            one.new_empty((len(one), longest, one.shape[2]), dtype=self._dtype) for one in self._inputs
        )
        self._key_heads, self._groups = key.shape[1], query.shape[1] // key.shape[1]
        whole = sinks is None and settings.window is None
        self.prefers_kernel = whole and query.device.type == "cpu" and self._dtype in HALF
        self._scores = self.allocate_scores()

    def allocate_scores(self) -> torch.Tensor | None:
        """Return a buffer of the largest size of a block's scores; none on a GPU, whose allocator keeps them."""
        if self.keys.device.type != "cpu":
            return None
        longest = self.keys.shape[1]
        return self.keys.new_empty(self._key_heads * self._groups * min(BLOCK_QUERIES, longest) * (longest + 1))

    def enter(self, branch: Branch) -> None:
        """Copy a branch's keys and values behind those of its parent."""
        for path, row in zip((self.keys, self.values), self._inputs, strict=True):
            path[:, branch.depths] = row[:, branch.own]

    def take(self, tensor: torch.Tensor, block: Block) -> torch.Tensor:
        """Return a block of (1, heads, tokens, size) as (key heads, queries x heads per key head, size)."""
        part = torch.unflatten(tensor[0, :, block.queries], 0, (self._key_heads, -1)).transpose(1, 2)
        return part.to(self._dtype, memory_format=torch.contiguous_format).flatten(1, 2)

    def put(self, tensor: torch.Tensor, block: Block, rows: torch.Tensor) -> None:
        """Copy what `take` returns to its place."""
        part = torch.unflatten(tensor[0, :, block.queries], 0, (self._key_heads, -1)).transpose(1, 2)
        part.copy_(torch.unflatten(rows, 1, part.shape[1:3]))

    def compute_weights(self, rows: torch.Tensor, block: Block) -> torch.Tensor:
        """Return attention weights, shape (key heads, queries x heads per key head, keys)."""
        keys, window = self.keys[:, block.keys], self._settings.window
        scores = _multiply_scaled(rows, keys.transpose(1, 2), self._settings.scale, self._scores)
        queries = rows.shape[1] // self._groups
        # Without a window only the last columns need a mask; with one any column does.
        before = 0 if window is None else keys.shape[1] - queries
        masked = torch.unflatten(scores[..., keys.shape[1] - queries - before :], 1, (queries, -1))
        masked += _make_mask(queries, before, window, scores.dtype, scores.device)
        if self._sinks is None:
            return torch.softmax(scores, -1, out=scores) if self._scores is not None else scores.softmax(-1)
        of_rows = self._sinks.to(scores.dtype).view(len(rows), 1, -1).expand(-1, queries, -1).flatten(1)
        return torch.cat([scores, of_rows[..., None]], -1).softmax(-1)[..., :-1]


class _Sums:
    """Gradients of the keys and values of the branches that lead to the present one."""

    def __init__(self, grad_key: torch.Tensor, grad_value: torch.Tensor, branches: tuple[Branch, ...]) -> None:
        longest = max(branch.depths.stop for branch in branches)
        self._rows = grad_key[0], grad_value[0]
        # Every block adds to the keys before it; in half precision summed in fp32.
        dtype = torch.promote_types(grad_key.dtype, torch.float32)
        self.keys, self.values = (one.new_empty((len(one), longest, one.shape[2]), dtype=dtype) for one in self._rows)
        self._entered: list[Branch] = []

    def enter(self, branch: Branch) -> None:
        """Start sums of a branch, after those of branches beside it."""
        self.leave(branch.before)
        self._entered.append(branch)
        for sums in (self.keys, self.values):
            sums[:, branch.depths] = 0

    def leave(self, depth: int = 0) -> None:
        """Copy to the row the sums of the entered branches that begin at a depth or below."""
        while self._entered and self._entered[-1].before >= depth:
            branch = self._entered.pop()
            for sums, row in zip((self.keys, self.values), self._rows, strict=True):
                row[:, branch.own] = sums[:, branch.depths]


@functools.lru_cache(maxsize=64)
def _make_mask(queries: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what hides keys from a query when it is added; `before` keys lie before the first query."""
    distance = torch.arange(before, before + queries, device=device)[:, None]
    distance = distance - torch.arange(before + queries, device=device)
    hidden = (distance < 0) | (distance >= (window or before + queries))
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[:, None]


def _multiply_scaled(
    a: torch.Tensor, b: torch.Tensor, scale: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return scale * (a @ b), computed in one pass, in the beginning of a buffer if one is given."""
    shape = (len(a), a.shape[1], b.shape[2])
    view = None if out is None else out[: shape[0] * shape[1] * shape[2]].view(shape)
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale, out=view)


def _multiply_by_softmax_gradient(grad_weights: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the gradient of scores, on a CPU in place.

    A sink has no value, so that it adds nothing to the sum within: the formula is that of weights without.
    """
    out = {"grad_input": grad_weights} if grad_weights.device.type == "cpu" else {}
    return torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype, **out)


def _add_product(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> None:
    """Add scale * (a @ b) to sums, which may be more precise."""
    if sums.dtype == a.dtype:
        sums.baddbmm_(a, b, alpha=scale)
    else:
        sums += _multiply_scaled(a, b, scale)
