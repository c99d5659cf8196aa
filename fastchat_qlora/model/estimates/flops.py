"""The arithmetic of time: what a token costs to compute, and how fast this machine's matrix products are."""

import time
from typing import Any

import numpy as np
import torch

from fastchat_qlora.model.estimates.memory import ModelCost

SECONDS = 0.5
"""For which matrix products are timed."""

ROWS = 1024


def flops_per_token(model: ModelCost, config: Any, lengths: np.ndarray[Any, Any], checkpointed: int) -> float:
    """Floating-point operations of training for one real token.

    Backward costs what forward costs: of a frozen weight's product only the gradient of its input is needed, and what
    the adapter adds is little. Attention, of which half is masked, takes two products of head size times keys in
    forward and twice as many in backward; the keys of a token are half its conversation's on average, weighted by
    tokens. A checkpointed layer is computed once more.

    Args:
        model: from `memory.profile`.
        config: of the base model.
        lengths: tokens of each conversation.
        checkpointed: how many layers are.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0  # state space models have none
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
    keys = float((lengths.astype(np.float64) ** 2).sum() / lengths.sum()) / 2
    attention = 4 * width * keys * text.num_hidden_layers
    again = checkpointed / max(1, model.layers)
    return float(2 * model.token.flops + 3 * attention + again * (model.token.flops + attention))


def flops_per_second(config: Any, dtype: torch.dtype, device: torch.device) -> float:
    """What this machine's device reaches in products of the size of the model's MLP; takes half a second."""
    text = config.get_text_config()
    inner, outer = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    rows = torch.ones((ROWS, inner), dtype=dtype, device=device)
    weight = torch.ones((inner, outer), dtype=dtype, device=device)
    rows @ weight  # the first one has kernels to choose
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < SECONDS:
        product = rows @ weight
        if device.type != "cpu":
            product[0, 0].item()  # waits for it
        done += 1
    return float(2.0 * ROWS * inner * outer * done / elapsed)
