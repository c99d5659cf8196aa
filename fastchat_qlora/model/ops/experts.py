"""Mixtures of experts: products of each expert with its own tokens, of weights in 16 or 4 bits, with LoRA beside them.

transformers calls `compute_experts` for every class under its `use_experts_implementation`. Of weights in 4 bits one
expert is unpacked at a time on a CPU and a layer at a time on an accelerator, in forward and again in backward, so that
autograd keeps the packed weights only. An adapter's two factors multiply the tokens themselves; PEFT's own layer adds
their product to all weights of all experts in every step instead.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from fastchat_qlora.model.ops.cpu_products import get_product_dtype

EXPERTS = "per_expert"  # the name of `compute_experts` among transformers' experts functions
ALIGNED_BYTES = 16  # of a row for which CUDA has grouped products


class LoraFactors(NamedTuple):
    """The factors of an adapter on the weights of all experts."""

    a: torch.Tensor  # shape (experts, rank, inputs)
    b: torch.Tensor  # shape (experts, outputs, rank)
    scale: float


class Groups(NamedTuple):
    """Tokens sorted by expert."""

    ends: torch.Tensor  # end of each expert's tokens, int32, shape (experts,)
    sizes: list[int]  # tokens of each expert; empty where grouped products spare waiting for the device


def use_compute_experts(model: PreTrainedModel) -> None:
    """Compute the model's experts by `compute_experts`, where their classes let transformers choose."""
    ExpertsInterface.register(EXPERTS, compute_experts)
    if any(is_served(module) for module in model.modules()):
        model.set_experts_implementation(EXPERTS)


def is_served(module: torch.nn.Module) -> bool:
    """Return whether a module's class leaves its forward pass to transformers' experts functions."""
    return hasattr(module, "has_gate")


