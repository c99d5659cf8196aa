"""Attention within each conversation of a packed sequence, never across conversations."""

import functools
import inspect
import logging
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.attention.cpu_attention import attend_in_blocks
from fastchat_qlora.model.loading.auto_class import get_model_class

logger = logging.getLogger(__name__)

PER_CONVERSATION = "per_conversation"  # the name of `attend_per_conversation` among transformers' attention functions
SUPPORTED_LAYER_TYPES = {
    *("full_attention", "sliding_attention"),
    *("linear_attention", "conv", "hybrid"),  # see recurrent_layers.split_recurrent_layers
    *("mlp", "moe"),
}
HALF_PRECISION_DTYPES = (torch.float16, torch.bfloat16)
MAX_VARLEN_ELEMENTS = 2**31  # which FlashAttention 2 can index, with up to 128 tokens of padding for each conversation
MAX_VARLEN_HEAD_SIZE = 256


class AttentionSettings(NamedTuple):
    """The settings of an attention layer."""

    scaling: float | None  # of the scores; 1 / sqrt(head size) if None
    dropout: float  # probability of dropping an attention weight
    window: int | None  # tokens that a token attends to, itself included; all before it if None
    softcap: float | None  # scores are capped to +-softcap by its tanh; not at all if None


def attend_per_conversation(  # noqa: PLR0913  # transformers prescribes the signature
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
    """Return causal attention within each conversation, shape (1, tokens, heads, head size), and no weights.

    Args:
        query: shape (1, heads, tokens, head size).
        key, value: shape (1, key heads, tokens, head size); heads are a multiple of key heads.
        attention_mask: None; transformers makes no mask for a function that registers no mask function.
        scaling, dropout, sliding_window, softcap: see AttentionSettings.
        s_aux: score of each head's attention sink, shape (heads,), frozen.
        cu_seq_lens_q: start of each conversation and end of the last one, int32, shape (conversations + 1,).
        max_length_q: tokens of the longest conversation.
        conversation_lengths: tokens of each conversation.

    Raises:
        ValueError: the batch has no boundaries of conversations, or the layer needs what is not supported.
    """
    if cu_seq_lens_q is None or attention_mask is not None or len(query) != 1:
        raise ValueError(f"attention {PER_CONVERSATION!r} takes one packed sequence and its cu_seq_lens_q")
    if s_aux is not None and (dropout or softcap is not None or s_aux.requires_grad):
        raise ValueError(f"attention {PER_CONVERSATION!r} takes no dropout, cap or gradient with attention sinks")
    if sliding_window is not None and sliding_window >= max_length_q:
        sliding_window = None
    settings = AttentionSettings(scaling, dropout, sliding_window, softcap)
    if not dropout and softcap is None and s_aux is None and _supports_varlen(query, value, len(cu_seq_lens_q) - 1):
        return _attend_varlen((query, key, value), cu_seq_lens_q, max_length_q, settings)[None], None
    # Without the lengths as integers every layer waits for the device here; see Collator.
    lengths = list(conversation_lengths or cu_seq_lens_q.diff().tolist())
    parts = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True)
    return torch.cat([_attend(q, k, v, settings, s_aux).transpose(1, 2) for q, k, v in parts], dim=1), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Return attention of one conversation."""
    if settings.softcap is not None:
        return _attend_softcapped(query, key, value, settings)
    if sinks is None:
        return _attend_sdpa(query, key, value, settings)
    return attend_in_blocks(query, key, value, _get_scale(query, settings), settings.window, sinks)


def _get_scale(query: torch.Tensor, settings: AttentionSettings) -> float:
    return query.shape[3] ** -0.5 if settings.scaling is None else settings.scaling


def _attend_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
) -> torch.Tensor:
    """Return attention of one conversation by torch's kernels, or in bf16 on a CPU by a faster one."""
    length, window = query.shape[2], settings.window
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not settings.dropout:
        return attend_in_blocks(query, key, value, _get_scale(query, settings), window)
    mask = None if window is None or window >= length else _make_window_mask(length, window, query.device)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda and (mask is not None or query.dtype not in HALF_PRECISION_DTYPES):
        # On CUDA only FlashAttention takes grouped heads; any other kernel would write out all scores.
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    options: dict[str, Any] = {"dropout_p": settings.dropout, "scale": settings.scaling, "enable_gqa": groups > 1}
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, **options)


