"""Arguments -> how bitsandbytes quantises the base model."""

import torch
from transformers import BitsAndBytesConfig

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.distributed.topology import Topology, get_quant_storage
from fastchat_qlora.errors import UserError


def build_quantization_config(
    lora_args: LoraArguments, compute_dtype: torch.dtype, topology: Topology
) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration of the run; None for plain LoRA.

    Raises:
        UserError: 8-bit weights under a strategy that shards parameters.
    """
    if lora_args.load_in_8bit:
        if topology.shards_parameters:
            raise UserError("--load_in_8bit True: 8-bit weights cannot be sharded by FSDP or ZeRO-3; use --q_lora True")
        return BitsAndBytesConfig(load_in_8bit=True)
    if not lora_args.q_lora:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=lora_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=lora_args.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=get_quant_storage(lora_args.bnb_4bit_quant_storage, compute_dtype, topology),
    )


def stored_as(lora_args: LoraArguments) -> str:
    """How `memory.profile` is told what becomes of linear layers: "", "double", "single" or "int8"."""
    if lora_args.load_in_8bit:
        return "int8"
    if not lora_args.q_lora:
        return ""
    return "double" if lora_args.bnb_4bit_use_double_quant else "single"
