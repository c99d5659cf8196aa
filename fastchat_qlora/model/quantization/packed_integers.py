"""Packed integers with scales, as files of GPTQ, AWQ, AutoRound and torchao have them -> weights."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

INTEGER_PARTS = ("qweight", "qzeros", "scales")
TORCHAO_PARTS = ("_weight_qdata", "_weight_scale")
PACKED_PARTS = (*INTEGER_PARTS, "g_idx", *TORCHAO_PARTS, "_weight_zero_point")  # tensors in place of a weight
PACKED_BITS = (2, 3, 4, 8)
WORD_BITS = 32
GEMM_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of the integers of eight consecutive outputs


LayoutName = Literal["gptq", "gptq_v2", "gemm", "rows"]
"""GPTQ, whose first version has zero points less one, AWQ, and unpacked 8 bits of torchao with scales of rows."""


class PackedLayout(NamedTuple):
    """The layout of packed weights."""

    name: LayoutName
    group_size: int  # inputs with one scale, where no g_idx has it; at most 0 for all


LAYOUT_NAMES: dict[str, dict[str, LayoutName]] = {
    "gptq": {"gptq": "gptq", "gptq_v2": "gptq_v2"},
    "awq": {"gemm": "gemm"},
    "auto-round": {
        "auto_round:auto_gptq": "gptq",
        "auto_round:gptqmodel": "gptq_v2",
        "auto_round": "gptq_v2",
        "auto_round:auto_awq": "gemm",
    },
    "torchao": {
        "Int8WeightOnlyConfig": "rows",
        "Int8DynamicActivationInt8WeightConfig": "rows",
        "Float8WeightOnlyConfig": "rows",
    },
}
"""quant_method -> its name of a layout -> the layout; the first one holds where config.json has none."""


def get_layout_name(settings: Mapping[str, Any]) -> str:
    """Return the name that config.json has for the layout."""
    if settings["quant_method"] == "torchao":
        for key in ("quant_type", "default", "_type"):
            settings = settings.get(key, "") if isinstance(settings, Mapping) else settings
        return str(settings)
    given = [settings.get(key) for key in ("packing_format", "checkpoint_format", "version", "format")]
    named = next(filter(None, given), next(iter(LAYOUT_NAMES[settings["quant_method"]])))
    return "marlin" if settings.get("is_marlin_format") else str(named).lower()


def read_layout(settings: Mapping[str, Any]) -> PackedLayout | None:
    """Return the layout of a model's weights; None if they are not packed integers, or in another layout."""
    names = LAYOUT_NAMES.get(str(settings.get("quant_method")))
    name = names and names.get(get_layout_name(settings))
    return PackedLayout(name, settings.get("group_size") or -1) if name else None


def dequantize_integers(parts: Mapping[str, torch.Tensor], layout: PackedLayout) -> torch.Tensor:
    """Return a weight of shape (outputs, inputs): integers less the zero point of their group, times its scale.

    Both formulas are published with the papers: GPTQ, arXiv 2210.17323, and AWQ, arXiv 2306.00978; the layouts are
    those of AutoGPTQ and AutoAWQ. torchao's is that of its `Int8Tensor` and `Float8Tensor`. The result is in fp32.

    Args:
        parts: by names of PACKED_PARTS; `g_idx` is the group of each input.
        layout: of the file.
    """
    if layout.name == "rows":
        scales = parts["_weight_scale"].float()
        return (parts["_weight_qdata"].float() - parts.get("_weight_zero_point", torch.zeros_like(scales))) * scales
    scales = parts["scales"].T
    if layout.name == "gemm":
        integers, zeros = (_unpack_gemm(parts[part]) for part in ("qweight", "qzeros"))
    else:
        bits = WORD_BITS * parts["qzeros"].shape[1] // len(scales)  # some layers may have more than others
        integers, zeros = unpack_integers(parts["qweight"], bits).T, _unpack_zeros(parts["qzeros"], bits, layout)
    groups = parts["g_idx"].long() if "g_idx" in parts else _number_groups(integers, scales.shape[1], layout)
    weight = integers[:, : len(groups)].contiguous().float()
    weight -= zeros[: len(scales), groups]
    weight *= scales[:, groups]
    return weight


def _unpack_gemm(packed: torch.Tensor) -> torch.Tensor:
    integers = unpack_integers(packed.T, bits=4)
    return integers.view(-1, len(GEMM_PLACES), integers.shape[1])[:, GEMM_PLACES].flatten(0, 1)


def _unpack_zeros(packed: torch.Tensor, bits: int, layout: PackedLayout) -> torch.Tensor:
    """Return zero points; the one that AutoGPTQ subtracts is added as GPTQModel does it, with carries between them."""
    if layout.name == "gptq_v2":
        return unpack_integers(packed.T, bits)
    if WORD_BITS % bits:
        return unpack_integers(packed.T, bits) + 1 & (1 << bits) - 1
    ones = sum(1 << place for place in range(0, WORD_BITS, bits))
    return unpack_integers(packed.T + ones, bits)


def _number_groups(integers: torch.Tensor, count: int, layout: PackedLayout) -> torch.Tensor:
    """Return the group of each input; a layer may have groups of another size than most."""
    inputs = integers.shape[1]
    size = layout.group_size if layout.group_size > 0 else inputs
    if -(-inputs // size) != count:
        size, rest = divmod(inputs, count)
        if rest:
            raise ValueError(f"{count} groups of scales for {inputs} inputs")
    return torch.arange(inputs, device=integers.device) // size


def unpack_integers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the integers in a stream of bits along the first dimension, the lowest bits of a word first.

    Args:
        packed: shape (words, n), of 32-bit integers.
        bits: of an integer, which may lie in two words.
    """
    if bits not in PACKED_BITS or packed.dtype != torch.int32:
        raise ValueError(f"integers of {bits} bits in {packed.dtype}")
    period = math.lcm(bits, WORD_BITS)  # bits after which an integer begins with a word again
    words = packed.reshape(-1, period // WORD_BITS, packed.shape[1])
    integers = []
    for start in range(0, period, bits):
        word, shift = divmod(start, WORD_BITS)
        value = words[:, word] >> shift
        if (found := WORD_BITS - shift) < bits:
            value = value & (1 << found) - 1 | words[:, word + 1] << found
        integers.append((value & (1 << bits) - 1).to(torch.uint8))
    return torch.stack(integers, 1).flatten(0, 1)
