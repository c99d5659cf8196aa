"""Flags -> the quantization of the base model, for all who need it."""

from typing import Any, Literal, NamedTuple

import torch
from transformers import BitsAndBytesConfig

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.distributed.topology import Topology, get_quant_storage
from fastchat_qlora.errors import UserError

QuantizationKind = Literal["none", "nf4", "fp4", "int8"]

NF4_SINGLE_BYTES = 0.5 + 4 / 64  # of a weight with the scale, in fp32, of each block of 64
NF4_DOUBLE_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # one byte for a scale, and the scale of 256 such scales in fp32
"""QLoRA, arXiv 2305.14314, section 3."""


class BaseQuantization(NamedTuple):
    """The storage of the weights of linear layers."""

    kind: QuantizationKind = "none"  # int8 is LLM.int8
    double_quant: bool = False  # the scales of 4-bit weights are quantized too; False for other kinds

    @property
    def is_quantized(self) -> bool:
        """Whether weights are quantized at all."""
        return self.kind != "none"

    @property
    def is_4bit(self) -> bool:
        """Whether a weight takes four bits."""
        return self.kind in ("nf4", "fp4")

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a quantized weight with its share of the scales."""
        if not self.is_4bit:
            return 1.0 if self.is_quantized else 0.0
        return NF4_DOUBLE_BYTES if self.double_quant else NF4_SINGLE_BYTES

    def __str__(self) -> str:
        return f"{self.kind} with double quantization" if self.double_quant else self.kind


NOT_QUANTIZED = BaseQuantization()


def get_base_quantization(lora_args: LoraArguments) -> BaseQuantization:
    """Return the quantization that the flags ask for."""
    if lora_args.load_in_8bit:
        return BaseQuantization("int8")
    if not lora_args.q_lora:
        return NOT_QUANTIZED
    return BaseQuantization(lora_args.bnb_4bit_quant_type, lora_args.bnb_4bit_use_double_quant)


def build_quantization_config(
    quantization: BaseQuantization, compute_dtype: torch.dtype, storage: torch.dtype | None = None
) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes configuration, or None where weights are not quantized.

    Packed 4-bit weights are stored as the dtype `storage`, bitsandbytes' default if None.
    """
    if not quantization.is_quantized:
        return None
    if not quantization.is_4bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    from fastchat_qlora.model.loading.quantizer import ExpertsBitsAndBytesConfig  # it imports bitsandbytes

    stored: dict[str, Any] = {} if storage is None else {"bnb_4bit_quant_storage": storage}
    return ExpertsBitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        **stored,
    )


def build_run_quantization_config(
    lora_args: LoraArguments, compute_dtype: torch.dtype, topology: Topology
) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes configuration of a run; None for plain LoRA."""
    quantization = get_base_quantization(lora_args)
    check_weights_can_be_sharded(quantization, topology)
    storage = None
    if quantization.is_4bit:
        storage = get_quant_storage(lora_args.bnb_4bit_quant_storage, compute_dtype, topology)
    return build_quantization_config(quantization, compute_dtype, storage)


def check_weights_can_be_sharded(quantization: BaseQuantization, topology: Topology) -> None:
    """Require that the parallel strategy can shard the base model's weights, if it shards them."""
    if quantization.kind == "int8" and topology.shards_parameters:
        raise UserError("--load_in_8bit True: 8-bit weights cannot be sharded by FSDP or ZeRO-3; use --q_lora True")
