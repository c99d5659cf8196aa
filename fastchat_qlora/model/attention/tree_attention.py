"""Attention along the paths of prefix trees, of which conversations that share nothing are the simplest."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastchat_qlora.model.attention.cpu_attention import attend_in_blocks

Branches = tuple[tuple[int, int], ...]
"""Parent (-1: none) and tokens of each branch, depth-first; each follows the last token of its parent."""

HALF_PRECISION_DTYPES = (torch.float16, torch.bfloat16)
MAX_VARLEN_ELEMENTS = 2**31  # which FlashAttention 2 can index, with up to 128 tokens of padding for each branch
MAX_VARLEN_HEAD_SIZE = 256


class AttentionSettings(NamedTuple):
    """The settings of an attention layer."""

    scaling: float | None  # of the scores; 1 / sqrt(head size) if None
    dropout: float  # probability of dropping an attention weight
    window: int | None  # tokens that a token attends to, itself included; all before it if None
    softcap: float | None  # scores are capped to +-softcap by its tanh; not at all if None


class VarlenInputs(NamedTuple):
    """The queries of each branch and the keys of its path, as torch's FlashAttention takes them."""

    query_boundaries: torch.Tensor  # int32, shape (branches + 1,)
    key_boundaries: torch.Tensor  # int32, shape (branches + 1,): of the paths laid end to end
    most_queries: int
    most_keys: int
    path_keys: torch.Tensor | None  # positions of the keys in the row, int64, shape (sum of path lengths,); None: all


class Branch(NamedTuple):
    """A branch of a prefix tree in its row."""

    start: int
    tokens: int
    before: int  # tokens of its path before it
    path: tuple[slice, ...]  # of the row, root first, itself last

    @property
    def queries(self) -> slice:
        """The branch's own tokens in the row."""
        return self.path[-1]


@functools.lru_cache(maxsize=64)
def lay_out_branches(branches: Branches) -> tuple[Branch, ...]:
    """Return each branch with its place and its path."""
    laid_out: list[Branch] = []
    start = 0
    for parent, tokens in branches:
        above = laid_out[parent] if parent >= 0 else None
        before, path = (above.before + above.tokens, above.path) if above else (0, ())
        laid_out.append(Branch(start, tokens, before, (*path, slice(start, start + tokens))))
        start += tokens
    return tuple(laid_out)


def attend_tree(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    branches: Branches,
    settings: AttentionSettings,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention of each token to the tokens of its path up to itself, shape (1, tokens, heads, head size).

    Args:
        query: shape (1, heads, tokens, head size).
        key, value: shape (1, key heads, tokens, head size); heads are a multiple of key heads.
        branches: of the row; see Branches.
        settings: of the layer; its window counts along the path.
        sinks: score of each head's attention sink, shape (heads,), frozen.
    """
    attended = []
    for branch in lay_out_branches(branches):
        keys, values = (_gather(tensor, branch.path) for tensor in (key, value))
        attended.append(_attend_branch(query[:, :, branch.queries], keys, values, settings, sinks).transpose(1, 2))
    return torch.cat(attended, dim=1)


def _gather(tensor: torch.Tensor, path: Sequence[slice]) -> torch.Tensor:
    parts = [tensor[:, :, piece] for piece in path]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _attend_branch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Return attention of a branch's queries, the last tokens of the path whose keys are given."""
    if settings.softcap is not None:
        return _attend_softcapped(query, key, value, settings)
    if sinks is None:
        return _attend_sdpa(query, key, value, settings)
    return _attend_with_sinks(query, key, value, settings, sinks)


def _attend_with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings, sinks: torch.Tensor
) -> torch.Tensor:
    """Return attention whose keys before the first query have queries of zeros, computed and dropped."""
    before = key.shape[2] - query.shape[2]
    scale = _get_scale(query, settings)
    return attend_in_blocks(F.pad(query, (0, 0, before, 0)), key, value, scale, settings.window, sinks)[:, :, before:]


