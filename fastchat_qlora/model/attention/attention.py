"""Attention within each conversation of a packed sequence, never across conversations."""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.attention.tree_attention import (
    HALF_PRECISION_DTYPES,
    AttentionSettings,
    Branches,
    VarlenInputs,
    attend_tree,
    attend_varlen,
    is_ampere_or_newer,
    supports_varlen,
)
from fastchat_qlora.model.loading.auto_class import get_model_class

logger = logging.getLogger(__name__)

PER_CONVERSATION = "per_conversation"  # the name of `attend_per_conversation` among transformers' attention functions
SUPPORTED_LAYER_TYPES = {
    *("full_attention", "sliding_attention"),
    *("linear_attention", "conv", "hybrid"),  # see recurrent_layers.split_recurrent_layers
    *("mlp", "moe"),
}


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
    branches: Branches | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int = 0,
    path_keys: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return causal attention within each conversation, shape (1, tokens, heads, head size), and no weights.

    Conversations that share their beginnings are branches of prefix trees; then `conversation` reads `branch` below.

    Args:
        query: shape (1, heads, tokens, head size).
        key, value: shape (1, key heads, tokens, head size); heads are a multiple of key heads.
        attention_mask: None; transformers makes no mask for a function that registers no mask function.
        scaling, dropout, sliding_window, softcap: see AttentionSettings.
        s_aux: score of each head's attention sink, shape (heads,), frozen.
        cu_seq_lens_q: start of each conversation and end of the last one, int32, shape (conversations + 1,).
        max_length_q: tokens of the longest conversation.
        conversation_lengths: tokens of each conversation.
        branches: of the prefix trees; each token attends to its path.
        cu_seq_lens_k, max_length_k: boundaries and tokens of the paths, laid end to end, as cu_seq_lens_q.
        path_keys: positions in the row of the tokens of each branch's path, int64.

    Raises:
        ValueError: the batch has no boundaries of conversations, or the layer needs what is not supported.
    """
    if cu_seq_lens_q is None or attention_mask is not None or len(query) != 1:
        raise ValueError(f"attention {PER_CONVERSATION!r} takes one packed sequence and its cu_seq_lens_q")
    if s_aux is not None and (dropout or softcap is not None or s_aux.requires_grad):
        raise ValueError(f"attention {PER_CONVERSATION!r} takes no dropout, cap or gradient with attention sinks")
    settings = AttentionSettings(scaling, dropout, sliding_window, softcap)
    if not dropout and softcap is None and s_aux is None:
        varlen = VarlenInputs(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, None)
        if branches is not None and cu_seq_lens_k is not None:
            varlen = VarlenInputs(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, path_keys)
        if supports_varlen(query, value, varlen):
            return attend_varlen(query, key, value, varlen, settings), None
    if branches is None:
        # Without the lengths as integers every layer waits for the device here; see Collator.
        branches = tuple((-1, length) for length in conversation_lengths or cu_seq_lens_q.diff().tolist())
    return attend_tree(query, key, value, branches, settings, s_aux), None


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
    if reason := explain_unsupported(config):
        logger.warning(f"Using transformers' own attention with a mask: {reason}.")
        return None
    supports_flash = dtype in HALF_PRECISION_DTYPES and getattr(get_model_class(config), "_supports_flash_attn", False)
    return "flash_attention_2" if has_flash and supports_flash and is_ampere_or_newer() else PER_CONVERSATION


def explain_unsupported(config: PretrainedConfig) -> str:
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


def attends_by_varlen(config: PretrainedConfig) -> bool:
    """Return whether torch's FlashAttention computes a model's attention in half precision on a GPU that has it."""
    text = config.get_text_config()
    return not getattr(text, "attn_logit_softcapping", None) and not getattr(text, "attention_dropout", 0)


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
