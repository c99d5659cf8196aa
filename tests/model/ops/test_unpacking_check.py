"""Weights in 4 bits that a kernel unpacks wrongly are found by a table of the 16 values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_runs import command, train
from saved_adapters import save_base
from transformers import LlamaConfig

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.merging.dequantize import make_weight_rounding
from fastchat_qlora.model.ops.experts import unpack
from fastchat_qlora.model.ops.unpacking_check import Packing, check_unpacking, find_packings, unpack_by_table
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization, build_quantization_config
from fastchat_qlora.model.quantization.published_weights import dequantize_bitsandbytes

CPU = torch.device("cpu")


def check(width: int, unpack: Any, kind: str = "nf4", dtype: torch.dtype = torch.float32) -> None:
    check_unpacking("--model_name_or_path m", [("layers.0.up", Packing(width, kind, dtype, CPU))], unpack)


def unpack_rows_from_new_blocks(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Stand in for the kernel for AVX-512: it takes every row to begin with a block of its own."""
    rows, width = state.shape
    exact = unpack_by_table(packed, state)
    scales = state.absmax.repeat_interleave(state.blocksize)[: exact.numel()].view(rows, width)
    blocks = -(-width // state.blocksize)
    begun = [
        state.absmax[row * width // state.blocksize :][:blocks].repeat_interleave(state.blocksize)
        for row in range(rows)
    ]
    return exact / scales * torch.stack([torch.cat([one, one])[:width] for one in begun])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [64, 128, 1024])
def test_right_kernels_pass(width: int, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(width, None, kind, dtype)


@pytest.mark.parametrize("width", [16, 48, 80, 96, 160, 176])
def test_weights_are_unpacked_right_in_one_way_at_least(width: int) -> None:
    """Where bitsandbytes is wrong, as on CPUs with AVX-512, our own unpacking is right."""
    check(width, unpack, dtype=torch.bfloat16)
    try:
        check(width, None)
    except UserError:
        assert torch.backends.cpu.get_cpu_capability() == "AVX512"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_wrong_kernel_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=r"^--model_name_or_path m: .* of 176 inputs, such as layers\.0\.up, wrongly"):
        check(176, unpack_rows_from_new_blocks, kind)
    check(128, unpack_rows_from_new_blocks, kind)  # rows of whole blocks are right


def test_a_kernel_that_returns_no_numbers_is_refused() -> None:
    with pytest.raises(UserError, match=r"of 64 inputs, such as layers\.0\.up, wrongly"):
        check(64, lambda packed, state: torch.full(state.shape, torch.nan))


def test_linear_layers_and_experts_of_a_loaded_model_are_found() -> None:
    linear = Linear4bit(64, 80, bias=False, quant_type="nf4").to("cpu")
    experts = torch.nn.Module()
    _, state = quantize_4bit(torch.randn(2, 64, 32), blocksize=128, quant_type="fp4")
    experts.__dict__["quant_states"] = {"down_proj": state}
    model = torch.nn.ModuleDict({"linear": linear, "experts": experts, "plain": torch.nn.Linear(4, 4)})
    own = ("experts", Packing(32, "fp4", torch.float32, CPU, blocksize=128))
    assert list(find_packings(model)) == [("linear", Packing(64, "nf4", torch.float32, CPU)), own]
    experts.has_gate = True  # whose weights `compute_experts` unpacks
    assert [name for name, _ in find_packings(model)] == ["linear"]


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every CPU the kernel for AVX-512."""
    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", unpack_rows_from_new_blocks)


@pytest.mark.usefixtures("wrong_kernel")
def test_a_run_is_refused_before_weights_are_loaded(
    tokenizer_folder: Path, data_file: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    model = save_base(tmp_path / "base", tokenizer_folder, "llama", torch.float32, intermediate_size=80)
    arguments = command(model, data_file, tmp_path / "out", q_lora=True, use_cpu=True)
    with pytest.raises(UserError, match=r"of 80 inputs, such as model\.layers\.0\.mlp\.down_proj, .* \(--q_lora F"):
        train(arguments)
    assert "Loading the weights" not in notices.text and not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.usefixtures("wrong_kernel")
def test_merge_and_dequantize_base_unpack_right_nevertheless() -> None:
    weight = torch.randn(64, 80)
    settings = build_quantization_config(BaseQuantization("nf4", True), torch.float32)
    assert settings is not None
    config = LlamaConfig(hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=2)
    rounded = make_weight_rounding(config, settings, torch.float32, CPU).apply(weight)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(rounded, unpack_by_table(packed, state))
    assert torch.equal(dequantize_bitsandbytes(packed, state.as_dict(packed=True), torch.float32), rounded)


@settings(max_examples=20, deadline=None)
@given(width=st.sampled_from([64, 192, 448]), rows=st.integers(1, 70), nested=st.booleans())
def test_the_table_gives_what_bitsandbytes_packed(width: int, rows: int, nested: bool) -> None:
    """Each weight is at most half a step of its block's table away, as packing rounds to the nearest value."""
    torch.manual_seed(rows)
    weight = torch.randn(rows, width)
    layer = Linear4bit(width, rows, bias=False, quant_type="nf4", compress_statistics=nested)
    layer.weight.data = weight.clone()
    layer = layer.to("cpu")
    found = unpack_by_table(layer.weight, layer.weight.quant_state)
    scales = weight.view(-1, 64).abs().amax(1).repeat_interleave(64).view(rows, width)
    assert ((found - weight).abs() <= (0.153 + 0.03 * nested) * scales).all(), "the widest step of the table is 0.304"
