"""Tiny models in the layouts in which quantized models are published, and the same models in plain weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

FP8_MAX = 448.0
SIZES: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "intermediate_size": 64, "hidden_size": 64}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES | EXPERTS, num_experts=4, moe_intermediate_size=64),
    "gpt_oss": GptOssConfig(
        **SIZES | EXPERTS, num_local_experts=4, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
}


class Bases(NamedTuple):
    """Folders of one model."""

    published: Path  # quantized
    plain: Path  # the dequantized weights, in fp32


def nf4(dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def save_plain(folder: Path, tokenizer: Path, family: str, **changes: Any) -> Path:
    """Save a model of bf16 weights with the tokenizer of the tests."""
    torch.manual_seed(0)
    config = type(FAMILIES[family])(**FAMILIES[family].to_dict() | changes)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def publish(folder: Path, tokenizer: Path, layout: str, **changes: Any) -> Bases:
    """Save a model in a layout, one of LAYOUTS, and with the dequantized weights."""
    family, write = LAYOUTS[layout]
    source = save_plain(folder / "source", tokenizer, family, **changes)
    published, plain = Path(shutil.copytree(source, folder / "published")), folder / "plain"
    shutil.copytree(source, plain)
    truth = write(published)
    save_file(
        {name: tensor.contiguous() for name, tensor in truth.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    _configure(plain, dtype="float32")
    return Bases(published, plain)


def _configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _save_bitsandbytes(bits: BitsAndBytesConfig) -> Callable[[Path], dict[str, torch.Tensor]]:
    """Return a function that quantizes a folder's model by bitsandbytes' own saver and returns plain weights."""

    def write(folder: Path) -> dict[str, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=bits)
        plain = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder)
        for parameter in model.parameters():
            if hasattr(parameter, "quant_state"):
                parameter.quant_state.dtype = torch.float32  # that of the dequantized weight
        loaded = model.dequantize(torch.float32).state_dict()
        return {name: loaded.get(name, tensor).float() for name, tensor in plain.items()}  # experts stay as they were

    return write


def _save_4_bit_experts(folder: Path) -> dict[str, torch.Tensor]:
    """Quantize a folder's model with each expert by itself, as versions of transformers with a module for each do."""
    plain = _save_bitsandbytes(nf4(torch.bfloat16))(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        data, state = quantize_4bit(tensors[name], compress_statistics=True, quant_type="nf4")
        tensors |= {name: data, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}
        state.dtype = torch.float32
        plain[name] = dequantize_4bit(data, state)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return plain


def quantize_fp8(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, ...]:
    """Return a weight in FP8, the scales of its blocks or of the whole, and the dequantized weight."""
    rows, columns = weight.shape
    height, width = block or (rows, columns)
    padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width)
    padded[:rows, :columns] = weight.float()
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    scales = blocks.abs().amax((1, 3)) / FP8_MAX
    spread = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    quantized = (weight.float() / spread).to(torch.float8_e4m3fn)
    return quantized, scales if block else scales.reshape(()), quantized.float() * spread


def _save_fp8(
    block: tuple[int, int] | None, scale: str = "weight_scale_inv", **settings: Any
) -> Callable[[Path], dict[str, torch.Tensor]]:
    """Return a function that quantizes a folder's model to FP8, and returns the dequantized weights."""

    def write(folder: Path) -> dict[str, torch.Tensor]:
        tensors, plain = load_file(folder / "model.safetensors"), {}
        for name, tensor in list(tensors.items()):
            plain[name] = tensor.float()
            if name.endswith("proj.weight"):
                module = name.removesuffix("weight")
                tensors[name], tensors[f"{module}{scale}"], plain[name] = quantize_fp8(tensor, block)
                if settings.get("activation_scheme") == "static":
                    tensors[f"{module}input_scale"] = torch.tensor(0.5)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        size = list(block) if block else None
        _configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": size, **settings})
        return plain

    return write


