"""Process group of a run: opening and closing it, and agreement between its processes."""

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


def open_on_cpu(seconds: int) -> None:
    """Open the process group of several processes on CPUs, with a timeout.

    transformers 5.23 (`TrainingArguments._setup_devices`) passes the timeout on for accelerators only, and takes a
    group that is open as it is. This can go once it passes it on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))


@contextmanager
def process_group(topology: Topology) -> Iterator[None]:
    """Prepare the process group for DeepSpeed, and close it after a run without errors.

    After an error this process just leaves: closing is collective, and the others may be waiting in the group.
    TrainingArguments has opened it by now; on the CPU it does so without DeepSpeed, which ZeRO-3 needs before the
    weights are loaded.
    """
    if topology.zero_stage and topology.accelerator is None:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
        _unlink_shared_buffer(topology)
    yield
    if dist.is_initialized():
        dist.barrier()  # no process leaves while another still writes or communicates
        dist.destroy_process_group()


def _unlink_shared_buffer(topology: Topology) -> None:
    """Unlink the shared memory of DeepSpeed's all-reduce on a CPU, so that it goes when this process ends.

    DeepSpeed 0.19.8 (`csrc/cpu/comm/shm.cpp`) leaves 66 MiB of each process in /dev/shm. After the barrier every
    process has opened what it needs. This can go once DeepSpeed unlinks it.
    """
    dist.barrier()
    where = f"{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{where}_{topology.rank}").unlink(missing_ok=True)


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error means that another process is gone.

    NCCL's and the store's errors have a type of their own; gloo's are RuntimeErrors that name its source file.
    """
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def require_agreement(settings: Mapping[str, Any]) -> None:
    """Require the same settings in every process; every process must call this.

    Machines are started one by one, each with its own command line and its own disk.

    Raises:
        UserError: naming each setting that differs, both values unless they are secret, and their ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: str(value) for name, value in settings.items()})
    errors = []
    for name, first in everyone[0].items():
        other = next((rank for rank, theirs in enumerate(everyone) if theirs.get(name) != first), None)
        if other is not None:
            ours, theirs = (mask_secrets(value, name.lstrip("-")) for value in (first, everyone[other].get(name)))
            errors.append(f"{name} is {ours} in rank 0 and {theirs} in rank {other}")
    if errors:
        raise UserError(f"the processes of this run differ: {'; '.join(errors)}; start every machine alike")


def host_group(seconds: int) -> Any:
    """Return a process group that communicates on the host, with a timeout; None in a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    try:
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        raise RunError(
            f"the processes cannot connect by gloo, which they use on the host: {error}; set GLOO_SOCKET_IFNAME to the "
            "network interface between the machines"
        ) from error


def agree(values: list[float], group: Any) -> list[float]:
    """Return the sum of each value over all processes, on the host, so that no device is waited for."""
    if group is None:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return list(total.tolist())


def gather(value: Any, group: Any) -> list[Any]:
    """Return the value of every process, by rank."""
    if group is None:
        return [value]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=group)
    return everyone
