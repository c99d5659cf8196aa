"""Causal attention in bf16 on a CPU, backward at the speed of its matrix products.

Backward of torch's CPU kernel of FlashAttention goes through small products one by one. Measured with torch 2.13 on two
AVX512 cores with AMX (9 heads and 3 key heads of 64): 18.6 ms against 13.1 for 1,024 tokens, 13.3 against 8.0 for 700,
3.9 against 3.0 for 300; with AMX switched off 34.7 against 28.6, 19.1 against 15.2, 5.5 against 4.4. Its forward is the
faster one, so it is used. This can go once backward keeps up.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F

BLOCK = 256
"""Queries taken at a time: their scores for 1,024 keys and 9 heads are 4.5 MiB, near enough to stay in the caches."""


def attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Causal attention of one conversation; blocks of queries against all keys before their end.

    Nothing but the three inputs is kept for backward, which computes the weights again. There, and with a window,
    scores are rounded to the dtype of the inputs before the softmax, as in transformers' eager attention; torch's
    kernel keeps them in fp32.

    Args:
        query: shape (1, heads, tokens, width).
        key: shape (1, key heads, tokens, width); heads are a multiple of key heads.
        value: as key.
        scale: of the scores.
        window: how many tokens a token attends to, itself included; all before it if None.

    Returns:
        Shape (1, heads, tokens, width).
    """
    attended: torch.Tensor = _BlockAttention.apply(query, key, value, scale, window)  # type: ignore[no-untyped-call]
    return attended


class _BlockAttention(torch.autograd.Function):
    """Works on rows of (key heads, tokens x heads per key head, width), in which a block of queries is one slice."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.window = scale, window
        if window is None or window >= query.shape[2]:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        rows = _to_rows(query, key.shape[1])
        attended = torch.empty_like(rows)
        for block in _blocks(query, key, scale, window):
            attended[:, block.rows] = block.weights(rows) @ value[0, :, block.keys]
        return _from_rows(attended, query)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        rows, grads = (_to_rows(tensor, key.shape[1]) for tensor in (query, grad_outputs[0]))
        grad_rows = torch.empty_like(rows)
        # Every block adds to the keys before it; summed in fp32.
        grad_key, grad_value = (torch.zeros_like(tensor[0], dtype=torch.float32) for tensor in (key, value))
        for block in _blocks(query, key, ctx.scale, ctx.window):
            weights, grad = block.weights(rows), grads[:, block.rows]
            grad_value[:, block.keys] += weights.transpose(1, 2) @ grad
            grad_weights = grad @ value[0, :, block.keys].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_rows[:, block.rows] = _product(grad_scores, block.key, ctx.scale)
            grad_key[:, block.keys] += _product(grad_scores.transpose(1, 2), rows[:, block.rows], ctx.scale)
        grad_query = _from_rows(grad_rows, query)
        return grad_query, grad_key.to(key.dtype)[None], grad_value.to(value.dtype)[None], None, None


def _to_rows(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    """(1, heads, tokens, width) -> (key heads, tokens x heads per key head, width)."""
    _, _, tokens, width = tensor.shape
    return tensor.view(key_heads, -1, tokens, width).transpose(1, 2).reshape(key_heads, -1, width)


def _from_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The way back, to the shape of `like`; in memory the heads of a token lie side by side, as layers take them."""
    _, heads, tokens, width = like.shape
    return rows.view(len(rows), tokens, -1, width).transpose(0, 1).reshape(1, tokens, heads, width).transpose(1, 2)


class _Block:
    """Some neighbouring queries of a conversation and the keys that they attend to."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, start: int, end: int, scale: float, window: int | None
    ) -> None:
        groups = query.shape[1] // key.shape[1]
        first = 0 if window is None else max(0, start - window + 1)
        self.rows, self.keys = slice(start * groups, end * groups), slice(first, end)
        self.key, self._scale = key[0, :, self.keys], scale
        # Only these columns hold a score that does not count: the last ones, or with a window any.
        self._masked = slice(start - first if window is None else 0, None)
        self._forbidden = _forbidden(end - start, 0 if window is None else start - first, window)

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        """Attention weights, shape (key heads, queries x heads per key head, keys)."""
        scores = _product(rows[:, self.rows], self.key.transpose(1, 2), self._scale)
        by_head = torch.unflatten(scores[..., self._masked], 1, (len(self._forbidden), -1))
        by_head.masked_fill_(self._forbidden[:, None], -torch.inf)
        return scores.softmax(-1)


@functools.lru_cache(maxsize=32)
def _forbidden(queries: int, ahead: int, window: int | None) -> torch.Tensor:
    """Which query must not see which key; `ahead` keys lie before the first query."""
    distance = torch.arange(ahead, ahead + queries)[:, None] - torch.arange(ahead + queries)
    return (distance < 0) | (distance >= (window or ahead + queries))


def _product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * (a @ b) in one pass."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _blocks(query: torch.Tensor, key: torch.Tensor, scale: float, window: int | None) -> list[_Block]:
    length = query.shape[2]
    starts = range(0, length, BLOCK)
    return [_Block(query, key, start, min(start + BLOCK, length), scale, window) for start in starts]
