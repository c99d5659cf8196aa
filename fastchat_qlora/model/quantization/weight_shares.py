"""Shares of the weights in a model's text part: in 4 or 8 bits, and with an adapter.

Weights are counted, not layers: in a mixture of experts nine layers in ten may hold a twentieth of the weights.
"""

import copy
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.base_model import build_meta_model
from fastchat_qlora.model.loading.text_part import READ_BY_MODEL, TextPart
from fastchat_qlora.model.ops.experts import get_quant_states
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization, build_quantization_config
from fastchat_qlora.model.quantization.published import PublishedQuantization

logger = logging.getLogger(__name__)

LEAST_QUANTIZED = 0.9  # share with which a run may call itself QLoRA


class WeightShare(NamedTuple):
    """The weights for which something holds, among those of linear layers and experts."""

    included: int
    total: int
    others: dict[str, int]  # for which it does not hold: by name without the layer's number

    @property
    def share(self) -> float:
        """The share, 1 for a model without such weights."""
        return self.included / self.total if self.total else 1.0

    def get_kept_gib(self, dtype: torch.dtype) -> float:
        """Return the GiB of the other weights in this dtype."""
        return (self.total - self.included) * dtype.itemsize / 2**30

    def __str__(self) -> str:
        text = f"{self.share:.1%} of the {self.total:,} weights in linear layers and experts"
        return f"{text}, without {', '.join(self.others)}" if self.others else text


def compute_share(sizes: Mapping[str, int], chosen: Collection[str]) -> WeightShare:
    """Return the share of some weights.

    Args:
        sizes: number of weights by name of module or parameter, from `TextPart.sizes`.
        chosen: names for which something holds; others than those in sizes are ignored.
    """
    others: dict[str, int] = {}
    for name in sizes.keys() - {*chosen}:
        kind = re.sub(r"^.*\.\d+\.(?!\d+(\.|$))|(\.\d+)+$", "", name)
        others[kind] = others.get(kind, 0) + sizes[name]
    ordered = dict(sorted(others.items(), key=lambda item: (-item[1], item[0])))
    total = sum(sizes.values())
    return WeightShare(total - sum(others.values()), total, ordered)


def find_quantized(config: PretrainedConfig, quantization_config: BitsAndBytesConfig) -> set[str]:
    """Return the names of modules and parameters that the quantizer replaces when it loads the model."""
    import bitsandbytes
    from transformers.quantizers import AutoHfQuantizer

    meta_model = build_meta_model(config)
    if meta_model is None:
        return set()
    quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization_config), pre_quantized=False)
    quantizer.preprocess_model(model=meta_model, device_map=None)
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    modules = {name for name, module in meta_model.named_modules() if isinstance(module, kinds)}
    return modules | getattr(quantizer, "experts", set())


def find_loaded_quantized(
    config: PretrainedConfig,
    quantization: BaseQuantization,
    published: PublishedQuantization | None,
    dtype: torch.dtype,
) -> set[str]:
    """Return the names of modules and parameters that are in few bits once a model is loaded in this quantization."""
    settings = build_quantization_config(quantization, dtype)
    if published and quantization.is_as_published:
        settings = BitsAndBytesConfig.from_dict(dict(published.settings))
    return find_quantized(config, cast(BitsAndBytesConfig, settings)) if settings else set()


def warn_of_kept_weights(quantization: BaseQuantization, share: WeightShare, dtype: torch.dtype) -> None:
    """Log which share of the weights is not in few bits, if it is large."""
    if share.share >= LEAST_QUANTIZED or not quantization.is_quantized:
        return
    bits = 4 if quantization.is_4bit else 8
    where = " in the base model's files" if quantization.is_as_published else ""
    remedy = "--q_lora True packs them too" if bits == 4 else "--q_lora True in place of 8 bits packs all into 4 bits"
    logger.warning(
        f"{share.share:.1%} of the {share.total:,} weights in linear layers and experts are in {bits} bits{where}; "
        f"the others, such as {next(iter(share.others))}, take {share.get_kept_gib(dtype):.2f} GiB; {remedy}."
    )


def check_quantized_share(share: WeightShare, dtype: torch.dtype) -> None:
    """Require that most weights are in 4 bits if that is asked for."""
    if share.share >= LEAST_QUANTIZED:
        return
    raise UserError(
        f"--q_lora True: {share.share:.0%} of this model's weights in linear layers and experts can be in 4 bits, and "
        f"{share.get_kept_gib(dtype):.1f} GiB would not be, such as {next(iter(share.others))}; train with "
        "--q_lora False if there is memory for it, or choose another model"
    )


def check_8_bits(meta_model: PreTrainedModel, text: TextPart) -> None:
    """Require that the model itself reads no weight that would be in 8 bits, nor its dtype; see `READ_DTYPE`."""
    from fastchat_qlora.model.quantization.quantizer import READ_DTYPE, is_converted  # it imports bitsandbytes

    model_type = meta_model.config.get_text_config().model_type
    if model_type in READ_BY_MODEL:
        raise UserError(
            f"--load_in_8bit True: not supported with {model_type}, which would multiply by the integers of "
            f"{READ_BY_MODEL[model_type][0]} without their scales; use --q_lora True"
        )
    kept = meta_model._keep_in_fp32_modules or ()
    for name in text.linear | text.other_linear:
        if name.endswith(READ_DTYPE) and is_converted(name, kept):
            raise UserError(
                f"--load_in_8bit True: not supported with {meta_model.config.model_type}, which would round the inputs "
                f"of {name} to integers; use --q_lora True"
            )


def count_quantized(model: PreTrainedModel, sizes: Mapping[str, int]) -> WeightShare:
    """Return the share of weights in few bits in a model that has been loaded, perhaps with an adapter on it."""
    return compute_share(sizes, {name for name in sizes if is_quantized(model, name)})


def is_quantized(model: Any, name: str) -> bool:
    """Return whether the weight of a linear layer, or a parameter of experts, is in few bits."""
    owner, _, leaf = name.rpartition(".")
    module = _find_base_layer(model, name)
    if module is None:
        experts = _find_base_layer(model, owner)
        return experts is not None and leaf in get_quant_states(experts)
    # Of layers that share a weight, as Zamba's do, only one has the constants in the module, and the weight has them.
    owners = (module, module.weight)
    return any(getattr(one, "quant_state", None) is not None for one in owners) or module.weight.dtype == torch.int8


def _find_base_layer(model: torch.nn.Module, name: str) -> Any:
    """Return the module of this name, without the adapter around it; None if there is none."""
    for part in name.split("."):
        model = model._modules.get(part)  # type: ignore[assignment]
        if model is None:
            return None
        while "base_layer" in model._modules:
            model = model._modules["base_layer"]  # type: ignore[assignment]
    return model
