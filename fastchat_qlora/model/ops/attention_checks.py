"""Checks that an attention backend works, and separates the conversations of a packed sequence."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.auto_class import get_text_attention
from fastchat_qlora.model.ops.attention import get_default_attention
from fastchat_qlora.utils.text import one_line


def check_attention(meta_model: PreTrainedModel | None, attention: str | None, accelerator: str | None) -> None:
    """Require that a model can be trained with an attention backend, before its weights are loaded.

    Without a meta model the backend is not tried. The accelerator is None on the CPU.
    """
    if attention is None:
        return
    if accelerator is None and attention.startswith("flex"):
        raise UserError(f"--attn_implementation {attention}: has no backward on a CPU; leave it on auto")
    if meta_model is None:
        return
    before = meta_model.config._attn_implementation
    try:
        meta_model.set_attn_implementation(get_text_attention(meta_model.config, attention))
    except (ImportError, ValueError, OSError) as error:
        reason = one_line(error, 300)
        raise UserError(f"--attn_implementation {attention}: cannot be used: {reason}; leave it on auto") from error
    meta_model.set_attn_implementation(get_text_attention(meta_model.config, before))


class Leakage(NamedTuple):
    """Relative changes of a conversation's logits (norm of the difference / norm of the logits)."""

    by_neighbor: float  # between two packed sequences that differ in the conversation before it
    by_row: float  # between a packed sequence and transformers' own attention on it alone

    def is_tight(self, dtype: torch.dtype) -> bool:
        """Return whether the changes are no more than rounding.

        Packed sequences that differ in the neighbor only are computed by the same kernels in the same order, so that
        only mixtures of experts may regroup. Another attention function rounds differently at every layer.
        """
        rounding = torch.finfo(dtype).eps
        return self.by_neighbor <= max(4 * rounding, 1e-5) and self.by_row <= max(8 * rounding, 1e-3)


@torch.no_grad()
def measure_leakage(
    model: PreTrainedModel,
    shared: Mapping[str, Any],
    changed: Mapping[str, Any],
    alone: torch.Tensor,
    forward: Callable[..., Any],
) -> Leakage:
    """Compare the logits of a conversation behind one conversation, behind another one, and alone.

    Args:
        model: the base model, in evaluation mode, on its device.
        shared: inputs of two conversations in one packed sequence, on that device, exactly as in training.
        changed: the same with other tokens in the first conversation.
        alone: the second conversation, input_ids of shape (1, tokens).
        forward: the model, or the strategy's wrapper around it; it may raise any error for such inputs.
    """
    tokens = alone.shape[1]
    packed, changed_packed = (_get_last_logits(forward(**inputs), tokens) for inputs in (shared, changed))
    in_use = model.config._attn_implementation
    model.set_attn_implementation(get_text_attention(model.config, get_default_attention(model)))
    try:
        by_itself = _get_last_logits(forward(input_ids=alone, use_cache=False), tokens)
    finally:
        model.set_attn_implementation(get_text_attention(model.config, in_use))
    return Leakage(_compute_relative_distance(changed_packed, packed), _compute_relative_distance(packed, by_itself))


def _get_last_logits(outputs: Any, count: int) -> torch.Tensor:
    return outputs.logits[0, -count:].float()  # type: ignore[no-any-return]


def _compute_relative_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
