"""Whether the attention asked for is there, before any weight is loaded."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.ops.attention import get_default_attention
from fastchat_qlora.utils.text import one_line


def check_attention(meta_model: PreTrainedModel | None, attention: str | None, accelerator: str | None) -> None:
    """Require that a model can be given this attention and be trained with it.

    Args:
        skeleton: from `loading.build_skeleton`; without it there is nobody to ask.
        attention: from `attention.choose_attention`.
        accelerator: type of the device trained on, or None on the CPU.

    Raises:
        UserError: naming what is missing.
    """
    if attention is None:
        return
    if accelerator is None and attention.startswith("flex"):
        raise UserError(f"--attn_implementation {attention}: has no backward on a CPU; leave it on auto")
    if meta_model is None:
        return
    before = meta_model.config._attn_implementation
    try:
        meta_model.set_attn_implementation(attention)
    except (ImportError, ValueError, OSError) as error:
        reason = one_line(error, 300)
        raise UserError(f"--attn_implementation {attention}: cannot be used: {reason}; leave it on auto") from error
    meta_model.set_attn_implementation(before)


class Leakage(NamedTuple):
    """How far logits of a conversation move, as a share of their size (root mean square).

    Attributes:
        by_neighbour: when the conversation before it in the row is another one.
        by_row: between a row that it shares and transformers' own attention on it alone.
    """

    by_neighbour: float
    by_row: float

    def is_tight(self, dtype: torch.dtype) -> bool:
        """Whether that is no more than rounding.

        A row that differs in its neighbour only is computed by the same kernels in the same order, so nothing may
        move but what mixtures of experts regroup. Another attention function rounds otherwise at every layer.
        """
        rounding = torch.finfo(dtype).eps
        return self.by_neighbour <= max(4 * rounding, 1e-5) and self.by_row <= max(8 * rounding, 1e-3)


@torch.no_grad()
def measure_leakage(
    model: PreTrainedModel,
    shared: Mapping[str, Any],
    changed: Mapping[str, Any],
    alone: torch.Tensor,
    forward: Callable[..., Any],
) -> Leakage:
    """Compare the logits of a conversation in a row with another one, with yet another one, and alone.

    Args:
        model: the base model, in evaluation mode, on its device.
        shared: inputs of two conversations in one row, on that device, just as training gives them.
        changed: the same with other tokens in the first of them.
        alone: the second one, input_ids of shape (1, tokens).
        forward: the model, or what a strategy has wrapped around it.

    Raises:
        Exception: whatever a model raises that cannot be asked in this way.
    """
    tail = alone.shape[1]
    in_row, in_changed_row = (_tail(forward(**inputs), tail) for inputs in (shared, changed))
    in_use = model.config._attn_implementation
    model.set_attn_implementation(get_default_attention(model))
    try:
        by_itself = _tail(forward(input_ids=alone, use_cache=False), tail)
    finally:
        model.set_attn_implementation(in_use)
    return Leakage(_distance(in_changed_row, in_row), _distance(in_row, by_itself))


def _tail(outputs: Any, count: int) -> torch.Tensor:
    logits: torch.Tensor = outputs.logits[0, -count:].float()
    return logits


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