def compute_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of the chosen experts' outputs, shape (tokens, hidden size).

    Args:
        self: the experts of a layer; transformers' decorator has given it `has_gate`, `has_bias` and the like.
        hidden_states: shape (tokens, hidden size).
        top_k_index, top_k_weights: chosen experts of each token and their weights, shape (tokens, chosen).
    """
    tokens, chosen = top_k_index.shape
    order = top_k_index.flatten().argsort(stable=True)
    owners = top_k_index.flatten()[order]
    inputs = hidden_states[order // chosen]
    groups = _group(owners, self.num_experts, has_grouped_mm=has_grouped_mm(self, inputs))
    inner = _project(self, "gate_up_proj" if self.has_gate else "up_proj", inputs, owners, groups)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outputs = _project(self, "down_proj", inner, owners, groups)
    if self.has_post_expert_norm:
        outputs = self.post_expert_norm(outputs)
    outputs = outputs * top_k_weights.flatten()[order, None]
    unsorted = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return outputs[unsorted].view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)


def has_grouped_mm(experts: Any, inputs: torch.Tensor) -> bool:
    """Return whether all products of these experts can be grouped: on an accelerator, in bf16, in rows of 16 bytes."""
    if inputs.device.type in ("cpu", "meta") or inputs.dtype != torch.bfloat16:
        return False
    weight = experts.down_proj
    shape = weight.shape if (state := get_quant_states(experts).get("down_proj")) is None else state.shape
    return all(inputs.element_size() * width % ALIGNED_BYTES == 0 for width in shape[1:])


def _group(owners: torch.Tensor, experts: int, *, has_grouped_mm: bool) -> Groups:
    counts = torch.zeros(experts, dtype=torch.int64, device=owners.device)
    counts = counts.scatter_add(0, owners, torch.ones_like(owners))
    sizes = [] if has_grouped_mm or owners.is_meta else counts.tolist()
    return Groups(counts.cumsum(0).to(torch.int32), sizes)


def _project(experts: Any, name: str, inputs: torch.Tensor, owners: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return the outputs of the projection `name`, shape (tokens, outputs), with its bias and its adapter."""
    weight = getattr(experts, name)
    state = get_quant_states(experts).get(name)
    outputs: torch.Tensor = _GroupedLinear.apply(inputs, weight, state, experts.is_transposed, groups)  # type: ignore[no-untyped-call]
    if experts.has_bias:
        outputs = outputs + getattr(experts, f"{name}_bias")[owners]
    if factors := get_lora_factors(experts).get(name):
        padding = -factors.a.shape[1] % (ALIGNED_BYTES // inputs.element_size())  # zeros in the rank change nothing
        a = F.pad(factors.a.to(inputs.dtype), (0, 0, 0, padding))
        b = F.pad(factors.b.to(inputs.dtype), (0, padding))
        outputs = outputs + factors.scale * _multiply(_multiply(inputs, a, groups), b, groups)
    return outputs


def get_quant_states(experts: torch.nn.Module) -> dict[str, Any]:
    """Return the constants of the weights in 4 bits, by name of the parameter."""
    return experts.__dict__.get("quant_states", {})  # type: ignore[no-any-return]


def get_lora_factors(experts: torch.nn.Module) -> dict[str, LoraFactors]:
    """Return the factors of the adapter in use, by name of the parameter; they are there during a forward pass only."""
    return experts.__dict__.get("lora_factors", {})  # type: ignore[no-any-return]


class _GroupedLinear(torch.autograd.Function):
    """Each expert's tokens times its frozen weight: x W^T, shape (tokens, outputs)."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, state: Any, is_transposed: bool, groups: Groups
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, groups.ends)
        ctx.state, ctx.is_transposed, ctx.sizes = state, is_transposed, groups.sizes
        return _multiply_unpacked(inputs, weight, state, groups, inputs_first=is_transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, ends = ctx.saved_tensors
        groups = Groups(ends, ctx.sizes)
        gradient = _multiply_unpacked(grad_outputs[0], weight, ctx.state, groups, inputs_first=not ctx.is_transposed)
        return gradient, None, None, None, None


def _multiply_unpacked(
    inputs: torch.Tensor, weight: torch.Tensor, state: Any, groups: Groups, *, inputs_first: bool
) -> torch.Tensor:
    """Return inputs times the weights, shape (experts, inputs, outputs) or else (experts, outputs, inputs)."""
    shape = weight.shape if state is None else state.shape
    if inputs.is_meta:  # a product whose operations can be counted
        return inputs @ (weight[0] if inputs_first else weight[0].T)
    if not groups.sizes:
        whole = weight if state is None else unpack(weight, state)
        return F.grouped_mm(inputs, whole if inputs_first else whole.transpose(1, 2), offs=groups.ends)
    outputs = inputs.new_empty(len(inputs), shape[2] if inputs_first else shape[1])
    absmax = None if state is None else unpack_absmax(state)
    start = 0
    for expert, size in enumerate(groups.sizes):
        if size:
            tokens = slice(start, start + size)
            own = weight[expert] if absmax is None else unpack_expert(weight, state, absmax, expert)
            dtype = get_product_dtype(inputs.dtype, inputs.device, size)
            outputs[tokens] = inputs[tokens].to(dtype) @ (own if inputs_first else own.T).to(dtype)
        start += size
    return outputs


def _multiply(inputs: torch.Tensor, factor: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return inputs times the transposed factors, shape (experts, outputs, inputs), of their experts."""
    if inputs.is_meta:
        return F.linear(inputs, factor[0])  # autograd saves the same
    if not groups.sizes:
        return F.grouped_mm(inputs, factor.transpose(1, 2), offs=groups.ends)
    parts = zip(torch.split(inputs, groups.sizes), factor.unbind(), strict=True)
    return torch.cat([F.linear(part, of_expert) for part, of_expert in parts if len(part)])


def unpack_on_access(model: torch.nn.Module) -> None:
    """Make packed experts with a forward pass of their own see unpacked weights, once an adapter has been attached.

    Before that, PEFT would wrap the parameters in another order than in a model in 16 bits.
    """
    packed = [module for module in model.modules() if get_quant_states(module) and not is_served(module)]
    if not packed:
        return
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    for module in packed:
        for name, state in get_quant_states(module).items():
            device = getattr(module, name).device
            replace_parameter_4bit_prequantized(module, name, state.as_dict(packed=True), device)


def unpack(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return all weights in 4 bits, in the dtype that they had and in their shape.

    They are unpacked in rows of one block, or in one row: on CPUs with AVX-512 bitsandbytes begins every row with a new
    scale, although it packs blocks of the flattened weight (0.50.2, `dequantize_4bit`). Its own rows can be given again
    once `findings/unpacking_avx512.sh` fails.
    """
    from bitsandbytes.functional import dequantize_4bit

    size = state.shape.numel()
    shape = (1, size) if size % state.blocksize else (size // state.blocksize, state.blocksize)
    data = packed.detach().view(torch.uint8).flatten()[:, None]
    unpacked: torch.Tensor = dequantize_4bit(data, make_state(state, unpack_absmax(state), shape))
    return unpacked.view(state.shape)


def unpack_absmax(state: Any) -> torch.Tensor:
    """Return the scale of each block, in fp32, shape (blocks,); double quantization keeps it in 8 bits."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax  # type: ignore[no-any-return]
    scales: torch.Tensor = dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    return scales


def unpack_expert(packed: torch.Tensor, state: Any, absmax: torch.Tensor, expert: int) -> torch.Tensor:
    """Return the weight of one expert, which is whole blocks (see `quantizer.can_pack`)."""
    shape = state.shape[1:]
    blocks = shape.numel() // state.blocksize
    own = make_state(state, absmax[expert * blocks : (expert + 1) * blocks], shape)
    size = shape.numel() // 2
    return unpack(packed.detach().view(torch.uint8).flatten()[expert * size : (expert + 1) * size], own)


def make_state(state: Any, absmax: torch.Tensor, shape: Sequence[int]) -> Any:
    """Return the constants of a part of packed weights, of that shape and with these scales in fp32."""
    from bitsandbytes.functional import QuantState

    return QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
