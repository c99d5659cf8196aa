"""Attention that never crosses from one conversation into the next."""

import functools
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    PretrainedConfig,
    PreTrainedModel,
)

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.ops.cpu_attention import attend_in_blocks

logger = logging.getLogger(__name__)

PER_CONVERSATION = "per_conversation"
"""The name that `attend_per_conversation` has among transformers' attention functions."""

HALF = (torch.float16, torch.bfloat16)
LARGEST_INDEX = 2**31
"""FlashAttention 2 counts the numbers of one tensor in 32 bits, with up to 128 tokens more for each conversation."""


def attend_per_conversation(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    conversation_lengths: Sequence[int] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each conversation of one row; registered with transformers' AttentionInterface.

    Args:
        module: the attention layer that asks.
        query: shape (1, heads, tokens, width).
        key: shape (1, key heads, tokens, width); heads are a multiple of key heads.
        value: shape (1, key heads, tokens, width).
        attention_mask: none; transformers makes none for a function that has no mask function beside it.
        scaling: of the scores; 1 / sqrt(width) by default.
        dropout: of the attention weights.
        sliding_window: how many tokens a token attends to, itself included.
        softcap: scores are kept within +-softcap, by its tanh.
        s_aux: attention sinks, which this function does not have.
        cu_seq_lens_q: where conversations begin and where the last one ends, int32, shape (conversations + 1,).
        max_length_q: tokens of the longest conversation.
        conversation_lengths: tokens of each.

    Returns:
        The output, shape (1, tokens, heads, width), and no attention weights.

    Raises:
        ValueError: the batch does not say where its conversations are, or the layer needs what is not done here.
    """
    if cu_seq_lens_q is None or attention_mask is not None or len(query) != 1:
        raise ValueError(f"attention {PER_CONVERSATION!r} takes one row without padding and its cu_seq_lens_q")
    if s_aux is not None:
        raise ValueError(f"attention {PER_CONVERSATION!r} has no attention sinks")
    if sliding_window is not None and sliding_window >= max_length_q:
        sliding_window = None
    if not dropout and softcap is None and _fits_varlen(query, value, len(cu_seq_lens_q) - 1):
        attended = _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
        return attended[None], None
    # Without the lengths as integers this waits for the device once a layer; see Collator.
    lengths = list(conversation_lengths or cu_seq_lens_q.diff().tolist())
    parts = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True)
    if softcap is None:
        outputs = [_sdpa(q, k, v, scaling, dropout, sliding_window) for q, k, v in parts]
    else:
        outputs = [_softcapped(q, k, v, scaling, dropout, sliding_window, softcap) for q, k, v in parts]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


AttentionInterface.register(PER_CONVERSATION, attend_per_conversation)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention of one conversation, by whatever kernel torch has, or in bf16 on a CPU by a faster way."""
    length = query.shape[2]
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return attend_in_blocks(query, key, value, scale, sliding_window)
    mask = None
    if sliding_window is not None and sliding_window < length:
        mask = _window(length, sliding_window, query.device)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda and (mask is not None or query.dtype not in HALF):
        # Only FlashAttention takes groups there; without it all scores would be written out.
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=groups > 1,
    )


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float,
) -> torch.Tensor:
    """Attention of one conversation with capped scores, which no kernel of torch has: written out, with all scores."""
    length, width = query.shape[2:]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    mask = _window(length, sliding_window or length, query.device)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def _window(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Which token attends to which, shape (length, length): the last `window` ones, itself included."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


@functools.cache
def _varlen_attn() -> tuple[Any, bool] | None:
    """torch's FlashAttention for rows of several sequences, and whether fewer key heads than heads must be announced.

    It came with torch 2.10; `window_size` with 2.11, the oldest supported here, and `enable_gqa` with 2.12. The flag
    lifts a check that 2.11 does not make: the kernel takes groups of heads in all of them (`mha_varlen_fwd` and
    `mha_varlen_bwd` in aten's flash_api.cpp).
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _is_ampere() -> bool:
    """Whether this process's GPU is of that generation or newer, as FlashAttention 2 asks."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _fits_varlen(query: torch.Tensor, value: torch.Tensor, conversations: int) -> bool:
    """Whether FlashAttention can be had for these tensors: half precision, heads up to 256 wide, Ampere or newer."""
    if query.device.type != "cuda" or query.dtype not in HALF or _varlen_attn() is None:
        return False
    _, heads, tokens, width = query.shape
    numbers = (tokens + 128 * conversations) * heads * ((width + 31) // 32 * 32)
    capable = _is_ampere() and torch.version.hip is None
    return capable and width == value.shape[-1] and width <= 256 and width % 8 == 0 and numbers < LARGEST_INDEX


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention of all conversations at once; shape (tokens, heads, width)."""
    found = _varlen_attn()
    assert found is not None  # _fits_varlen has asked
    varlen_attn, announces_groups = found
    tokens_first = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    options = {"enable_gqa": True} if announces_groups and query.shape[1] != key.shape[1] else {}
    attended: torch.Tensor = varlen_attn(
        *tokens_first, boundaries, boundaries, longest, longest, scale=scaling, window_size=window, **options
    )
    return attended


def choose_attention(
    attn_implementation: str,
    flash_attn: bool,
    accelerator: str | None,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    padding_free: bool,
) -> str | None:
    """The attention to ask transformers for; None leaves it the choice.

    Left to choose (`auto`), a padding-free run takes FlashAttention where the package is installed and the model and
    its number format can use it, and else `attend_per_conversation`.

    Raises:
        UserError: `--flash_attn True` on a machine with an accelerator, but without the package.
    """
    from transformers.utils import is_flash_attn_2_available

    has_flash = accelerator == "cuda" and is_flash_attn_2_available()
    if flash_attn and accelerator is None:
        logger.warning("--flash_attn True: ignored, FlashAttention needs an accelerator.")
    elif flash_attn and not has_flash:
        raise UserError("--flash_attn True: the package flash-attn is not installed; install it or drop the flag")
    elif flash_attn:
        return "flash_attention_2"
    if attn_implementation != "auto":
        return attn_implementation
    if not padding_free:
        return None
    if reason := _why_stock(config):
        logger.warning(f"Attention is transformers' own, with a mask: {reason}.")
        return None
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if has_flash and _is_ampere() and dtype in HALF and getattr(cls, "_supports_flash_attn", False):
        return "flash_attention_2"
    return PER_CONVERSATION


def _why_stock(config: PretrainedConfig) -> str:
    """Why a model's attention is left to transformers' masks; nothing if `attend_per_conversation` can do it."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "the model's code lies outside transformers"
    if not getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_attention_backend", False):
        return f"{config.model_type} takes no other attention function"
    text = config.get_text_config()
    others = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if others:
        return f"{config.model_type} has layers of {', '.join(others)}"
    if getattr(text, "attention_chunk_size", None):
        return f"{config.model_type} attends in chunks"
    return ""


def get_default_attention(model: PreTrainedModel) -> str:
    """What transformers would have chosen."""
    return "sdpa" if model._supports_sdpa else "eager"