def _attend_softcapped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
) -> torch.Tensor:
    """Return attention of one conversation with capped scores, which no kernel of torch supports."""
    length = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * _get_scale(query, settings)
    assert settings.softcap is not None
    scores = settings.softcap * torch.tanh(scores / settings.softcap)
    mask = _make_window_mask(length, settings.window or length, query.device)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, settings.dropout) @ value


def _make_window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Return a mask, shape (length, length), of the last `window` tokens up to each token, itself included."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


@functools.cache
def _load_varlen_attn() -> tuple[Any, bool]:
    """Return torch's FlashAttention for packed sequences, and whether it needs `enable_gqa` for grouped heads.

    That flag came with torch 2.12 and disables a check that 2.11, the oldest supported here, does not make: the kernel
    takes grouped heads in both (`mha_varlen_fwd` and `mha_varlen_bwd` in aten's flash_api.cpp).
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _is_ampere_or_newer() -> bool:
    """Return whether this process's GPU is of the generation that FlashAttention 2 requires."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _supports_varlen(query: torch.Tensor, value: torch.Tensor, conversations: int) -> bool:
    """Return whether FlashAttention takes these tensors: half precision, heads up to 256 wide, Ampere or newer."""
    if query.device.type != "cuda" or query.dtype not in HALF_PRECISION_DTYPES:
        return False
    _, heads, tokens, width = query.shape
    elements = (tokens + 128 * conversations) * heads * ((width + 31) // 32 * 32)
    if not _is_ampere_or_newer() or torch.version.hip is not None or elements >= MAX_VARLEN_ELEMENTS:
        return False
    return width == value.shape[-1] and width <= MAX_VARLEN_HEAD_SIZE and width % 8 == 0


def _attend_varlen(
    inputs: tuple[torch.Tensor, ...], boundaries: torch.Tensor, longest: int, settings: AttentionSettings
) -> torch.Tensor:
    """Return attention of all conversations at once, shape (tokens, heads, head size)."""
    varlen_attn, needs_enable_gqa = _load_varlen_attn()
    query, key, value = (tensor[0].transpose(0, 1) for tensor in inputs)
    window = (-1 if settings.window is None else settings.window - 1, 0)
    options: dict[str, Any] = {"enable_gqa": True} if needs_enable_gqa and query.shape[1] != key.shape[1] else {}
    options |= {"scale": settings.scaling, "window_size": window}
    attended: torch.Tensor = varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **options)
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
    """Return the attention backend to request from transformers; None leaves the choice to transformers.

    With `auto`, a padding-free run uses FlashAttention where the package is installed and the model and its dtype
    support it, and `attend_per_conversation` elsewhere.
    """
    from transformers.utils import is_flash_attn_2_available

    AttentionInterface.register(PER_CONVERSATION, attend_per_conversation)
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
    if reason := _explain_unsupported(config):
        logger.warning(f"Using transformers' own attention with a mask: {reason}.")
        return None
    supports_flash = dtype in HALF_PRECISION_DTYPES and getattr(get_model_class(config), "_supports_flash_attn", False)
    return "flash_attention_2" if has_flash and supports_flash and _is_ampere_or_newer() else PER_CONVERSATION


def _explain_unsupported(config: PretrainedConfig) -> str:
    """Return the reason why a model cannot use `attend_per_conversation`; empty if it can."""
    model_class = get_model_class(config)
    if model_class is None:
        return "the model's code lies outside transformers"
    if not _uses_attention_interface(model_class):
        return f"{config.model_type} takes no other attention function"
    text = config.get_text_config()
    others = sorted(set(getattr(text, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES)
    if others:
        return f"{config.model_type} has layers of {', '.join(others)}"
    if getattr(text, "attention_chunk_size", None):
        return f"{config.model_type} attends in chunks"
    return ""


def _uses_attention_interface(cls: Any) -> bool:
    """Return whether a model calls functions of transformers' registry; hybrids do, but do not declare it."""
    names = vars(sys.modules[cls.__module__])
    has_own_classes = any(name.endswith("ATTENTION_CLASSES") for name in names)  # by the name of the attention
    # A module may use the registry for a tower only, beside a text part of eager layers (GIT).
    has_registry = cls._supports_sdpa and "ALL_ATTENTION_FUNCTIONS" in names and not has_own_classes
    return bool(cls._supports_attention_backend or has_registry)


def get_default_attention(model: PreTrainedModel) -> str:
    """Return the attention backend that transformers chooses by default."""
    return "sdpa" if model._supports_sdpa else "eager"
