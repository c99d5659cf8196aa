"""Forward passes of models on torch's meta device, which has shapes and no values."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class AssumedValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Results for operations that depend on values: a mask masks nothing, and one expert gets all tokens.

    Models ask whether a mask is all true, which experts are in use, or how many tokens each has. Products of experts
    need no value, but torch's function for the meta device (2.13, `meta_grouped_mm`) knows bf16 only, where that for
    the CPU takes fp32 as well; that case can go once it does.
    """

    def __init__(self, expert_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._expert_tokens = expert_tokens  # over all experts of a layer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor, kwargs = args[0] if args else None, kwargs or {}
        if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
        if func is aten.nonzero.default:
            found = tensor.numel() if tensor.dim() > 1 else 1
            return tensor.new_empty((tensor.dim(), found), dtype=torch.int64).T  # with the strides of a real one
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):  # tolist
            counts = torch.zeros(tensor.shape, dtype=tensor.dtype)
            counts.view(-1)[:1] = self._expert_tokens
            return counts
        if func is aten._grouped_mm.default:
            return tensor.new_empty((tensor.shape[0], args[1].shape[-1]))
        return func(*args, **kwargs)


def run_on_meta(model: Any, tokens: int) -> torch.Tensor:
    """Return the logits of one row of tokens, from a model on the meta device."""
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    with AssumedValues(tokens * chosen):
        return model(input_ids=ids, position_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
