"""Quantized weights in a base model's files -> weights as they are, dequantized, or quantized otherwise, while loading.

Everything goes through transformers' extension points: a quantizer of our own, registered under its own name, takes the
place of the checkpoint's, and its conversions run for one weight after the other.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer, HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from fastchat_qlora.model.ops.experts import unpack
from fastchat_qlora.model.quantization.packed_integers import PACKED_PARTS, dequantize_integers, read_layout
from fastchat_qlora.model.quantization.published import PublishedQuantization

PUBLISHED_METHOD = "fastchat_qlora"  # our quantizer's name in transformers' table
LoadingArguments = dict[str, Any]  # arguments of from_pretrained that decide how the base model is quantized
Weights = dict[str, Any]  # name or pattern -> a tensor, or the list of those that match


def build_loading_settings(
    config: PretrainedConfig,
    published: PublishedQuantization | None,
    quantization_config: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    *,
    keeps: bool,
) -> LoadingArguments:
    """Return the arguments with which `from_pretrained` quantizes a base model as `quantization_config` has it.

    Quantized files are read as they are if `keeps`; else their weights are dequantized first.
    """
    if published is None:
        return {"quantization_config": quantization_config}
    if PUBLISHED_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(PUBLISHED_METHOD)(PublishedConfig)
        register_quantizer(PUBLISHED_METHOD)(PublishedQuantizer)
    source = dict(published.settings)
    if keeps:
        source["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    config = copy.deepcopy(config)
    target = None if keeps else quantization_config
    config.quantization_config = {"quant_method": PUBLISHED_METHOD, "source": source, "target": target, "keeps": keeps}
    return {"config": config}


@contextmanager
def read_weights_in_order(*, needed: bool) -> Iterator[None]:
    """Make transformers read a weight when it is converted, if needed, and not all of them ahead in threads."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' own switch
    saved = os.environ.get(name)
    if needed:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if needed and saved is None:
            del os.environ[name]
        elif saved is not None:
            os.environ[name] = saved


class PublishedConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """Settings of the quantizer.

    Args:
        source: the quantization of the files, as config.json has it.
        target: another quantization, of the loaded model; None leaves it in the compute dtype.
        keeps: whether the loaded model is quantized as the files are.
    """

    def __init__(self, source: dict[str, Any], target: BitsAndBytesConfig | None, keeps: bool, **_: Any) -> None:
        self.quant_method = PUBLISHED_METHOD
        self.source, self.target, self.keeps = source, target, keeps


class PublishedQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """A quantizer that reads quantized files into a model that is quantized alike, otherwise, or not at all."""

    def __init__(self, quantization_config: PublishedConfig, **_: Any) -> None:
        super().__init__(quantization_config, pre_quantized=True)
        target = copy.deepcopy(quantization_config.target)
        self._source = make_source(quantization_config.source, dequantize=not quantization_config.keeps)
        self._target = target and AutoHfQuantizer.from_config(target, pre_quantized=False)
        self._loaded = self._source if quantization_config.keeps else self._target  # of the loaded model

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check what the two quantizers need."""
        for quantizer in filter(None, (self._source, self._target)):
            quantizer.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        """Return the device map of the loaded model's quantizer."""
        return self._loaded.update_device_map(device_map) if self._loaded else device_map

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter of the loaded model is quantized."""
        return bool(self._loaded and self._loaded.param_needs_quantization(model, param_name, **kwargs))

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Add the dequantization in front of the model's conversions, and the quantization behind them."""
        conversions = self._source.update_weight_conversions(weight_conversions, model)
        if self._target is None:
            return list(conversions)
        needed = [name for name, _ in model.named_parameters() if self.param_needs_quantization(model, name)]
        converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        # What the files hold in 16 bits has no conversion yet: attention in MXFP4, layers that FP8 leaves out.
        known = {pattern for converter in converters for pattern in converter.source_patterns}
        kept = {name.rpartition(".")[2] for name in needed} - known
        converters += (added := [WeightConverter(name, name, [Keep()]) for name in sorted(kept)])
        for converter in converters:
            converter.quantization_operation = QuantizeNeeded(self._target)
        return [*conversions, *added]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return self._loaded._process_model_before_weight_loading(model, **kwargs) if self._loaded else model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Leave a model behind as its own quantizer does, or a plain one."""
        if self._loaded is None:
            self.remove_quantization_config(model)
            return model
        model.hf_quantizer = self._loaded
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        return self._loaded.postprocess_model(model, **kwargs)

    def is_serializable(self) -> bool:
        """Return False: nothing is saved in the format of the files."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the loaded model."""
        return self._loaded is None or bool(self._loaded.is_trainable)