def _get_scale(query: torch.Tensor, settings: AttentionSettings) -> float:
    return query.shape[3] ** -0.5 if settings.scaling is None else settings.scaling


def _attend_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
) -> torch.Tensor:
    """Return attention of one branch by torch's kernels, or in bf16 on a CPU by a faster one."""
    queries, keys, window = query.shape[2], key.shape[2], settings.window
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not settings.dropout and queries == keys:
        return attend_in_blocks(query, key, value, _get_scale(query, settings), window)
    is_causal = queries == keys and (window is None or window >= keys)
    mask = None if is_causal else _make_path_mask(queries, keys, window or keys, query.device)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda and (mask is not None or query.dtype not in HALF_PRECISION_DTYPES):
        # On CUDA only FlashAttention takes grouped heads; any other kernel would write out all scores.
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    options: dict[str, Any] = {"dropout_p": settings.dropout, "scale": settings.scaling, "enable_gqa": groups > 1}
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, **options)


def _attend_softcapped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
) -> torch.Tensor:
    """Return attention of one branch with capped scores, which no kernel of torch supports."""
    keys = key.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * _get_scale(query, settings)
    assert settings.softcap is not None
    scores = settings.softcap * torch.tanh(scores / settings.softcap)
    mask = _make_path_mask(query.shape[2], keys, settings.window or keys, query.device)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, settings.dropout) @ value


def _make_path_mask(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Return a mask, shape (queries, keys), of the last `window` keys up to each query, the last one's being last."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)


@functools.cache
def _load_varlen_attn() -> tuple[Any, bool]:
    """Return torch's FlashAttention for packed sequences, and whether it needs `enable_gqa` for grouped heads.

    That flag came with torch 2.12 and disables a check that 2.11, the oldest supported here, does not make: the kernel
    takes grouped heads in both (`mha_varlen_fwd` and `mha_varlen_bwd` in aten's flash_api.cpp).
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def is_ampere_or_newer() -> bool:
    """Return whether this process's GPU is of the generation that FlashAttention 2 requires."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def supports_varlen(query: torch.Tensor, value: torch.Tensor, inputs: VarlenInputs) -> bool:
    """Return whether FlashAttention takes these tensors: half precision, heads up to 256 wide, Ampere or newer."""
    if query.device.type != "cuda" or query.dtype not in HALF_PRECISION_DTYPES:
        return False
    _, heads, tokens, width = query.shape
    keys = tokens if inputs.path_keys is None else len(inputs.path_keys)
    padded = max(tokens * heads, keys * value.shape[1]) + 128 * (len(inputs.query_boundaries) - 1) * heads
    if not is_ampere_or_newer() or torch.version.hip is not None:
        return False
    if padded * ((width + 31) // 32 * 32) >= MAX_VARLEN_ELEMENTS:
        return False
    return width == value.shape[-1] and width <= MAX_VARLEN_HEAD_SIZE and width % 8 == 0


def attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, inputs: VarlenInputs, settings: AttentionSettings
) -> torch.Tensor:
    """Return attention of all branches at once, shape (1, tokens, heads, head size).

    The last query of a branch attends up to the last key of its path: FlashAttention's causal mask is aligned there
    since its version 2.1, and so is its window.
    """
    varlen_attn, needs_enable_gqa = _load_varlen_attn()
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if inputs.path_keys is not None:
        key, value = key[inputs.path_keys], value[inputs.path_keys]
    window = (-1 if settings.window is None or settings.window >= inputs.most_keys else settings.window - 1, 0)
    options: dict[str, Any] = {"enable_gqa": True} if needs_enable_gqa and query.shape[1] != key.shape[1] else {}
    options |= {"scale": settings.scaling, "window_size": window}
    attended: torch.Tensor = varlen_attn(query, key, value, *inputs[:4], **options)
    return attended[None]
