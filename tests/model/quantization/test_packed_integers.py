"""Packed integers are unpacked as GPTQModel 7.7.0 and AutoAWQ 0.2.9 do it, which were run on the same cases."""

from itertools import product

import pytest
import torch
from quantized_bases import pack_integers, quantize_integers

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.quantization.packed_integers import PackedLayout, dequantize_integers, read_layout
from fastchat_qlora.model.quantization.published import PublishedQuantization, check_published_files

CASES = [
    *product(("gptq", "gptq_v2"), (2, 3, 4, 8), (32, 64, 160), (True, False)),  # the last group of 64 is incomplete
    *product(("gemm",), (4,), (32, 160), (True,)),
]


@pytest.mark.parametrize(("layout", "bits", "group_size", "in_order"), CASES)
def test_weights_are_exact(layout: str, bits: int, group_size: int, in_order: bool) -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(bits))
    parts, expected = quantize_integers(weight, layout, bits, group_size, in_order=in_order)
    for size in (group_size, 128):  # a layer may have another size than config.json
        found = dequantize_integers(parts, PackedLayout(layout, size))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if in_order:
        parts.pop("g_idx", None)
        found = dequantize_integers(parts, PackedLayout(layout, group_size if group_size < 160 else -1))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_zero_are_read_as_they_were_subtracted(bits: int) -> None:
    """GPTQModel subtracts one from each zero point in a word of them, so that a zero takes from its neighbor."""
    zeros = torch.randint(0, 2**bits, (1, 96), generator=torch.Generator().manual_seed(0))
    stored = pack_integers(zeros.T, bits).T - sum(1 << place for place in range(0, 32, bits))
    parts = {"qweight": pack_integers(torch.zeros(32, 96, dtype=torch.int32), bits), "scales": torch.ones(1, 96).half()}
    found = dequantize_integers(parts | {"qzeros": stored}, PackedLayout("gptq", -1))
    torch.testing.assert_close(found, -zeros.T.float().expand(96, 32), rtol=0, atol=0)


def test_groups_that_do_not_fit_are_an_error() -> None:
    parts, _ = quantize_integers(torch.randn(8, 96), "gemm", 4, 32)
    parts["scales"] = torch.ones(5, 8).half()
    with pytest.raises(ValueError, match="5 groups of scales for 96 inputs"):
        dequantize_integers(parts, PackedLayout("gemm", 128))


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2", "format": "gptq"}, "gptq_v2"),
        ({"quant_method": "awq", "version": "GEMM"}, "gemm"),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, "gptq_v2"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, "gemm"),
        ({"quant_method": "gptq", "is_marlin_format": True}, None),
        ({"quant_method": "awq", "version": "gemv"}, None),
        ({"quant_method": "auto-round"}, "gptq"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"}, None),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "rows"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, None),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, None),
        ({"load_in_4bit": True}, None),
    ],
)
def test_layouts_of_config_json(settings: dict[str, object], layout: str | None) -> None:
    found = read_layout(settings)
    assert (found and found.name) == layout


@pytest.mark.parametrize(
    ("method", "names", "message"),
    [
        ("gptq", "up.qweight up.qzeros up.scales", "m: its files lack up.g_idx; download the model again"),
        ("awq", "up.qweight up.scales", "m: its files lack up.qzeros; download the model again"),
        ("awq", "up.qweight up.qzeros up.scales act.scales", "m: its files hold act.scales, by which activations are"),
        ("torchao", "up._weight_qdata", "m: its files lack up._weight_scale; download the model again"),
    ],
)
def test_incomplete_weights_are_refused(method: str, names: str, message: str) -> None:
    published = PublishedQuantization(method, False, {"quant_method": method, "desc_act": method == "gptq"})
    with pytest.raises(UserError, match=message):
        check_published_files(published, names.split(), "m")