class Keep(ConversionOps):  # type: ignore[misc]  # transformers is untyped
    """No conversion."""

    def convert(self, input_dict: Weights, **_: Any) -> Weights:
        """Return what came in."""
        return input_dict


class QuantizeNeeded(ConversionOps):  # type: ignore[misc]  # transformers is untyped
    """A quantizer's own operation, for the parameters that it quantizes."""

    def __init__(self, quantizer: Any) -> None:
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizeNeeded":
        """Keep the quantizer: transformers copies a conversion for each parameter."""
        return QuantizeNeeded(self.hf_quantizer)

    def convert(self, input_dict: Weights, *, model: Any, **kwargs: Any) -> Weights:
        """Convert the tensors that the model holds quantized."""
        converted: Weights = {}
        for name, value in input_dict.items():
            if self.hf_quantizer.param_needs_quantization(model, name):
                arguments = {**kwargs, "full_layer_name": name}
                converted |= self.hf_quantizer.get_quantize_ops().convert({name: value}, model=model, **arguments)
            else:
                converted[name] = value
        return converted


class DequantizeFp8(Fp8Dequantize):  # type: ignore[misc]  # transformers is untyped
    """transformers' operation, with blocks of the size that config.json has.

    It derives the size of a block from the number of scales (transformers 5.23), so that a weight whose last block is
    incomplete is refused or, where the number of scales happens to divide, scaled by its neighbors' scales: 192 rows in
    blocks of 128 become two blocks of 96. This can go once it goes by `weight_block_size`.
    """

    def convert(self, input_dict: Weights, **kwargs: Any) -> Weights:
        """Convert weights; those with incomplete blocks get a scale for each row and column."""
        size = self.hf_quantizer.quantization_config.weight_block_size
        complete = dict(input_dict)
        for name, scales in input_dict.items():
            weights = input_dict.get(name.removesuffix("_scale_inv"))
            if size and weights is not None and name.endswith("weight_scale_inv"):
                pairs = zip(_as_list(weights), _as_list(scales), strict=True)
                complete[name] = [spread_scales(weight, scale, size) for weight, scale in pairs]
        return _cast_plain(super().convert(complete, **kwargs), **kwargs)


def cast(value: Any, model: Any, name: str | None) -> list[torch.Tensor]:
    """Return weights that were read for a parameter in its dtype.

    transformers 5.23 leaves what a dequantization reads in the dtype of the file, and so the norms of an FP8 model.
    """
    weights = _as_list(value)
    dtype = model.get_parameter(name).dtype if model is not None and name else torch.uint8
    return [weight.to(dtype) for weight in weights] if dtype.is_floating_point else weights


