"""Quantized weights are read with their scales: as they are, dequantized, or quantized otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_bases import nf4, publish, quantize_fp8, save_plain
from safetensors.torch import load_file, save_file

from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.base_model import build_meta_model, load_config, load_model
from fastchat_qlora.model.loading.text_part import find_text_part
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization, build_quantization_config
from fastchat_qlora.model.quantization.published import read_published_quantization
from fastchat_qlora.model.quantization.published_weights import build_loading_settings, dequantize_fp8
from fastchat_qlora.model.quantization.weight_shares import count_quantized


def load(folder: Path, dtype: torch.dtype, bits: Any = None) -> Any:
    model_args = ModelArguments(str(folder))
    config = load_config(model_args, None)
    published = read_published_quantization(config, str(folder), build_meta_model(config))
    kind = "none" if bits is None else bits.bnb_4bit_quant_type if bits.load_in_4bit else "int8"
    keeps = published is not None and published.kind == kind and not published.packs_experts
    return load_model(
        model_args,
        dtype=dtype,
        quantization=build_loading_settings(config, published, bits, dtype, keeps=keeps),
        device_map={"": "cpu"},
        attn_implementation=None,
        cache_dir=None,
    )


@pytest.mark.parametrize(
    ("layout", "packs", "share"), [("nf4, experts", False, 1 / 3), ("nf4, each expert", True, 1.0)]
)
def test_experts_are_in_the_bits_of_the_files(
    layout: str, packs: bool, share: float, tokenizer_folder: Path, tmp_path: Path
) -> None:
    base = publish(tmp_path, tokenizer_folder, layout)
    config = load_config(ModelArguments(str(base.published)), None)
    meta_model = build_meta_model(config)
    assert meta_model is not None
    published = read_published_quantization(config, str(base.published), meta_model)
    assert published is not None and published.packs_experts is packs
    model = load(base.published, torch.float32, build_quantization_config(BaseQuantization("nf4", True), torch.float32))
    assert count_quantized(model, find_text_part(meta_model).sizes).share == pytest.approx(share)
    found, expected = model.dequantize(torch.float32), load(base.plain, torch.float32)
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=0, atol=0.02 if packs else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("fp8 by tensor", {}),
        ("fp8 of vLLM's tools", {}),
        ("fp8 128x128", {"intermediate_size": 192, "hidden_size": 160}),  # incomplete blocks
        ("gptq, experts", {}),
        ("gptq_v2 in 3 bits", {}),
        ("awq", {}),
        ("auto-round", {}),
        ("torchao int8", {}),
        ("torchao float8", {}),
    ],
)
def test_dequantized_weights_are_exact(
    layout: str, changes: dict[str, int], dtype: torch.dtype, tokenizer_folder: Path, tmp_path: Path
) -> None:
    base = publish(tmp_path, tokenizer_folder, layout, **changes)
    found, expected = (load(folder, dtype).state_dict() for folder in (base.published, base.plain))
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


def test_packed_weights_are_quantized_as_the_dequantized_ones(tokenizer_folder: Path, tmp_path: Path) -> None:
    base, nf4_config = publish(tmp_path, tokenizer_folder, "gptq, experts"), BaseQuantization("nf4", True)
    models = [
        load(folder, torch.float32, build_quantization_config(nf4_config, torch.float32))
        for folder in (base.published, base.plain)
    ]
    found, expected = (dict(model.state_dict()) for model in models)
    assert count_quantized(models[0], find_text_part(load(base.plain, torch.float32)).sizes).share == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), height=st.integers(1, 24), width=st.integers(1, 24))
@settings(deadline=None, max_examples=60)
def test_incomplete_blocks_have_their_own_scales(rows: int, columns: int, height: int, width: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    quantized, scales, expected = quantize_fp8(weight, (height, width))
    torch.testing.assert_close(dequantize_fp8(quantized, scales, (height, width)), expected, rtol=0, atol=0)


def test_4_bit_weights_of_single_experts_are_read(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Before transformers 5, experts were linear layers, which bitsandbytes quantized one by one."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    folder = save_plain(tmp_path / "base", tokenizer_folder, "qwen3_moe")
    tensors, plain = load_file(folder / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        plain[name] = tensor.float()
        if name.endswith("proj.weight"):
            packed, state = quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
            tensors[name] = packed
            tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
            state.dtype = torch.float32
            plain[name] = dequantize_4bit(packed, state)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": nf4().to_dict()}))
    bits = build_quantization_config(BaseQuantization("nf4", True), torch.float32)
    model = load(folder, torch.float32, bits)
    assert count_quantized(model, find_text_part(load(folder, torch.float32)).sizes).share == 1
    experts = model.dequantize(torch.float32).model.layers[0].mlp.experts.gate_up_proj
    first = [plain[f"model.layers.0.mlp.experts.0.{name}_proj.weight"] for name in ("gate", "up")]
    assert (experts[0] - torch.cat(first)).norm() < 0.01 * experts[0].norm(), "packed again by nearly the same scales"


def test_scales_that_do_not_fit_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    base = publish(tmp_path, tokenizer_folder, "fp8 128x128")
    path = base.published / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(7, 3)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="transformers cannot dequantize its weights as the quantization_config in its"):
        load(base.published, torch.float32)