def _save_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Give a folder's model random experts in MXFP4, and return the weights as transformers dequantizes them."""
    tensors, plain = load_file(folder / "model.safetensors"), {}
    random = torch.Generator().manual_seed(0)
    for name, tensor in list(tensors.items()):
        plain[name] = tensor.float()
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensors.pop(name).shape
            shape = (experts, outputs, inputs // 32)
            blocks = torch.randint(256, (*shape, 16), generator=random, dtype=torch.uint8)
            scales = torch.randint(119, 124, shape, generator=random, dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _configure(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return plain


def pack_integers(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the stream of bits of each column, in 32-bit words."""
    stream = values.T[..., None] >> torch.arange(bits) & 1
    packed = np.packbits(stream.flatten(1).byte().numpy(), axis=1, bitorder="little").view(np.int32)
    return torch.from_numpy(packed).T.contiguous()


def quantize_integers(
    weight: torch.Tensor, layout: str, bits: int, group_size: int, *, in_order: bool = True
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a weight as packed integers in a layout of GPTQ or AWQ, and the dequantized weight.

    The weight's groups of inputs are in order, or as an activation order may have them.
    """
    inputs, largest = weight.shape[1], 2**bits - 1
    groups = torch.arange(inputs) // group_size
    if not in_order:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
    values = [weight.float().T[groups == group] for group in range(int(groups.max()) + 1)]
    low = torch.stack([group.amin(0).clamp(max=0) for group in values])
    scales = ((torch.stack([group.amax(0) for group in values]) - low) / largest).half()
    zeros = (-low / scales.float()).round().clamp(1, largest).int()
    integers = (weight.float().T / scales.float()[groups] + zeros[groups]).round().clamp(0, largest).int()
    if layout == "gemm":
        places = [start + place for start in range(0, len(weight), 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
        parts = {"qweight": pack_integers(integers[:, places].T, 4).T, "qzeros": pack_integers(zeros[:, places].T, 4).T}
    else:
        stored = zeros - 1 if layout == "gptq" else zeros
        parts = {"qweight": pack_integers(integers, bits), "qzeros": pack_integers(stored.T, bits).T}
        parts["g_idx"] = groups.int()
    return parts | {"scales": scales}, ((integers - zeros[groups]) * scales.float()[groups]).T.contiguous()


def _save_packed(layout: str, bits: int = 4, **settings: Any) -> Callable[[Path], dict[str, torch.Tensor]]:
    """Return a function that packs a folder's weights as integers, and returns the dequantized weights."""

    def write(folder: Path) -> dict[str, torch.Tensor]:
        tensors, plain = load_file(folder / "model.safetensors"), {}
        for name, tensor in list(tensors.items()):
            plain[name] = tensor.float()
            if name.endswith("proj.weight"):
                in_order = not settings.get("desc_act")
                parts, plain[name] = quantize_integers(tensors.pop(name), layout, bits, 32, in_order=in_order)
                tensors |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        _configure(folder, quantization_config={"bits": bits, "group_size": 32, **settings})
        return plain

    return write


def _save_torchao(dtype: torch.dtype, kind: str) -> Callable[[Path], dict[str, torch.Tensor]]:
    """Return a function that saves a folder's weights as torchao does, 8-bit with scales of rows."""

    def write(folder: Path) -> dict[str, torch.Tensor]:
        tensors, plain = load_file(folder / "model.safetensors"), {}
        for name, tensor in list(tensors.items()):
            plain[name] = tensor.float()
            if name.endswith("proj.weight"):
                module, weight = name.removesuffix("weight"), tensors.pop(name).float()
                scales = weight.abs().amax(1, keepdim=True) / 127
                data = (weight / scales).to(dtype)
                tensors |= {f"{module}_weight_qdata": data, f"{module}_weight_scale": scales}
                plain[name] = data.float() * scales
                if dtype == torch.int8:
                    zeros = torch.arange(len(data), dtype=dtype)[:, None] % 3
                    tensors[f"{module}_weight_zero_point"] = zeros
                    plain[name] = (data.float() - zeros) * scales
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        settings = {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": {}}}}
        _configure(folder, quantization_config=settings)
        return plain

    return write


LAYOUTS: dict[str, tuple[str, Callable[[Path], dict[str, torch.Tensor]]]] = {
    "nf4": ("llama", _save_bitsandbytes(nf4(torch.bfloat16))),
    "nf4, experts": ("qwen3_moe", _save_bitsandbytes(nf4(torch.bfloat16))),  # attention only
    "nf4, each expert": ("qwen3_moe", _save_4_bit_experts),
    "int8": ("llama", _save_bitsandbytes(BitsAndBytesConfig(load_in_8bit=True))),
    "fp8 128x128": ("llama", _save_fp8((128, 128), activation_scheme="dynamic", fmt="e4m3")),
    "fp8 64x64, experts": ("qwen3_moe", _save_fp8((64, 64), activation_scheme="dynamic")),
    "fp8 by tensor": ("llama", _save_fp8(None, activation_scheme="dynamic")),
    "fp8 of vLLM's tools": ("llama", _save_fp8(None, "weight_scale", activation_scheme="static")),
    "mxfp4": ("gpt_oss", _save_mxfp4),
    "gptq, experts": ("qwen3_moe", _save_packed("gptq", quant_method="gptq", desc_act=True)),
    "gptq_v2 in 3 bits": ("llama", _save_packed("gptq_v2", 3, quant_method="gptq", checkpoint_format="gptq_v2")),
    "awq": ("llama", _save_packed("gemm", quant_method="awq", version="gemm", zero_point=True)),
    "torchao int8": ("llama", _save_torchao(torch.int8, "Int8WeightOnlyConfig")),
    "torchao float8": ("llama", _save_torchao(torch.float8_e4m3fn, "Float8WeightOnlyConfig")),
    "auto-round": (
        "llama",
        _save_packed("gptq", 8, quant_method="auto-round", packing_format="auto_round:auto_gptq"),
    ),
}
"""Layout -> the family of the model, and what quantizes a folder's model and returns the dequantized weights."""