def spread_scales(weight: torch.Tensor, scales: torch.Tensor, block: Any) -> torch.Tensor:
    """Return the scales of a weight's blocks, repeated along each dimension whose last block is incomplete."""
    if scales.ndim < 2 or weight.element_size() > 1 or not weight.is_floating_point():
        return scales
    for dim, size in zip((-2, -1), block, strict=True):
        length, count = weight.shape[dim], scales.shape[dim]
        if length % size and count == -(-length // size):
            repeated = scales.view(torch.uint8) if scales.element_size() == 1 else scales  # 8-bit floats lack kernels
            scales = repeated.repeat_interleave(size, dim).narrow(dim, 0, length).view(scales.dtype)
    return scales


def dequantize_fp8(weight: torch.Tensor, scales: torch.Tensor, block: Any) -> torch.Tensor:
    """Return an FP8 weight multiplied by its scales, in a dtype that holds it exactly or in fp32."""
    spread = spread_scales(weight, scales, block) if block else scales
    exact = spread if spread.element_size() == 1 else spread.float()  # the result has the dtype of the scales
    plain: torch.Tensor = Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": exact})["weight"]
    return plain


class DequantizeBitsAndBytes(ConversionOps):  # type: ignore[misc]  # transformers is untyped
    """The dequantization of bitsandbytes' 4-bit and 8-bit weights, each with the constants beside it in the file."""

    def __init__(self, quantizer: Any) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: Weights, *, model: Any = None, full_layer_name: str = "", **_: Any) -> Weights:
        """Convert the weights that have constants; a single weight gets its full name."""
        converted: Weights = {}
        for name, weights in input_dict.items():
            if name == "weight" or name.endswith(".weight"):
                prefix = name.removesuffix("weight")
                constants = {
                    key.removeprefix(prefix).removeprefix("weight."): _as_list(value)
                    for key, value in input_dict.items()
                    if key.startswith((f"{name}.", f"{prefix}SCB"))
                }
                dtype = model.get_parameter(full_layer_name).dtype if full_layer_name else torch.float32
                plain = [
                    dequantize_bitsandbytes(weight, {key: value[i] for key, value in constants.items()}, dtype)
                    for i, weight in enumerate(_as_list(weights))
                ]
                converted[name] = cast(_orient(plain, model, full_layer_name), model, full_layer_name)
        return {full_layer_name: converted["weight"]} if full_layer_name and "weight" in converted else converted


