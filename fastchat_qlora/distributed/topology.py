"""Where this process stands in the run, and what follows from it."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import mask_secrets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topology:
    """One process among `world_size`.

    Attributes:
        local_rank: index of this process on its machine; decides the device.
        rank: index of this process in the run; decides who writes.
        world_size: number of processes in the run.
        accelerator: type of the device trained on, or None on the CPU.
        zero_stage: DeepSpeed's ZeRO stage, 0 without DeepSpeed.
        fsdp: whether parameters are sharded by FSDP.
    """

    local_rank: int
    rank: int
    world_size: int
    accelerator: str | None
    zero_stage: int
    fsdp: bool

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for the run."""
        return self.rank == 0

    @property
    def strategy(self) -> str:
        """The strategy asked for, by its usual name."""
        if self.zero_stage:
            return f"ZeRO-{self.zero_stage}"
        if self.fsdp:
            return "FSDP2"
        return "DDP" if self.world_size > 1 else "one process"

    @property
    def shards_parameters(self) -> bool:
        """Whether each process holds only a part of every weight."""
        return self.fsdp or self.zero_stage == 3


def get_topology(training_args: TrainingArguments) -> Topology:
    """Read the launcher's environment and the strategy asked for."""
    deepspeed_config = getattr(training_args, "hf_deepspeed_config", None)
    zero_stage = deepspeed_config.config["zero_optimization"]["stage"] if deepspeed_config else 0
    current = None if training_args.use_cpu else torch.accelerator.current_accelerator()
    return Topology(
        # TrainingArguments.local_rank stays -1 under python and torchrun since transformers 5; launchers set these.
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        accelerator=current.type if current else None,
        zero_stage=zero_stage,
        fsdp=bool(training_args.fsdp),
    )


def get_device_map(topology: Topology, *, quantized: bool) -> dict[str, int | str] | None:
    """Where `from_pretrained` puts the weights.

    Quantised weights are made on the device they stay on, so every process names its own. Sharded and plain weights
    are placed by the Trainer, for which None is returned.
    """
    if not quantized or topology.shards_parameters:
        return None
    if topology.accelerator is None:
        return {"": "cpu"}  # None would send 4-bit weights to a GPU that --use_cpu leaves alone
    return {"": topology.local_rank} if topology.world_size != 1 else None


def get_quant_storage(wanted: str, compute_dtype: torch.dtype, topology: Topology) -> torch.dtype:
    """The type that packed 4-bit weights are stored as.

    FSDP2 shards floating-point parameters only, and gathers those of a layer as one dtype; so where parameters are
    sharded the bytes are kept as the compute dtype. DeepSpeed turns other floating-point types into it, and bytes that
    were packed as numbers of one type are not those of another: the weights would be noise. Plain bytes are left alone.

    Args:
        wanted: `--bnb_4bit_quant_storage`: auto, or a dtype's name.

    Raises:
        UserError: a floating-point type other than the compute dtype where parameters are sharded.
    """
    storage: Any = None if wanted == "auto" else getattr(torch, wanted)
    if not topology.shards_parameters:
        return storage or torch.uint8
    if storage is not None and storage != compute_dtype:
        incompatible = (
            f"--bnb_4bit_quant_storage {wanted}: {topology.strategy} and QLoRA are incompatible with this storage type"
        )
        hint = f"leave it on auto, which is {compute_dtype} here"
        if storage != torch.uint8:
            raise UserError(f"{incompatible}; {hint}")
        logger.warning(f"{incompatible}{', 4-bit weights are not sharded' if topology.fsdp else ''}; {hint}.")
        return torch.uint8
    logger.warning(
        f"{topology.strategy} with QLoRA: 4-bit weights are stored as {compute_dtype} so that they can be sharded."
    )
    return compute_dtype


USE_REENTRANT = False
"""Whether activation checkpointing runs backward inside backward, unless `--gradient_checkpointing_kwargs` says so.

Not under any strategy, and for reasons of each: the reentrant kind drops the gradient where a layer's input needs none,
which a frozen base's does not (one process); calls DDP's gradient hooks from a nested backward, so that unused
parameters cannot be found; hides from FSDP2 which layer comes next in backward. ZeRO-3 needed it up to DeepSpeed
0.19.7, which partitioned frozen weights again while they were recomputed (DeepSpeed#8130); 0.19.8 is the oldest that we
support.
"""


def get_mixed_precision_policy(compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """What FSDP2 gathers parameters as, and what it sums gradients in.

    Weights are gathered in the compute dtype: fp32 adapters are rounded on the way and their masters stay fp32.
    Gradients are summed over the processes in fp32, as DDP sums them; accelerate would take the compute dtype.
    """
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error tells of another process that has gone, not of this one.

    NCCL's and the store's errors have a type of their own; gloo's are RuntimeErrors that name its source file.
    """
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def require_agreement(settings: Mapping[str, Any]) -> None:
    """Stop if the processes of a run were not started alike; every process must call this.

    Machines are started one by one, each with its own command line and its own view of the disk.

    Args:
        settings: name -> value, of what must be the same in every process.

    Raises:
        UserError: naming what differs, and both values, if they are no secrets, with their ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: str(value) for name, value in settings.items()})
    problems = []
    for name, first in everyone[0].items():
        other = next((rank for rank, theirs in enumerate(everyone) if theirs.get(name) != first), None)
        if other is not None:
            shown, differing = (mask_secrets(value, name.lstrip("-")) for value in (first, everyone[other].get(name)))
            problems.append(f"{name} is {shown} in rank 0 and {differing} in rank {other}")
    if problems:
        raise UserError(f"the processes of this run differ: {'; '.join(problems)}; start every machine alike")


def _unlink_shared_buffer(topology: Topology) -> None:
    """Let the memory that DeepSpeed's all-reduce shares on a CPU machine go when this process ends, however it ends.

    DeepSpeed 0.19.8 (`csrc/cpu/comm/shm.cpp`) leaves 66 MiB of each process in /dev/shm for ever. Every process has
    opened what it needs of it by now, so that the name can go. This can go once DeepSpeed unlinks it.
    """
    dist.barrier()
    where = f"{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{where}_{topology.rank}").unlink(missing_ok=True)


@contextmanager
def process_group(topology: Topology) -> Iterator[None]:
    """Make ready what DeepSpeed needs before weights are loaded, and take the process group down after a good end.

    After an error this process just leaves: taking the group down is for all to do together, and the others may be
    waiting in it. The launcher ends them.

    TrainingArguments has opened the process group by now. On the CPU it does so without DeepSpeed's knowledge, and
    ZeRO-3 partitions weights while they load, before the Trainer would tell it.
    """
    if topology.zero_stage and topology.accelerator is None:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
        _unlink_shared_buffer(topology)
    yield
    if dist.is_initialized():
        dist.barrier()  # nobody hangs up while another still writes or talks
        dist.destroy_process_group()
