"""Modules whose output never reaches the loss of a text, so that an adapter on them would not be trained.

Vision and audio towers are such modules, cross attention without an encoder, poolers, the indexers of sparse attention
(they only choose keys), and layers whose weight is read without a call (`dt_proj` of Jamba).
"""

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from fastchat_qlora.model.ops.meta_forward import run_on_meta

REACHING_TOKENS = (16, 256)
"""Of a row, and of a longer one for what the first does not reach: DeepSeek-V4 compresses 128 tokens into one key."""


def find_unreached(meta_model: PreTrainedModel, names: Collection[str]) -> frozenset[str]:
    """Return those of the named modules and parameters that no gradient of the loss of a text can reach.

    Args:
        meta_model: on the meta device, without adapter; its parameters are frozen.
        names: full names of modules, and of parameters such as the fused weights of experts.

    Raises:
        Exception: any error of a model that cannot run on the meta device.
    """
    meta_model.requires_grad_(False)
    unreached = frozenset(names)
    for tokens in REACHING_TOKENS:
        if unreached:
            unreached -= _find_reached(meta_model, unreached, tokens)
    return unreached


def _find_reached(meta_model: PreTrainedModel, names: Collection[str], tokens: int) -> set[str]:
    """Return the names to which autograd's graph leads from the logits of a row; no gradient is computed.

    Instead of a module, the graph is asked for a scalar that is added to the module's output.
    """
    parameters = {name: parameter for name, parameter in meta_model.named_parameters() if name in names}
    scalars = {name: torch.zeros((), device="meta", requires_grad=True) for name in names if name not in parameters}
    hooks = [meta_model.get_submodule(name).register_forward_hook(_Add(scalar)) for name, scalar in scalars.items()]
    was_training = meta_model.training
    meta_model.train()
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        leaves = _find_leaves(run_on_meta(meta_model, tokens))
    finally:
        meta_model.train(was_training).requires_grad_(False)
        for hook in hooks:
            hook.remove()
    return {name for name, tensor in (parameters | scalars).items() if id(tensor) in leaves}


class _Add:
    """A forward hook that adds a scalar to a module's first output."""

    def __init__(self, scalar: torch.Tensor) -> None:
        self._scalar = scalar

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self(module, inputs, output[0]), *output[1:])
        is_value = isinstance(output, torch.Tensor) and output.is_floating_point()
        return output + self._scalar.to(output.dtype) if is_value else output


def _find_leaves(output: torch.Tensor) -> set[int]:
    """Return the ids of the tensors in which autograd would accumulate gradients of an output."""
    pending, seen, leaves = [output.grad_fn], {None}, set()
    while pending:
        node: Any = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        pending += [following for following, _ in node.next_functions]
    return leaves
