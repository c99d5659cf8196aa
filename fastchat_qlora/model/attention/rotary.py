"""Rotary embeddings whose frequencies depend on the length of a batch."""

import logging
from collections.abc import Iterator
from typing import Any

import torch

logger = logging.getLogger(__name__)


def forget_longest_rows(model: torch.nn.Module) -> None:
    """Make dynamic RoPE choose its frequencies by the batch at hand, in every forward pass.

    transformers (5.23, `dynamic_frequency_update` in modeling_rope_utils.py) keeps those of the longest row seen so
    far, so that an evaluation changes training, and a resumed run differs. This can go once it remembers nothing.
    """
    for module in model.modules():
        if prefixes := [prefix for prefix, kind in _list_kinds(module) if "dynamic" in kind]:
            module.register_forward_pre_hook(_Reset(prefixes))


def _list_kinds(module: Any) -> Iterator[tuple[str, str]]:
    """Yield the prefix of attributes and the kind of each RoPE of a module; models may have one per type of layer."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        yield "", kinds
    elif isinstance(kinds, dict):
        yield from ((f"{layer_type}_", kind) for layer_type, kind in kinds.items() if isinstance(kind, str))


class _Reset:
    """A forward pre-hook that restores the frequencies of short rows, which longer ones then replace."""

    def __init__(self, prefixes: list[str]) -> None:
        self._prefixes = prefixes

    def __call__(self, module: Any, inputs: Any) -> None:
        for prefix in self._prefixes:
            current, original = (getattr(module, f"{prefix}{name}") for name in ("inv_freq", "original_inv_freq"))
            module.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


class LongRopeLog:
    """Log, once for each, whether batches use LongRoPE's factors for short rows or those for long ones."""

    def __init__(self, model: torch.nn.Module) -> None:
        config: Any = model.config
        text = config.get_text_config()
        has_factors = any(kind == "longrope" for module in model.modules() for _, kind in _list_kinds(module))
        parameters = getattr(text, "rope_parameters", None) or {}
        limit = parameters.get("original_max_position_embeddings") if has_factors else None
        self._limit: int | None = limit or getattr(text, "original_max_position_embeddings", None)
        self._logged = set[bool]() if has_factors and self._limit else {False, True}

    def note(self, longest: int) -> None:
        """Take note of a batch by the tokens of its longest row or conversation."""
        is_long = longest > (self._limit or 0)
        if is_long not in self._logged:
            self._logged.add(is_long)
            kind = "long" if is_long else "short"
            logger.info(
                f"LongRoPE: a batch of conversations up to {longest:,} tokens uses the {kind} factors, by its longest "
                f"one; the limit is {self._limit:,} tokens."
            )
