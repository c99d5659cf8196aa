"""--share_prefixes -> whether a run computes tokens that sequences share from their beginning on once."""

import logging
from typing import Any, NamedTuple

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.config.validation.flags import find_separating_flag
from fastchat_qlora.data.batching.prefix_index import PrefixIndex, build_prefix_index
from fastchat_qlora.data.batching.sampling import (
    build_sampler,
    count_saved_by_steps,
    find_conversations,
    number_conversations,
)
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


def find_separation(args: RunArguments) -> str:
    """Return the reason in the flags why each sequence is computed by itself; the model may be another one."""
    if args.data.share_prefixes == "False":
        return "--share_prefixes False"
    flag = find_separating_flag(*args)
    return f"with {flag} each sequence is computed by itself" if flag else ""


def explain_separation(
    args: RunArguments, config: PretrainedConfig, meta_model: PreTrainedModel | None, attention: str | None
) -> str:
    """Return the reason why each sequence of a run is computed by itself; empty if prefixes are shared.

    Raises:
        UserError: that is so with --share_prefixes True.
    """
    reason = find_separation(args) or _find_reason(args, config, meta_model, attention)
    if reason and args.data.share_prefixes == "True":
        raise UserError(f"--share_prefixes True: is not possible: {reason}; leave it on auto")
    return reason


def _find_reason(
    args: RunArguments, config: PretrainedConfig, meta_model: PreTrainedModel | None, attention: str | None
) -> str:
    if attention != PER_CONVERSATION:
        return explain_unsupported(config) or f"attention {attention} takes no prefix tree"
    if meta_model is not None and has_recurrent_layers(meta_model):
        return f"{config.model_type} has layers that carry a state from token to token"
    text, weight = config.get_text_config(), args.training.router_aux_loss_coef
    if weight or (weight is None and getattr(text, "output_router_logits", False)):
        return "the router loss is a mean over all tokens of a pass"
    return ""


class SharedTokens(NamedTuple):
    """Tokens of an epoch that others of their sequence's conversation, or of its step, begin with too."""

    total: int  # tokens
    conversations: int  # of these, repeated within conversations
    steps: int  # repeated within optimizer steps, those within conversations among them
    separation: str  # reason why they are computed again; empty if each is computed once

    def describe(self) -> str:
        """Return the counts as a sentence."""
        if not self.steps:
            return "none repeated in a step"
        within = f", {self.conversations:,} within conversations" if self.conversations else ""
        repeated = f"{self.steps:,} tokens ({self.steps / self.total:.0%}) repeated in steps{within}"
        return f"{repeated}: " + (
            f"computed again, {self.separation}" if self.separation else "one computation is enough"
        )


def count_shared_tokens(
    sequences: Any, index: PrefixIndex, args: RunArguments, separation: str, processes: int
) -> SharedTokens:
    """Count what sequences share within conversations, and within the steps of an epoch.

    With --packing True a step counts as so many conversations as fill it on average.
    """
    training, total = args.training, int(index.lengths.sum())
    if not index.shared.any():
        return SharedTokens(total, 0, 0, separation)
    at_once: float = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    if args.data.packing:
        at_once *= training.model_max_length / index.lengths.mean()
    seed = training.seed if training.data_seed is None else training.data_seed
    sampler = build_sampler(sequences, str(training.train_sampling_strategy), seed, int(at_once), index)
    within = index.count_saved(np.arange(len(index.lengths)), number_conversations(find_conversations(sequences)))
    return SharedTokens(total, within, count_saved_by_steps(sampler, index, int(at_once)), separation)


def index_prefixes(sequences: Any, args: RunArguments, reason: str, processes: int) -> PrefixIndex | None:
    """Return the index of the training data; where nothing is shared for a reason, log what sharing would have saved.

    Args:
        sequences: of the training data.
        reason: from explain_separation.
    """
    index = build_prefix_index(sequences)
    if not reason:
        return index
    total, _, saved, _ = count_shared_tokens(sequences, index, args, reason, processes)
    if saved and reason != "--share_prefixes False":
        logger.warning(
            f"--share_prefixes auto: sequences that begin alike are computed each by itself, though {saved:,} of "
            f"{total:,} tokens ({saved / total:.0%}) of an epoch need no second computation: {reason}."
        )
    return None
