"""A base model's weights as in training: quantized and dequantized again."""

import functools
import itertools
import logging
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig

from fastchat_qlora.model.loading.base_model import build_meta_model
from fastchat_qlora.model.loading.towers import find_towers, is_in_tower
from fastchat_qlora.model.ops.experts import unpack
from fastchat_qlora.model.quantization.weight_shares import find_quantized

CAST_MESSAGE = "MatMul8bitLt: inputs will be cast"  # what bitsandbytes logs at each call of each 8-bit layer


@functools.cache
def log_casts_once() -> None:
    """Make bitsandbytes log the casts of its 8-bit layers once, not hundreds of times for each answer."""
    casts = itertools.count()

    def keep_first(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(CAST_MESSAGE) or next(casts) == 0

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(keep_first)


class WeightRounding(NamedTuple):
    """The effect of quantization on a model's weights."""

    modules: Collection[str]  # names of those with quantized weights
    apply: Callable[[torch.Tensor], torch.Tensor]  # quantizes and dequantizes; the result is in fp32 on the CPU


def make_weight_rounding(
    config: PretrainedConfig, quantization_config: BitsAndBytesConfig, dtype: torch.dtype, device: torch.device
) -> WeightRounding:
    """Return the effect of loading a model with this quantization, in this dtype and to this device.

    The device matters, since kernels of another one may round differently.
    """
    import bitsandbytes

    def round_to_4bit(weight: torch.Tensor) -> torch.Tensor:
        quantized = bitsandbytes.nn.Params4bit(
            weight.to(device, dtype).contiguous(),
            requires_grad=False,
            compress_statistics=quantization_config.bnb_4bit_use_double_quant,
            quant_type=quantization_config.bnb_4bit_quant_type,
        ).to(device)
        return unpack(quantized.data, quantized.quant_state).float().cpu()

    def round_to_8bit(weight: torch.Tensor) -> torch.Tensor:
        on_cpu = weight.to("cpu", dtype)  # moving it from there quantizes it
        quantized = bitsandbytes.nn.Int8Params(on_cpu, requires_grad=False, has_fp16_weights=False).to(device)
        rounded: torch.Tensor = bitsandbytes.functional.int8_vectorwise_dequant(quantized.data, quantized.SCB)
        return rounded.float().cpu()

    meta_model = build_meta_model(config)
    towers = find_towers(meta_model) if meta_model else ()  # they took no part in the training: left as they are
    modules = {name for name in find_quantized(config, quantization_config) if not is_in_tower(name, towers)}
    return WeightRounding(modules, round_to_4bit if quantization_config.load_in_4bit else round_to_8bit)
