"""A quantizer for transformers that packs experts and linear layers of subclasses into 4 bits too, as they are loaded.

transformers' own quantizer for bitsandbytes replaces modules of the class `torch.nn.Linear` only (5.23,
`integrations/bitsandbytes.py`), so that a mixture of experts stays in 16 bits. This can go once it packs all weights.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from fastchat_qlora.model.loading.text_part import find_text_part
from fastchat_qlora.model.ops.experts import get_quant_states, unpack, use_compute_experts

BLOCK = 64  # weights under one scale
SCALES_BLOCK = 256  # scales under one scale of double quantization
METHOD = "bitsandbytes_with_experts"
READ_DTYPE = ("weights_proj",)
"""Layers whose input transformers (5.23) casts to the dtype of their weight, which is uint8 once it is packed.

`_keep_in_fp32_modules` has the layer for DeepSeek-V3.2 and others, not for Dots3 and Hy-V4. This can go once it does.
"""


class ExpertsBitsAndBytesConfig(BitsAndBytesConfig):  # type: ignore[misc]  # transformers is untyped
    """The bitsandbytes configuration of a model whose experts are packed as well."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class ExpertsQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """bitsandbytes' 4 bits for all linear layers and experts of the text part."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any, **kwargs: Any) -> None:
        packed, modules = find_packed(model), dict(model.named_modules())
        linear = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear | Conv1D)}
        for name in packed.keys() & linear:
            if type(modules[name]) not in (torch.nn.Linear, Conv1D):
                model.set_submodule(name, _make_plain(modules[name]))
        self.quantization_config.llm_int8_skip_modules = sorted(linear - packed.keys())
        self.experts = packed.keys() - linear
        super()._process_model_before_weight_loading(model, device_map, **kwargs)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is packed."""
        return param_name in self.experts or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        """Return the operation that packs a loaded tensor."""
        return _Pack(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES  # which other libraries look for
        use_compute_experts(model)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        for full_name in self.experts:
            module_name, _, name = full_name.rpartition(".")
            module = model.get_submodule(module_name)
            state = get_quant_states(module).pop(name)
            if name in getattr(module, "parametrizations", {}):
                remove_parametrizations(module, name)
            else:
                weight = unpack(getattr(module, name), state).to(dtype)
                setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
        return super()._dequantize(model, dtype)


def find_packed(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Return the weights that are packed, by name of the linear layer or of the experts' parameter."""
    text = find_text_part(model)
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()), *READ_DTYPE]
    linear = {name: module.weight for name, module in text.linear.items() if is_converted(name, kept)}
    return linear | {name: parameter for name, parameter in text.experts.items() if can_pack(parameter)}


def is_converted(name: str, kept: Collection[str]) -> bool:
    """Return whether transformers quantizes a linear layer, perhaps one with an adapter, and keeps layers so named."""
    return bool(should_convert_module(name.removesuffix(".base_layer"), [*kept]))


def can_pack(parameter: torch.Tensor) -> bool:
    """Return whether the weights of each expert are whole blocks."""
    return parameter.ndim >= 2 and parameter[0].numel() % BLOCK == 0


def _make_plain(module: Any) -> torch.nn.Linear:
    with torch.device("meta"):
        return torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)


class _Pack(Bnb4bitQuantize):  # type: ignore[misc]
    """Packing of one tensor, of a linear layer as transformers does it, or of all experts of a layer."""

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return name -> packed parameter."""
        experts = {name: value for name, value in input_dict.items() if name in self.hf_quantizer.experts}
        linear = {name: value for name, value in input_dict.items() if name not in experts}
        packed = super().convert(linear, *args, model=model, **kwargs) if linear else {}
        for name, value in experts.items():
            packed[name] = self._pack(model, name, value[0] if isinstance(value, list) else value)
        return packed

    def _pack(self, model: Any, full_name: str, value: torch.Tensor) -> Any:
        from bitsandbytes.nn import Params4bit

        config = self.hf_quantizer.quantization_config
        data, state = pack_experts(
            value,
            quant_type=config.bnb_4bit_quant_type,
            double_quant=config.bnb_4bit_use_double_quant,
            storage=config.bnb_4bit_quant_storage,
        )
        module_name, _, name = full_name.rpartition(".")
        # Beside the parameter, since FSDP2 replaces that by one without attributes.
        model.get_submodule(module_name).__dict__.setdefault("quant_states", {})[name] = state
        return Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True)


@torch.no_grad()  # weights that were dequantized may require gradients
def pack_experts(
    value: torch.Tensor, *, quant_type: str, double_quant: bool, storage: torch.dtype
) -> tuple[torch.Tensor, Any]:
    """Return weights in 4 bits and their constants, those that bitsandbytes makes of all experts at once.

    Packing on a CPU takes seven times the bytes of bf16 weights meanwhile (0.50.2: 112 MiB for 16), so that one expert
    is packed at a time.

    Args:
        value: shape (experts, ...), each of them whole blocks.
        quant_type: nf4 or fp4.
        double_quant: whether the scales are quantized too.
        storage: dtype of the packed weights.
    """
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    settings: dict[str, Any] = {"blocksize": BLOCK, "quant_type": quant_type, "quant_storage": storage}
    size = value[0].numel()
    # Results in place: kept one by one among freed buffers they would scatter the heap, which then keeps its size.
    data = value.new_empty(len(value), size // 2 // storage.itemsize, 1, dtype=storage)
    absmax = value.new_empty(len(value), size // BLOCK, dtype=torch.float32)
    for expert, its_data, its_absmax in zip(value, data, absmax, strict=True):
        packed, state = quantize_4bit(expert.contiguous(), **settings)
        its_data.copy_(packed)
        its_absmax.copy_(state.absmax)
    state.shape, state.absmax = value.shape, absmax.flatten()
    if double_quant:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=SCALES_BLOCK)
        state.nested = True
    return data.flatten(0, 1), state
