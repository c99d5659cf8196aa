"""The process group of a run: opening, closing, and agreement between its processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from fastchat_qlora.distributed.process_group import is_lost_peer, process_group, require_agreement
from fastchat_qlora.distributed.topology import Topology

ONE_CPU_PROCESS = Topology(local_rank=0, rank=0, world_size=1, accelerator=None, zero_stage=0, fsdp=False)


@pytest.fixture
def open_group(tmp_path: Path) -> Iterator[None]:
    """Open a process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("open_group")
def test_process_group_is_closed() -> None:
    with process_group(ONE_CPU_PROCESS):
        assert dist.is_initialized()
    assert not dist.is_initialized()


@pytest.mark.usefixtures("open_group")
def test_failed_process_leaves_the_group_open() -> None:
    """Closing it is a collective operation, and the others may be waiting; the launcher ends them."""
    with pytest.raises(ValueError, match="on the way"), process_group(ONE_CPU_PROCESS):
        raise ValueError("on the way")
    assert dist.is_initialized()


def test_missing_process_group_is_no_error() -> None:
    with process_group(ONE_CPU_PROCESS):
        assert not dist.is_initialized()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("the store has gone"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("size mismatch"), False),
        (OSError("Connection closed by peer"), False),
    ],
)
def test_error_of_a_lost_peer_is_recognized(error: Exception, lost: bool) -> None:
    assert is_lost_peer(error) is lost


@pytest.mark.usefixtures("open_group")
def test_single_process_agrees_with_itself() -> None:
    require_agreement({"--lora_r": 8})
