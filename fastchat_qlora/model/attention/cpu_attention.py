"""Causal attention in blocks: in bf16 on a CPU, with backward as fast as its products, and with attention sinks.

Backward of torch's CPU kernel of FlashAttention is slowed by many small products: 18.6 ms against 13.1 here for 1,024
tokens, 3.9 against 3.0 for 300 (torch 2.13, two AVX512 cores with AMX, 9 heads and 3 key heads of 64). Its forward is
the faster one, so it is used. This can go once its backward keeps up, and torch's attention takes sinks.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

BLOCK_QUERIES = 256  # whose scores for 1,024 keys and 9 heads take 4.5 MiB, so that most stay in the caches


def attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return causal attention of one conversation, computed by blocks of queries against all keys before their end.

    Only the three inputs are saved for backward, which computes the weights again. In backward, and with a window,
    scores are rounded to the dtype of the inputs before the softmax, as in transformers' eager attention; torch's
    kernel keeps them in fp32.

    Args:
        query: shape (1, heads, tokens, head size), which the result has too, with the size of the values.
        key, value: shape (1, key heads, tokens, head size); heads are a multiple of key heads.
        scale: of the scores.
        window: tokens that a token attends to, itself included; all before it if None.
        sinks: score of each head's attention sink, which has no value; shape (heads,), frozen.
    """
    attended: torch.Tensor = _BlockAttention.apply(query, key, value, sinks, (scale, window))  # type: ignore[no-untyped-call]
    return attended


class _BlockAttention(torch.autograd.Function):
    """Attention on (key heads, tokens x heads per key head, head size), with each block of queries as one slice."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        settings: tuple[float, int | None],
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        scale, window = ctx.settings = settings
        if sinks is None and (window is None or window >= query.shape[2]):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        rows = _group_by_key_head(query, key.shape[1])
        attended = rows.new_empty(*rows.shape[:2], value.shape[3])
        for block in _split_into_blocks(query, key, scale, window):
            attended[:, block.queries] = block.compute_weights(rows, sinks) @ value[0, :, block.keys]
        return _ungroup(attended, query.shape[2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        scale, window = ctx.settings
        rows, grads = (_group_by_key_head(tensor, key.shape[1]) for tensor in (query, grad_outputs[0]))
        grad_rows = torch.empty_like(rows)
        # Every block adds to the keys before it; summed in fp32.
        grad_key, grad_value = (torch.zeros_like(tensor[0], dtype=torch.float32) for tensor in (key, value))
        for block in _split_into_blocks(query, key, scale, window):
            weights, grad = block.compute_weights(rows, sinks), grads[:, block.queries]
            grad_value[:, block.keys] += weights.transpose(1, 2) @ grad
            grad_weights = grad @ value[0, :, block.keys].transpose(1, 2)
            # A sink has no value, so that it adds nothing to the sum within: the formula is that of weights without.
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_rows[:, block.queries] = _multiply_scaled(grad_scores, block.key, scale)
            grad_key[:, block.keys] += _multiply_scaled(grad_scores.transpose(1, 2), rows[:, block.queries], scale)
        grad_query = _ungroup(grad_rows, query.shape[2])
        return grad_query, grad_key.to(key.dtype)[None], grad_value.to(value.dtype)[None], None, None


def _group_by_key_head(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Return (1, heads, tokens, head size) as (key heads, tokens x heads per key head, head size)."""
    _, _, tokens, width = tensor.shape
    return tensor.view(key_heads, -1, tokens, width).transpose(1, 2).reshape(key_heads, -1, width)


def _ungroup(rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return grouped rows as (1, heads, tokens, head size); the heads of a token are adjacent, as layers expect."""
    width = rows.shape[2]
    return rows.view(len(rows), tokens, -1, width).transpose(0, 1).reshape(1, tokens, -1, width).transpose(1, 2)


class _Block:
    """Adjacent queries of a conversation, from `start` on, and the keys of their attention."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, start: int, scale: float, window: int | None) -> None:
        end, groups = min(start + BLOCK_QUERIES, query.shape[2]), query.shape[1] // key.shape[1]
        first = 0 if window is None else max(0, start - window + 1)
        self.queries, self.keys = slice(start * groups, end * groups), slice(first, end)
        self.key, self._scale = key[0, :, self.keys], scale
        # Without a window only the last columns need a mask; with one any column does.
        self._masked = slice(start - first if window is None else 0, None)
        self._mask = _make_mask(end - start, 0 if window is None else start - first, window, query.device)

    def compute_weights(self, rows: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """Return attention weights, shape (key heads, queries x heads per key head, keys)."""
        scores = _multiply_scaled(rows[:, self.queries], self.key.transpose(1, 2), self._scale)
        by_head = torch.unflatten(scores[..., self._masked], 1, (len(self._mask), -1))
        by_head.masked_fill_(self._mask[:, None], -torch.inf)
        if sinks is None:
            return scores.softmax(-1)
        of_rows = sinks.to(scores.dtype).view(len(rows), 1, -1).expand(-1, len(self._mask), -1).flatten(1)
        return torch.cat([scores, of_rows[..., None]], -1).softmax(-1)[..., :-1]


@functools.lru_cache(maxsize=32)
def _make_mask(queries: int, before: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return a mask of the keys that a query must not attend to; `before` keys lie before the first query."""
    distance = torch.arange(before, before + queries, device=device)[:, None]
    distance = distance - torch.arange(before + queries, device=device)
    return (distance < 0) | (distance >= (window or before + queries))


def _multiply_scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * (a @ b), computed in one pass."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _split_into_blocks(query: torch.Tensor, key: torch.Tensor, scale: float, window: int | None) -> Iterator[_Block]:
    return (_Block(query, key, start, scale, window) for start in range(0, query.shape[2], BLOCK_QUERIES))