def dequantize_bitsandbytes(
    weight: torch.Tensor, constants: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Return a weight as bitsandbytes' layers compute with it; `constants` have the names of the file."""
    import bitsandbytes

    if "SCB" in constants:
        plain: torch.Tensor = bitsandbytes.functional.int8_vectorwise_dequant(weight, constants["SCB"])
    elif constants:
        state = read_4bit_state(constants, weight.device)
        state.dtype = dtype
        plain = unpack(weight, state)
    else:
        return weight
    return plain


def read_4bit_state(constants: Mapping[str, torch.Tensor], device: torch.device | str = "cpu") -> Any:
    """Return what bitsandbytes needs beside a 4-bit weight; `constants` have the names of the file."""
    import bitsandbytes

    return bitsandbytes.functional.QuantState.from_dict(dict(constants), device=torch.device(device))


def _orient(weights: list[torch.Tensor], model: Any, name: str) -> list[torch.Tensor]:
    """Return weights as the module has them: bitsandbytes holds those of a Conv1D transposed."""
    module = model.get_submodule(name.rpartition(".")[0]) if model is not None else None
    is_transposed = issubclass(getattr(module, "source_cls", type(module)), Conv1D)
    return [weight.T for weight in weights] if is_transposed else weights


def _cast_plain(converted: Weights, *, model: Any = None, full_layer_name: str | None = None, **_: Any) -> Weights:
    return {name: cast(value, model, full_layer_name) for name, value in converted.items()}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class Fp8Source(FineGrainedFP8HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """transformers' FP8, also in files of vLLM's tools, which name a scale `weight_scale`."""

    def get_load_operations(self) -> dict[str, Any]:
        """Return our operation."""
        return {"dequantize": DequantizeFp8}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Add new names of scales before all else."""
        renamed = [
            WeightRenaming(r"\.weight_scale$", ".weight_scale_inv"),
            WeightRenaming(r"\.input_scale$", ".activation_scale"),
        ]
        return [*renamed, *super().update_weight_conversions(weight_conversions, model)]


class _DeserializeFourBit(Bnb4bitDeserialize):  # type: ignore[misc]  # transformers is untyped
    def convert(self, input_dict: Weights, **kwargs: Any) -> Weights:
        """Build a 4-bit weight, unpacked to the compute dtype; other weights get the dtype of their parameters."""
        converted = super().convert(input_dict, **kwargs)
        if len(input_dict) == 1:
            return _cast_plain(converted, **kwargs)
        converted["weight"].quant_state.dtype = self.hf_quantizer.quantization_config.bnb_4bit_compute_dtype
        return dict(converted)


class _DeserializeEightBit(Bnb8bitDeserialize):  # type: ignore[misc]  # transformers is untyped
    def convert(self, input_dict: Weights, **kwargs: Any) -> Weights:
        """Build an 8-bit weight; other weights get the dtype of their parameters."""
        converted = super().convert(input_dict, **kwargs)
        return _cast_plain(converted, **kwargs) if len(input_dict) == 1 else converted


class FourBitSource(Bnb4BitHfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """bitsandbytes' 4-bit weights, as they are or dequantized."""

    def get_load_operations(self) -> dict[str, Any]:
        """Return our operations."""
        return {"deserialize": _DeserializeFourBit, "dequantize": DequantizeBitsAndBytes}


class EightBitSource(Bnb8BitHfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """bitsandbytes' 8-bit weights, as they are or dequantized."""

    def get_load_operations(self) -> dict[str, Any]:
        """Return our operations."""
        return {"deserialize": _DeserializeEightBit, "dequantize": DequantizeBitsAndBytes}


class DequantizePacked(ConversionOps):  # type: ignore[misc]  # transformers is untyped
    """The dequantization of packed integers, each weight of the parts that the file has in its place."""

    def __init__(self, quantizer: Any) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: Weights, *, model: Any = None, full_layer_name: str = "", **_: Any) -> Weights:
        """Convert weights of one module, or of the experts of a layer; a single weight gets its full name."""
        parts_of: dict[str, dict[str, list[torch.Tensor]]] = {}
        for name, values in input_dict.items():
            prefix, dot, part = name.rpartition(".")
            parts_of.setdefault(prefix + dot, {})[part] = _as_list(values)
        converted: Weights = {}
        for prefix, parts in parts_of.items():
            if "weight" in parts and len(parts) > 1:
                raise ValueError("some experts are quantized and others are not")
            weights = [dict(zip(parts, one, strict=True)) for one in zip(*parts.values(), strict=True)]
            converted[f"{prefix}weight"] = [self._dequantize(one, model, full_layer_name) for one in weights]
        return {full_layer_name: converted["weight"]} if "weight" in converted else converted

    def _dequantize(self, parts: dict[str, torch.Tensor], model: Any, name: str) -> torch.Tensor:
        if "weight" in parts:
            return cast(parts["weight"], model, name)[0]
        plain = dequantize_integers(parts, self.hf_quantizer.quantization_config.layout)
        return cast(_orient([plain], model, name), model, name)[0]


class PackedSource(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Packed integers of GPTQ, AWQ, AutoRound and torchao, dequantized."""

    serialized_names = {"weight": ["weight", *PACKED_PARTS]}  # noqa: RUF012  # as transformers has it

    def get_load_operations(self) -> dict[str, Any]:
        """Return our operation."""
        return {"dequantize": DequantizePacked}

    def is_serializable(self) -> bool:
        """Return False: nothing is saved in the format of the files."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the dequantized weights."""
        return True


def make_source(settings: dict[str, Any], *, dequantize: bool) -> Any:
    """Return the quantizer that reads files with these settings in their config.json."""
    if layout := read_layout(settings):
        packed = PublishedConfig({}, target=None, keeps=False)
        packed.layout, packed.dequantize = layout, True
        return PackedSource(packed, pre_quantized=True)
    config = AutoQuantizationConfig.from_dict(dict(settings))
    config.dequantize = dequantize
    if isinstance(config, BitsAndBytesConfig):
        return (FourBitSource if config.load_in_4bit else EightBitSource)(config, pre_quantized=True)
    quantizer = AUTO_QUANTIZER_MAPPING[config.quant_method]
    return (Fp8Source if quantizer is FineGrainedFP8HfQuantizer else quantizer)(config, pre_quantized=True)
