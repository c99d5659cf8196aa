"""--share_prefixes -> whether a run computes tokens that sequences share from their beginning on once."""

import logging
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.config.validation.flags import find_separating_flag
from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.batching.prefix_index import PrefixIndex, build_prefix_index
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.attention.attention import (
    PER_CONVERSATION,
    attends_by_varlen,
    explain_unsupported,
)
from fastchat_qlora.model.attention.recurrent_layers import has_recurrent_layers

logger = logging.getLogger(__name__)


def prefer_sharing(attention: str | None, args: RunArguments, config: PretrainedConfig) -> str | None:
    """Return the attention that auto has chosen, or in place of the flash-attn package the one that shares prefixes.

    Both have the same kernels of FlashAttention 2.
    """
    shares = args.data.share_prefixes != "False" and not find_separating_flag(*args)
    is_as_fast = attention == "flash_attention_2" and attends_by_varlen(config)
    return PER_CONVERSATION if shares and is_as_fast else attention


def explain_separation(
    args: RunArguments, config: PretrainedConfig, meta_model: PreTrainedModel | None, attention: str | None
) -> str:
    """Return the reason why each sequence of a run is computed by itself; empty if prefixes are shared.

    Raises:
        UserError: that is so with --share_prefixes True.
    """
    if args.data.share_prefixes == "False":
        return "--share_prefixes False"
    reason = _find_reason(args, config, meta_model, attention)
    if reason and args.data.share_prefixes == "True":
        raise UserError(f"--share_prefixes True: is not possible: {reason}; leave it on auto")
    return reason


def _find_reason(
    args: RunArguments, config: PretrainedConfig, meta_model: PreTrainedModel | None, attention: str | None
) -> str:
    if flag := find_separating_flag(*args):
        return f"with {flag} each sequence is computed by itself"
    if attention != PER_CONVERSATION:
        return explain_unsupported(config) or f"attention {attention} takes no prefix tree"
    if meta_model is not None and has_recurrent_layers(meta_model):
        return f"{config.model_type} has layers that carry a state from token to token"
    text, weight = config.get_text_config(), args.training.router_aux_loss_coef
    if weight or (weight is None and getattr(text, "output_router_logits", False)):
        return "the router loss is a mean over all tokens of a pass"
    return ""


def index_prefixes(sequences: Any, reason: str, conversations: int, seed: int) -> PrefixIndex | None:
    """Return the index of the training data; where nothing is shared for a reason, log what sharing would have saved.

    Args:
        sequences: of the training data.
        reason: from explain_separation.
        conversations: of an optimizer step, in all processes.
    """
    index = build_prefix_index(sequences)
    if not reason:
        return index
    total, saved = int(index.lengths.sum()), count_saved(index, get_column(sequences, "record"), conversations, seed)
    if saved and reason != "--share_prefixes False":
        logger.warning(
            f"--share_prefixes auto: sequences that begin alike are computed each by itself, though {saved:,} of "
            f"{total:,} tokens ({saved / total:.0%}) of an epoch need no second computation: {reason}."
        )
    return None


def count_saved(index: PrefixIndex, records: Any, conversations: int, seed: int) -> int:
    """Return the tokens that an epoch would save by steps of so many conversations, drawn at random.

    Args:
        records: shape (sequences,): the number of the conversation of each.
    """
    if not index.shared.any():
        return 0
    names, own = np.unique(records, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    steps = order[own] // conversations
    by_step = np.argsort(steps, kind="stable")
    parts = np.split(by_step, np.flatnonzero(np.diff(steps[by_step])) + 1)
    return int(index.lengths.sum()) - sum(index.count_computed(part) for part in parts)
