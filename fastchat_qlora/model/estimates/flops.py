"""Floating-point operations of a token, and the rate of this machine's products."""

import time
from typing import Any

import numpy as np
import torch

from fastchat_qlora.model.estimates.memory import ModelCost

Lengths = np.ndarray[Any, Any]  # in tokens

TIMING_SECONDS, TIMED_ROWS = 0.5, 1024


def compute_flops_per_token(
    model: ModelCost, lengths: Lengths, checkpointed: int, saved: Lengths | None = None
) -> float:
    """Return the floating-point operations of training for one computed token of conversations of these lengths.

    Backward costs as much as forward: a frozen weight needs the gradient of its input only, and the adapter adds
    little. Causal attention takes two products of head size times keys in forward and twice as many in backward. A
    checkpointed layer is computed once more.

    Args:
        saved: lengths of beginnings that are not computed again, if conversations share some.
    """
    saved = np.zeros(1) if saved is None else saved
    computed = lengths.sum() - saved.sum()
    attention = sum(
        flops * (count_keys(lengths, window) - count_keys(saved, window)) / computed
        for window, flops in model.token.attention.items()
    )
    recomputed = checkpointed / max(1, model.layers)
    return float(2 * model.token.flops + 3 * attention + recomputed * (model.token.flops + attention))


def compute_attention_share(model: ModelCost, longest: int) -> float:
    """Return what a token's attention to one key more costs, in the cost of its linear layers; half of them are hidden.

    A window that is shorter than the longest conversation makes a token dearer by a constant.
    """
    windows = model.token.attention.items()
    everywhere = sum(flops for window, flops in windows if not 0 < window < longest)
    within = sum(flops * window for window, flops in windows if 0 < window < longest)
    return 1.5 * everywhere / (2 * model.token.flops + 3 * within)


def count_keys(lengths: Lengths, window: int) -> float:
    """Return the number of keys of all tokens of conversations of these lengths; a window of 0 hides none.

    Of the first tokens each has one key more than the one before it, up to the window.
    """
    lengths = lengths.astype(np.float64)
    rising = np.minimum(lengths, window or np.inf)
    return float((rising**2 / 2 + (lengths - rising) * rising).sum())


def measure_flops_per_second(config: Any, dtype: torch.dtype, device: torch.device) -> float:
    """Return the device's rate in products of the size of the model's MLP, measured for half a second."""
    text = config.get_text_config()
    inner, outer = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    outer = outer if isinstance(outer, int) else max(outer)  # one for each layer
    rows = torch.ones((TIMED_ROWS, inner), dtype=dtype, device=device)
    weight = torch.ones((inner, outer), dtype=dtype, device=device)
    rows @ weight  # the first product selects a kernel
    products, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < TIMING_SECONDS:
        product = rows @ weight
        if device.type != "cpu":
            product[0, 0].item()  # waits for the device
        products += 1
    return float(2.0 * TIMED_ROWS * inner * outer * products / elapsed)
