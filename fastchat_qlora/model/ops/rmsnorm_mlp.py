"""Norms and MLPs of a frozen base model that save fewer bytes for backward.

A layer of SmolLM2-135M with adapters on q_proj and v_proj saves 19 KiB for each token in bf16. As transformers writes
them, norms and MLPs save 14 of these: a norm the fp32 copy of its input, an MLP three tensors of its full width. Here a
norm saves its input as it is, and an MLP the two factors of its product.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fastchat_qlora.model.ops.cpu_products import FrozenLinear, get_product_dtype


class MemoryEfficientRMSNorm(torch.nn.Module):
    """The norm of Llama and most later models (arXiv 1910.07467), with a frozen weight.

    Values equal those of transformers bit for bit; gradients up to the order of rounding in fp32.
    """

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight: torch.nn.Parameter = norm.weight
        self.variance_epsilon = float(norm.variance_epsilon)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalized hidden states, in their shape."""
        if self.weight.requires_grad:  # a copy that --modules_to_save trains
            return self.weight * _divide_by_rms(hidden_states, self.variance_epsilon)[0]
        normed: torch.Tensor = _Normalize.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return normed


class _Normalize(torch.autograd.Function):
    """The function weight * x / rms(x), with the quotient computed in fp32 and rounded to the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        divided, factor = _divide_by_rms(x, epsilon)
        ctx.save_for_backward(x, weight, factor)
        return weight * divided

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        # y = x f with f = (mean(x^2) + e)^-1/2, so that dx = f (dy - x f^2 mean(dy x)).
        grad = (grad_outputs[0] * weight).to(x.dtype).float()
        exact = x.float()
        projection = (grad * exact).mean(-1, keepdim=True) * factor.square()
        return torch.addcmul(grad, exact, projection, value=-1).mul_(factor).to(x.dtype), None, None


def _divide_by_rms(x: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x / rms(x), and 1 / rms(x) in fp32, shape (..., 1)."""
    exact = x.float()
    factor = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return (exact * factor).to(x.dtype), factor


class MemoryEfficientMLP(torch.nn.Module):
    """The gated MLP with SiLU of Llama and most later models (SwiGLU, arXiv 2002.05202).

    Values and gradients equal those of transformers bit for bit, as long as gate and up have one dtype.
    """

    def __init__(self, mlp: LlamaMLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output, in the shape of x."""
        product = _GatedProduct.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
        down: torch.Tensor = self.down_proj(product)
        return down


class _GatedProduct(torch.autograd.Function):
    """The function silu(gate) * up, with silu(gate) recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad_outputs[0] * up, gate)
        return grad_gate, F.silu(gate).mul_(grad_outputs[0])


def use_memory_efficient_modules(model: torch.nn.Module, excluded_classes: Collection[str] = ()) -> None:
    """Replace a frozen model's norms and MLPs that compute the same as Llama's, and linear layers that are slow.

    Norms and MLPs are found by the bytecode of their forward: 140 norms and 134 MLPs of transformers 5.23 have that of
    Llama's. Modules with hooks, with a forward of their own or of a class in `excluded_classes` stay.
    """
    made: dict[int, torch.nn.Module] = {}  # a module with two names keeps both
    head = getattr(model, "get_output_embeddings", lambda: None)()  # becomes a LossHead
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module).__name__ in excluded_classes or module is head:
            continue
        efficient = made.get(id(module)) or _make_efficient(module)
        if efficient is not None:
            made[id(module)] = efficient
            model.set_submodule(name, efficient)


def _make_efficient(module: Any) -> torch.nn.Module | None:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    is_trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    if is_trained or "forward" in vars(module) or any(hooks):
        return None
    if type(module) is torch.nn.Linear:
        dtype = module.weight.dtype
        return FrozenLinear(module) if get_product_dtype(dtype, module.weight.device) != dtype else None
    forward = type(module).forward
    if _has_same_code(forward, LlamaRMSNorm.forward):
        return MemoryEfficientRMSNorm(module)
    uses_silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return MemoryEfficientMLP(module) if uses_silu and _has_same_code(forward, LlamaMLP.forward) else None


def _has_same_code(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    """Return whether two functions have the same bytecode, constants and names."""
    if not (hasattr(a, "__code__") and hasattr(b, "__code__")):
        return False
    attributes = ("co_code", "co_consts", "co_names", "co_varnames")
    return all(getattr(a.__code__, name) == getattr(b.__code__, name) for name in attributes)
