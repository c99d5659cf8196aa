"""Norms and MLPs that save less for backward, compared with transformers' own."""

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, conversation, make_base, our_peft, plain_peft
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fastchat_qlora.model.ops.rmsnorm_mlp import (
    MemoryEfficientMLP,
    MemoryEfficientRMSNorm,
    use_memory_efficient_modules,
)

FP32, BF16 = torch.float32, torch.bfloat16


def kinds(model: torch.nn.Module) -> tuple[int, int]:
    modules = list(model.modules())
    return sum(isinstance(m, MemoryEfficientRMSNorm) for m in modules), sum(
        isinstance(m, MemoryEfficientMLP) for m in modules
    )


@pytest.mark.parametrize(
    ("family", "norms", "mlps"),
    [
        ("llama", 5, 2),
        ("qwen2", 5, 2),
        ("qwen3", 9, 2),  # with those of queries and keys
        ("mistral", 5, 2),
        ("phi3", 5, 0),  # gate and up are one layer
        ("gemma2", 0, 0),  # 1 + weight; GELU
        ("gemma3", 0, 0),
    ],
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_replaced_modules_keep_logits_and_names(family: str, norms: int, mlps: int, dtype: torch.dtype) -> None:
    """Logits are equal to the bit, and weights have the same names."""
    stock, efficient = (make_base(family, dtype=dtype) for _ in range(2))
    efficient.requires_grad_(False)
    use_memory_efficient_modules(efficient)
    assert kinds(efficient) == (norms, mlps)
    ids = torch.tensor([conversation(30, seed=1)["input_ids"]])
    assert torch.equal(stock(input_ids=ids).logits, efficient(input_ids=ids).logits)
    ours, theirs = efficient.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def with_gradient(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = module(x)
    output.backward(grad)
    assert x.grad is not None
    return output.detach(), x.grad


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 40), st.integers(0, 2**16), st.sampled_from([1e-3, 1.0, 1e3]))
def test_norm_equals_llamas(tokens: int, width: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    stock = LlamaRMSNorm(width)
    stock.weight = torch.nn.Parameter(torch.randn(width, generator=generator), requires_grad=False)
    x, grad = (torch.randn(1, tokens, width, generator=generator) for _ in range(2))
    (expected, expected_grad), (got, got_grad) = (
        with_gradient(m, size * x, grad) for m in (stock, MemoryEfficientRMSNorm(copy.deepcopy(stock)))
    )
    assert torch.equal(got, expected)
    torch.testing.assert_close(size * got_grad, size * expected_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_mlp_equals_llamas(dtype: torch.dtype) -> None:
    """Values and gradients to the bit."""
    torch.manual_seed(0)
    stock = LlamaMLP(FAMILIES["llama"]).to(dtype).requires_grad_(False)
    x, grad = (torch.randn(2, 11, 64, dtype=dtype) for _ in range(2))
    expected = with_gradient(stock, x, grad)
    got = with_gradient(MemoryEfficientMLP(stock), x, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_bf16_gradient_of_a_norm_is_as_accurate_as_llamas() -> None:
    """As exact as transformers' own."""
    torch.manual_seed(0)
    stock = LlamaRMSNorm(64).to(BF16).requires_grad_(False)
    x, grad = (torch.randn(1, 50, 64, dtype=BF16) for _ in range(2))
    exact = with_gradient(LlamaRMSNorm(64).requires_grad_(False), x.float(), grad.float())[1]
    errors = [(with_gradient(m, x, grad)[1].float() - exact).norm() for m in (stock, MemoryEfficientRMSNorm(stock))]
    assert 0 < errors[1] <= 1.05 * errors[0]


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.0, "target_modules": ["q_proj"]}])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_get_the_same_gradients(family: str, changes: dict[str, Any]) -> None:
    row = conversation(30, seed=2)
    gradients = []
    for model in (plain_peft(make_base(family), **changes), our_peft(make_base(family), **changes)):
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 0
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("saved", [["norm"], ["input_layernorm"], ["mlp"]])
def test_saved_modules_get_the_same_gradients(saved: list[str]) -> None:
    """--modules_to_save trains a copy of a module, also of a norm."""
    row = conversation(30, seed=3)
    changes = {"modules_to_save": saved, "target_modules": ["q_proj"]}
    gradients = []
    for make in (plain_peft, our_peft):
        model = make(make_base("llama"), **changes)
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "modules_to_save" in n})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 0
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-6)


def test_mlp_with_another_activation_is_not_replaced() -> None:
    model = make_base("llama", hidden_act="gelu").requires_grad_(False)
    use_memory_efficient_modules(model)
    assert kinds(model) == (5, 0)


def test_trained_modules_are_not_replaced() -> None:
    model = make_base("llama")
    use_memory_efficient_modules(model)
    assert kinds(model) == (0, 2), "the MLPs, which have no weights of their own"


def test_a_shared_module_stays_shared() -> None:
    model = make_base("llama").requires_grad_(False)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    use_memory_efficient_modules(model)
    assert kinds(model) == (5, 1)
    assert model.model.layers[1].mlp is model.model.layers[0].mlp
    assert isinstance(model.model.layers[1].mlp, MemoryEfficientMLP)


def test_changed_modules_are_not_replaced() -> None:
    model = make_base("llama").requires_grad_(False)
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * 0)
    model.model.layers[0].mlp.forward = lambda x: x
    use_memory_efficient_modules(model)
    assert kinds(model) == (4, 1)
    assert not model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.any()


def test_excluded_classes_are_not_replaced() -> None:
    model = make_base("llama").requires_grad_(False)
    use_memory_efficient_modules(model, ["LlamaMLP"])
    assert kinds(model) == (5, 0)


def count_saved_bytes(module: torch.nn.Module) -> int:
    """Return the bytes saved for ten tokens, without weights."""
    kept: list[torch.Tensor] = []
    x = torch.randn(1, 10, 64, dtype=BF16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def test_norm_and_mlp_save_few_bytes() -> None:
    """A norm saves its input and one number per token; an MLP saves gate and up."""
    norm = MemoryEfficientRMSNorm(LlamaRMSNorm(64).to(BF16).requires_grad_(False))
    mlp = MemoryEfficientMLP(LlamaMLP(FAMILIES["llama"]).to(BF16).requires_grad_(False))
    assert count_saved_bytes(norm) == 10 * (2 * 64 + 4)
    assert count_saved_bytes(mlp) == 10 * 2 * 2 * 128
