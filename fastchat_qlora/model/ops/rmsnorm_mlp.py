"""Norms and MLPs of a frozen base that keep for backward only what cannot be had again for little.

Of the 19 KiB that a layer of SmolLM2-135M keeps for each token in bf16, with adapters on q_proj and v_proj, these two
kinds of modules keep 14 as transformers writes them: a norm the fp32 copy of its input, an MLP three tensors of its
full width. Here a norm keeps its input as it came, an MLP the two that its product is made of.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class MemoryEfficientRMSNorm(torch.nn.Module):
    """The norm of Llama and most of those that came after it (arXiv 1910.07467), its weight frozen.

    Values are those of transformers to the bit; gradients up to the order of rounding in fp32.

    Args:
        norm: the model's own; the weight is shared with it.
    """

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight: torch.nn.Parameter = norm.weight
        self.variance_epsilon = float(norm.variance_epsilon)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: shape (..., width). Returns the same shape."""
        if self.weight.requires_grad:  # a copy that --modules_to_save trains
            return self.weight * _divide_by_rms(hidden_states, self.variance_epsilon)[0]
        normed: torch.Tensor = _Normalise.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return normed

    def extra_repr(self) -> str:
        """What torch shows between the brackets."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class _Normalise(torch.autograd.Function):
    """weight * x / rms(x), with the quotient in fp32 and rounded to the dtype of x."""

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
        along = (grad * exact).mean(-1, keepdim=True) * factor.square()
        return torch.addcmul(grad, exact, along, value=-1).mul_(factor).to(x.dtype), None, None


def _divide_by_rms(x: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x), and 1 / rms(x) in fp32, shape (..., 1)."""
    exact = x.float()
    factor = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return (exact * factor).to(x.dtype), factor


class MemoryEfficientMLP(torch.nn.Module):
    """The gated MLP with SiLU of Llama and most of those that came after it (SwiGLU, arXiv 2002.05202).

    Values and gradients are those of transformers to the bit, as long as gate and up come in one dtype.

    Args:
        mlp: the model's own; its three layers become those of this one.
    """

    def __init__(self, mlp: LlamaMLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: shape (..., width). Returns the same shape."""
        product = _GatedProduct.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
        down: torch.Tensor = self.down_proj(product)
        return down


class _GatedProduct(torch.autograd.Function):
    """silu(gate) * up; silu(gate) is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad_outputs[0] * up, gate)
        return grad_gate, F.silu(gate).mul_(grad_outputs[0])


def use_memory_efficient_modules(model: torch.nn.Module, leave: Collection[str] = ()) -> int:
    """Put these modules in the place of those of a frozen model that compute the very same.

    Which ones do is read off their code: 140 norms and 134 MLPs of transformers 5.23 have the code of Llama's. Others
    stay as they are, and so do those to which something was added: hooks, or another way forward.

    Args:
        model: frozen, without an adapter.
        leave: names of classes that stay.

    Returns:
        How many were replaced.
    """
    made: dict[int, torch.nn.Module] = {}  # two names for one module stay two names for one module
    replaced = 0
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module).__name__ in leave:
            continue
        lean = made.get(id(module)) or _lean_version(module)
        if lean is not None:
            made[id(module)] = lean
            model.set_submodule(name, lean)
            replaced += 1
    return replaced


def _lean_version(module: Any) -> torch.nn.Module | None:
    if any(parameter.requires_grad for parameter in module.parameters(recurse=False)) or _is_changed(module):
        return None
    if _same_code(type(module).forward, LlamaRMSNorm.forward):
        return MemoryEfficientRMSNorm(module)
    if _same_code(type(module).forward, LlamaMLP.forward) and _is_silu(module.act_fn):
        return MemoryEfficientMLP(module)
    return None


def _is_changed(module: torch.nn.Module) -> bool:
    """Whether it does more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in vars(module) or any(hooks)


def _is_silu(module: torch.nn.Module) -> bool:
    return type(module).__name__ in ("SiLU", "SiLUActivation")


def _same_code(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    """Whether two functions do the same with the same names."""
    first, second = (getattr(function, "__code__", None) for function in (a, b))
    return first is not None and second is not None and _essence(first) == _essence(second)


def _essence(code: Any) -> tuple[Any, ...]:
    return code.co_code, code.co_consts, code.co_names, code.co_varnames
