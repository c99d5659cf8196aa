"""Attention along the paths of prefix trees, of which conversations that share nothing are the simplest."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastchat_qlora.model.attention.branches import Branches, lay_out_branches
from fastchat_qlora.model.attention.cpu_attention import BlockSettings, attend_in_blocks

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
    most_queries: int
    key_boundaries: torch.Tensor | None  # int32, shape (branches + 1,): of the paths laid end to end
    most_keys: int
    path_keys: torch.Tensor | None  # positions of the keys in the row, int64, shape (sum of path lengths,); None: all


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

    Raises:
        ValueError: the layer has attention sinks beside what is not supported with them.
    """
    if sinks is not None and (settings.dropout or settings.softcap is not None or sinks.requires_grad):
        raise ValueError("attention sinks are supported without dropout, cap and gradient only")
    laid_out = lay_out_branches(branches)
    if sinks is not None or (query.device.type == "cpu" and not settings.dropout and settings.softcap is None):
        scale = _get_scale(query, settings)
        return attend_in_blocks(query, key, value, BlockSettings(laid_out, scale, settings.window), sinks)
    attended = []
    for branch in laid_out:
        keys, values = (_gather_path(tensor, branch.path) for tensor in (key, value))
        attended.append(_attend_branch(query[:, :, branch.own], keys, values, settings).transpose(1, 2))
    return torch.cat(attended, dim=1)


def _gather_path(tensor: torch.Tensor, path: Sequence[slice]) -> torch.Tensor:
    parts = [tensor[:, :, piece] for piece in path]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _get_scale(query: torch.Tensor, settings: AttentionSettings) -> float:
    return query.shape[3] ** -0.5 if settings.scaling is None else settings.scaling


def _attend_branch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
) -> torch.Tensor:
    """Return attention of a branch's queries to the keys of its path, of which the last are their own."""
    if settings.softcap is not None:
        return _attend_softcapped(query, key, value, settings)
    queries, keys, window = query.shape[2], key.shape[2], settings.window
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
    if query.device.type != "cuda" or query.dtype not in HALF_PRECISION_DTYPES or inputs.key_boundaries is None:
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

    The last query of a branch attends up to the last key of its path: FlashAttention aligns its causal mask and its
    window there since its version 2.1.
    """
    by_token = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    attend = functools.partial(_call_varlen_attn, inputs=inputs, settings=settings)
    if inputs.path_keys is None:
        return attend(*by_token)[None]
    attended: torch.Tensor = _PathAttention.apply(*by_token, inputs.path_keys, attend)  # type: ignore[no-untyped-call]
    return attended[None]


def _call_varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, inputs: VarlenInputs, settings: AttentionSettings
) -> torch.Tensor:
    varlen_attn, needs_enable_gqa = _load_varlen_attn()
    window = (-1 if settings.window is None or settings.window >= inputs.most_keys else settings.window - 1, 0)
    options: dict[str, Any] = {"enable_gqa": True} if needs_enable_gqa and query.shape[1] != key.shape[1] else {}
    options |= {"scale": settings.scaling, "window_size": window}
    boundaries = inputs.query_boundaries, inputs.key_boundaries
    attended: torch.Tensor = varlen_attn(
        query, key, value, *boundaries, inputs.most_queries, inputs.most_keys, **options
    )
    return attended


class _PathAttention(torch.autograd.Function):
    """Attention to keys that are gathered by path, and gathered again in backward instead of kept for each branch.

    Backward computes attention once more, since torch's own backward of `varlen_attn` is no public function.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        path_keys: torch.Tensor,
        attend: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, path_keys)
        ctx.attend = attend
        return attend(query, key[path_keys], value[path_keys])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, path_keys = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key[path_keys], value[path_keys])]
        with torch.enable_grad():
            attended = ctx.attend(*inputs)
        grad_query, *by_path = torch.autograd.grad(attended, inputs, grad_outputs[0])
        sums = []
        for of_row, grad in zip((key, value), by_path, strict=True):
            # Many branches may add to a key; in half precision summed in fp32.
            dtype = torch.promote_types(grad.dtype, torch.float32)
            total = torch.zeros(of_row.shape, dtype=dtype, device=grad.device)
            sums.append(total.index_add_(0, path_keys, grad.to(dtype)).to(of_row.dtype))
        return grad_query, *sums, None, None
