"""Products in fp32 where a CPU is slow in half precision."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from families import lora_config, make_base, make_quantized_base
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.ops import chunked_loss, cpu_products
from fastchat_qlora.model.ops.cpu_products import LEAST_ROWS, FrozenLinear, multiply, multiply_by_transpose

BF16_ROUNDING = {"rtol": 2**-8, "atol": 1e-6}


@pytest.fixture(autouse=True)
def slow_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "multiplies_fast_in_bf16", lambda: False)


@given(
    rows=st.integers(1, 70),
    outputs=st.integers(1, 90),
    inputs=st.integers(1, 40),
    block=st.integers(1, 2000),
    dtype=st.sampled_from(cpu_products.HALF),
)
def test_blocks_add_up_to_the_product(rows: int, outputs: int, inputs: int, block: int, dtype: torch.dtype) -> None:
    weight = torch.randn(outputs, inputs).to(dtype)
    left, right = torch.randn(rows, inputs), torch.randn(rows, outputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_products, "BLOCK_WEIGHTS", block)
        assert_close(multiply_by_transpose(left, weight), left @ weight.float().T, rtol=1e-5, atol=1e-5)
        assert_close(multiply(right, weight), right @ weight.float(), rtol=1e-5, atol=1e-5)


def make_layer(*, bias: bool, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Linear:
    return torch.nn.Linear(96, 80, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(LEAST_ROWS, 96), (1, 70, 96), (2, 3, 40, 96)])
def test_output_and_gradient_are_rounded_once(shape: tuple[int, ...], bias: bool) -> None:
    layer = make_layer(bias=bias)
    x = torch.randn(shape).bfloat16().requires_grad_()
    grad = torch.randn(*shape[:-1], 80).bfloat16()
    output = FrozenLinear(layer)(x)
    output.backward(grad)
    exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    assert output.dtype == x.grad.dtype == torch.bfloat16
    assert_close(output.double(), exact, **BF16_ROUNDING)
    assert_close(x.grad.double(), grad.double() @ layer.weight.double(), **BF16_ROUNDING)


def test_few_rows_and_other_dtypes_are_as_before() -> None:
    """A token that is generated needs the whole weight; what is trained is torch's own."""
    layer = make_layer(bias=False)
    frozen, few, x = FrozenLinear(layer), torch.randn(LEAST_ROWS - 1, 96).bfloat16(), torch.randn(100, 96)
    assert torch.equal(frozen(few), F.linear(few, layer.weight))
    frozen.weight.requires_grad_()
    frozen(x.bfloat16()).sum().backward()
    assert frozen.weight.grad is not None
    exact = make_layer(bias=True, dtype=torch.float32)
    assert torch.equal(FrozenLinear(exact)(x), exact(x))


def test_autocast_does_not_cast_the_products_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on where an adapter trains parameters in fp32 beside a model in bf16."""
    layer, x = make_layer(bias=True), torch.randn(100, 96).bfloat16()
    dtypes = []

    def watch(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dtypes.append((rows @ weight.to(rows.dtype).T).dtype)
        return multiply_by_transpose(rows, weight)

    monkeypatch.setattr(cpu_products, "multiply_by_transpose", watch)
    with torch.autocast("cpu", torch.bfloat16):
        output = FrozenLinear(layer)(x)
    assert dtypes == [torch.float32] and output.dtype == torch.bfloat16


def count_frozen(model: torch.nn.Module) -> int:
    return sum(type(module) is FrozenLinear for module in model.modules())


@pytest.mark.parametrize(
    ("dtype", "fast", "expected"),
    [(torch.bfloat16, False, 14), (torch.bfloat16, True, 0), (torch.float32, False, 0), (torch.float16, True, 14)],
)
def test_layers_are_replaced_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fast: bool, expected: int
) -> None:
    """All seven of both layers, below adapters and beside them; never the head."""
    monkeypatch.setattr(cpu_products, "multiplies_fast_in_bf16", lambda: fast)
    model = attach_adapter(make_base("llama", "sdpa", dtype), lora_config())
    assert count_frozen(model) == expected
    assert type(model.get_base_model().get_output_embeddings()) is torch.nn.Linear


def test_saved_modules_stay_trained() -> None:
    model = attach_adapter(make_base("llama", "sdpa", torch.bfloat16), lora_config(modules_to_save=["down_proj"]))
    ids = torch.arange(LEAST_ROWS)[None] % 50
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids).logits.float().square().mean().backward()
    saved = {name: p.grad for name, p in model.named_parameters() if "modules_to_save" in name}
    assert len(saved) == 2
    assert all(grad is not None and grad.abs().sum() > 0 for grad in saved.values())


@pytest.mark.parametrize("bias", [True, False])
def test_losses_of_a_head_in_bf16_are_those_of_fp32(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    """The softmax and its product with the weight are never rounded to bf16."""
    monkeypatch.setattr(cpu_products, "BLOCK_WEIGHTS", 1000)
    monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", {"cpu": 4 * 300 * 100})
    head = torch.nn.Linear(96, 300, bias=bias, dtype=torch.bfloat16)
    hidden, labels = torch.randn(1, 200, 96).bfloat16().requires_grad_(), torch.randint(300, (200,))
    loss_head = chunked_loss.LossHead(head)
    with loss_head.expecting(torch.arange(200), labels):
        losses = loss_head.read_losses(loss_head(hidden))
    losses.sum().backward()
    exact = hidden[0].detach().float().requires_grad_()
    expected = F.cross_entropy(
        F.linear(exact, head.weight.float(), head.bias.float() if bias else None), labels, reduction="none"
    )
    expected.sum().backward()
    assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert_close(hidden.grad[0].float(), exact.grad, **BF16_ROUNDING)


@pytest.mark.parametrize(("fast", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_layers_of_4_bits_compute_in_fp32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fast: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(cpu_products, "multiplies_fast_in_bf16", lambda: fast)
    base = make_quantized_base(tmp_path)
    layers = [module for module in base.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        layer.compute_dtype = torch.bfloat16
    attach_adapter(base, lora_config())
    assert [layer.compute_dtype for layer in layers] == [expected] * 14
