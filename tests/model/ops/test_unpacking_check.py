"""Weights in 4 bits that a kernel unpacks wrongly are found by a table of the 16 values."""

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.ops.unpacking_check import check_unpacking, unpack_by_table


def pack(width: int, rows: int = 80, **options: Any) -> Linear4bit:
    torch.manual_seed(0)
    layer = Linear4bit(width, rows, bias=False, compute_dtype=torch.float32, **options)
    return layer.to("cpu")  # bitsandbytes packs a layer when it is moved


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


@pytest.mark.parametrize("width", [64, 128, 1024])
def test_right_kernels_pass(width: int) -> None:
    check_unpacking(torch.nn.ModuleList([pack(width)]), dequantize_4bit)


@pytest.mark.parametrize("options", [{}, {"quant_type": "nf4"}, {"quant_type": "nf4", "compress_statistics": False}])
def test_a_wrong_kernel_is_refused(options: dict[str, Any]) -> None:
    model = torch.nn.ModuleList([pack(128), pack(176, **options)])
    with pytest.raises(UserError, match=r"--q_lora True: bitsandbytes unpacks 4-bit weights of 176 inputs wrongly"):
        check_unpacking(model, unpack_rows_from_new_blocks)
    check_unpacking(model[:1], unpack_rows_from_new_blocks)  # rows of whole blocks are right


def test_a_kernel_that_returns_no_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="of 64 inputs wrongly"):
        check_unpacking(pack(64), lambda packed, state: torch.full(state.shape, torch.nan))


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
