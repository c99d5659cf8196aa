"""Process group of a run: opening and closing it, and agreement between processes."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.utils.text import mask_secrets


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


def agree(values: list[float], group: Any) -> list[float]:
    """The sum of each value over all processes; they stay on the host, so that no device is waited for."""
    if group is None:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return list(total.tolist())


def gather(value: Any, group: Any) -> list[Any]:
    """What every process says, in the order of their ranks."""
    if group is None:
        return [value]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def host_group(seconds: int) -> Any:
    """A process group that talks on the host, and waits for so many seconds at the most; None in a single process.

    Raises:
        RunError: the processes do not find each other in this way.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    try:
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        raise RunError(
            f"the processes do not find each other by gloo, with which they agree on the host: {error}; set "
            "GLOO_SOCKET_IFNAME to the network interface between the machines"
        ) from error
