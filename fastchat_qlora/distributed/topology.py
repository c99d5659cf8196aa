"""Process topology (rank, world size, strategy) and settings derived from it."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from fastchat_qlora.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topology:
    """One process among `world_size`."""

    local_rank: int  # index of this process on its machine; decides the device
    rank: int  # index of this process in the run; decides who writes
    world_size: int
    accelerator: str | None  # type of the device, or None on the CPU
    zero_stage: int  # of DeepSpeed; 0 without it
    fsdp: bool

    @property
    def is_main(self) -> bool:
        """True in the process that logs and writes for the run."""
        return self.rank == 0

    @property
    def strategy(self) -> str:
        """The usual name of the strategy."""
        if self.zero_stage:
            return f"ZeRO-{self.zero_stage}"
        if self.fsdp:
            return "FSDP2"
        return "DDP" if self.world_size > 1 else "one process"

    @property
    def shards_parameters(self) -> bool:
        """True if each process holds only a part of every weight."""
        return self.fsdp or self.zero_stage == 3


def get_topology(training_args: TrainingArguments) -> Topology:
    """Read the topology from the launcher's environment and the arguments."""
    deepspeed_config = getattr(training_args, "hf_deepspeed_config", None)
    current = None if training_args.use_cpu else torch.accelerator.current_accelerator()
    return Topology(
        # TrainingArguments.local_rank stays -1 under python and torchrun since transformers 5; launchers set these.
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        accelerator=current.type if current else None,
        zero_stage=deepspeed_config.config["zero_optimization"]["stage"] if deepspeed_config else 0,
        fsdp=bool(training_args.fsdp),
    )


def get_device_map(topology: Topology, *, quantized: bool) -> dict[str, int | str] | None:
    """Return the device map for `from_pretrained`.

    Quantized weights are made on the device that they stay on, so every process names its own. Sharded and unquantized
    weights are placed by the Trainer: for them it is None.
    """
    if not quantized or topology.shards_parameters:
        return None
    if topology.accelerator is None:
        return {"": "cpu"}  # None would place 4-bit weights on a GPU despite --use_cpu
    return {"": topology.local_rank} if topology.world_size != 1 else None


def get_quant_storage(wanted: str, compute_dtype: torch.dtype, topology: Topology) -> torch.dtype:
    """Return the storage dtype of packed 4-bit weights; `wanted` is auto or the name of one.

    FSDP2 shards floating-point parameters only, and gathers those of a layer as one dtype; so where parameters are
    sharded, the bytes are stored as the compute dtype. DeepSpeed converts other floating-point dtypes to it, which
    would destroy the packed weights; uint8 is not converted.

    Raises:
        UserError: parameters are sharded, and another floating-point dtype is wanted.
    """
    storage: Any = None if wanted == "auto" else getattr(torch, wanted)
    if not topology.shards_parameters:
        return storage or torch.uint8
    if storage is None or storage == compute_dtype:
        logger.warning(
            f"{topology.strategy} with QLoRA: 4-bit weights are stored as {compute_dtype} so that they can be sharded."
        )
        return compute_dtype
    problem = f"--bnb_4bit_quant_storage {wanted}: is not supported by {topology.strategy} with QLoRA"
    hint = f"leave it on auto, which is {compute_dtype} here"
    if storage != torch.uint8:
        raise UserError(f"{problem}; {hint}")
    logger.warning(f"{problem}{', 4-bit weights are not sharded' if topology.fsdp else ''}; {hint}.")
    return torch.uint8


USE_REENTRANT = False
"""Kind of activation checkpointing, unless `--gradient_checkpointing_kwargs` says otherwise.

The reentrant kind drops the gradient where a layer's input needs none, as with a frozen base model; calls DDP's hooks
from a nested backward, so that unused parameters cannot be found; hides from FSDP2 which layer comes next in backward.
ZeRO-3 needed it up to DeepSpeed 0.19.7 (DeepSpeed#8130); 0.19.8 is the oldest supported version.
"""


def get_mixed_precision_policy(compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Return the dtypes in which FSDP2 gathers parameters and reduces gradients.

    Parameters are gathered in the compute dtype: fp32 adapters are rounded on the way and their masters stay fp32.
    Gradients are reduced in fp32, as by DDP; accelerate would take the compute dtype.
    """
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
