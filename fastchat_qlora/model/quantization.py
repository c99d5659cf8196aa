"""Arguments -> how bitsandbytes quantises the base model."""

import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from fastchat_qlora.arguments import LoraArguments
from fastchat_qlora.distributed import Topology
from fastchat_qlora.errors import UserError

logger = logging.getLogger(__name__)


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
        bnb_4bit_quant_storage=_quant_storage(lora_args.bnb_4bit_quant_storage, compute_dtype, topology),
    )


def _quant_storage(wanted: str, compute_dtype: torch.dtype, topology: Topology) -> torch.dtype:
    """The type that packed 4-bit weights are stored as.

    FSDP and ZeRO-3 shard only parameters that look like all others, so there the bytes are kept as compute dtype.
    """
    storage: Any = None if wanted == "auto" else getattr(torch, wanted)
    if not topology.shards_parameters:
        return storage or torch.uint8
    strategy = "FSDP" if topology.fsdp else "ZeRO-3"
    if storage is not None and storage != compute_dtype:
        logger.warning(
            f"--bnb_4bit_quant_storage {wanted}: {strategy} and QLoRA are incompatible with this storage type; "
            f"leave it on auto, which is {compute_dtype} here."
        )
        return storage  # type: ignore[no-any-return]
    logger.warning(f"{strategy} with QLoRA: 4-bit weights are stored as {compute_dtype} so that they can be sharded.")
    return compute_dtype
