"""Products of experts with their tokens, in 16 and 4 bits, with LoRA beside them."""

import copy
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import make_mixture
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fastchat_qlora.model.ops import cpu_products
from fastchat_qlora.model.ops.cpu_products import LEAST_ROWS
from fastchat_qlora.model.ops.experts import (
    EXPERTS,
    Groups,
    LoraFactors,
    _GroupedLinear,
    compute_experts,
    is_served,
    unpack,
    use_compute_experts,
)

WITH_EXPERTS = ("qwen3_moe", "mixtral", "gpt_oss", "nemotron_h")


def get_experts(name: str) -> Any:
    return next(module for module in make_mixture(name).modules() if is_served(module))


def route(tokens: int, experts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 64, generator=generator)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, chosen = scores.topk(2)
    return hidden, chosen, weights


def pack(experts: Any) -> None:
    """Put the module's weights in 4 bits, as loading does."""
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if (weight := experts._parameters.get(name)) is not None:
            packed, state = quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True)
            experts.__dict__.setdefault("quant_states", {})[name] = state
            setattr(experts, name, torch.nn.Parameter(packed, requires_grad=False))


@pytest.mark.parametrize("name", WITH_EXPERTS)
@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(1, 40), seed=st.integers(0, 1000))
def test_the_output_is_that_of_transformers(name: str, tokens: int, seed: int) -> None:
    experts = get_experts(name)
    hidden, chosen, weights = route(tokens, experts.num_experts, seed)
    experts.config._experts_implementation = "eager"
    expected = experts(hidden, chosen, weights)
    torch.testing.assert_close(compute_experts(experts, hidden, chosen, weights), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_packed_weights_compute_as_unpacked_ones(name: str) -> None:
    packed = get_experts(name)
    pack(packed)
    plain = copy.deepcopy(packed)
    for key, state in packed.quant_states.items():
        setattr(plain, key, torch.nn.Parameter(unpack(getattr(packed, key), state)))
    plain.quant_states = {}
    hidden, chosen, weights = route(30, packed.num_experts, 0)
    gradients = []
    for experts in (packed, plain):
        inputs = hidden.clone().requires_grad_()
        output = compute_experts(experts, inputs, chosen, weights)
        gradients.append((output.detach(), *torch.autograd.grad(output.square().sum(), inputs)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_backward_keeps_packed_weights_only() -> None:
    experts = get_experts("qwen3_moe")
    unpacked = experts.gate_up_proj.numel() * 4
    pack(experts)
    hidden, chosen, weights = route(4, experts.num_experts, 0)
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compute_experts(experts, hidden.requires_grad_(), chosen, weights)
    assert max(saved) == experts.gate_up_proj.numel() < unpacked / 7


def test_grouped_products_are_those_expert_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = get_experts("qwen3_moe").to(torch.bfloat16)
    factors = LoraFactors(torch.randn(8, 3, 64) / 8, torch.randn(8, 64, 3) / 8, 2.0)
    experts.lora_factors = {"gate_up_proj": factors}
    hidden, chosen, weights = route(50, 8, 0)
    inputs = (hidden.bfloat16(), chosen, weights.bfloat16())
    expected = compute_experts(experts, *inputs)
    monkeypatch.setattr("fastchat_qlora.model.ops.experts.has_grouped_mm", lambda *_: True)
    torch.testing.assert_close(compute_experts(experts, *inputs), expected, rtol=0.02, atol=0.05)
    pack(experts)
    grouped = compute_experts(experts, *inputs)
    monkeypatch.undo()
    torch.testing.assert_close(grouped, compute_experts(experts, *inputs), rtol=0.02, atol=0.05)


def test_every_model_with_such_experts_is_given_the_function() -> None:
    model = make_mixture("mixtral")
    use_compute_experts(model)
    assert model.config._experts_implementation == EXPERTS
    assert ALL_EXPERTS_FUNCTIONS[EXPERTS] is compute_experts
    assert Groups(torch.tensor([1]), []).sizes == []


def test_experts_with_many_tokens_multiply_in_fp32_where_bf16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is rounded less often, so that it is no farther from that of fp32."""
    experts, (hidden, chosen, weights) = get_experts("mixtral"), route(600, 4, 0)
    exact = compute_experts(experts, hidden, chosen, weights)
    experts.to(torch.bfloat16)
    errors = {}
    for fast in (True, False):
        monkeypatch.setattr(cpu_products, "multiplies_fast_in_bf16", lambda fast=fast: fast)
        errors[fast] = (compute_experts(experts, hidden.bfloat16(), chosen, weights) - exact).abs().max()
    assert 0 < errors[False] <= 1.1 * errors[True]


def test_products_of_experts_are_those_of_fp32_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "multiplies_fast_in_bf16", lambda: False)
    weight, sizes = torch.randn(2, 48, 64).bfloat16(), [LEAST_ROWS, 90]
    inputs = torch.randn(sum(sizes), 64).bfloat16().requires_grad_()
    groups = Groups(torch.tensor(sizes).cumsum(0).int(), sizes)
    output = _GroupedLinear.apply(inputs, weight, None, False, groups)
    output.backward(grad := torch.randn_like(output))
    owners = torch.repeat_interleave(torch.tensor(sizes))
    expected = torch.einsum("ti,toi->to", inputs.double(), weight.double()[owners])
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-5)
    expected_grad = torch.einsum("to,toi->ti", grad.double(), weight.double()[owners])
    torch.testing.assert_close(inputs.grad.double(), expected_grad, rtol=2**-8, atol=1e-5)
