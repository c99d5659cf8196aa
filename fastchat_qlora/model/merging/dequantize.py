"""A base model as a training has it in memory: which of its weights are quantised, and what they are then."""

import copy
import logging
from collections.abc import Callable

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig

from fastchat_qlora.model.loading.base_model import build_meta_model

CASTS = "MatMul8bitLt: inputs will be cast"
"""How the message begins that bitsandbytes logs at each call of each 8-bit layer."""

RoundTrip = Callable[[torch.Tensor], torch.Tensor]
"""A weight -> the same after it was quantised and dequantised again, in fp32."""


class _FirstCast(logging.Filter):
    """Lets the first message on casts through, and all others."""

    passed = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is to be seen."""
        if not str(record.msg).startswith(CASTS):
            return True
        first, self.passed = not self.passed, True
        return first


_first_cast = _FirstCast()


def log_casts_once() -> None:
    """Have bitsandbytes tell of its 8-bit layers' casts once in the program's life, not hundreds of times an answer."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_first_cast)


def find_quantized_modules(config: PretrainedConfig, quantization_config: BitsAndBytesConfig) -> set[str]:
    """Names of the modules that transformers quantises when it loads the model, asked of its own quantiser."""
    import bitsandbytes
    from transformers.quantizers import AutoHfQuantizer

    meta_model = build_meta_model(config)
    if meta_model is None:
        return set()
    quantiser = AutoHfQuantizer.from_config(copy.deepcopy(quantization_config))
    quantiser.preprocess_model(model=meta_model, device_map=None)
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name for name, module in meta_model.named_modules() if isinstance(module, kinds)}


def make_round_trip(quantization_config: BitsAndBytesConfig, dtype: torch.dtype, device: torch.device) -> RoundTrip:
    """What quantisation makes of a weight: bitsandbytes quantises and dequantises it as in a layer of its own.

    Args:
        quantization_config: of the run.
        dtype: the number format that weights are loaded in.
        device: where they are loaded to: kernels of another kind may round in another way.
    """
    import bitsandbytes

    def in_four_bits(weight: torch.Tensor) -> torch.Tensor:
        quantized = bitsandbytes.nn.Params4bit(
            weight.to(device, dtype).contiguous(),
            requires_grad=False,
            compress_statistics=quantization_config.bnb_4bit_use_double_quant,
            quant_type=quantization_config.bnb_4bit_quant_type,
        ).to(device)
        rounded: torch.Tensor = bitsandbytes.functional.dequantize_4bit(quantized.data, quantized.quant_state)
        return rounded.float().cpu()

    def in_eight_bits(weight: torch.Tensor) -> torch.Tensor:
        on_cpu = weight.to("cpu", dtype)  # from where moving them quantises them
        quantized = bitsandbytes.nn.Int8Params(on_cpu, requires_grad=False, has_fp16_weights=False).to(device)
        rounded: torch.Tensor = bitsandbytes.functional.int8_vectorwise_dequant(quantized.data, quantized.SCB)
        return rounded.float().cpu()

    return in_four_bits if quantization_config.load_in_4bit else in_eight_bits
