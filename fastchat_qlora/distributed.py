"""Where this process stands in the run, and what follows from it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastchat_qlora.arguments import TrainingArguments


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
    def shards_parameters(self) -> bool:
        """Whether each process holds only a part of every weight."""
        return self.fsdp or self.zero_stage == 3


def get_topology(training_args: TrainingArguments) -> Topology:
    """Read the launcher's environment and the strategy asked for."""
    deepspeed_config = getattr(training_args, "hf_deepspeed_config", None)
    zero = deepspeed_config.config.get("zero_optimization", {}) if deepspeed_config else {}
    current = None if training_args.use_cpu else torch.accelerator.current_accelerator()
    return Topology(
        # TrainingArguments.local_rank stays -1 under python and torchrun since transformers 5; launchers set these.
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        accelerator=current.type if current else None,
        zero_stage=int(zero.get("stage", 0)),
        fsdp=bool(training_args.fsdp),
    )


def get_device_map(topology: Topology, *, quantised: bool) -> dict[str, int | str] | None:
    """Where `from_pretrained` puts the weights.

    Quantised weights are made on the device they stay on, so every process names its own. Sharded and plain weights
    are placed by the Trainer, for which None is returned.
    """
    if not quantised or topology.shards_parameters:
        return None
    if topology.accelerator is None:
        return {"": "cpu"}  # None would send 4-bit weights to a GPU that --use_cpu leaves alone
    return {"": topology.local_rank} if topology.world_size != 1 else None


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
    yield
    if dist.is_initialized():
        dist.barrier()  # nobody hangs up while another still writes or talks
        dist.destroy_process_group()
