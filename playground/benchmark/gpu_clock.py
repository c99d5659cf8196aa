"""Time and memory on a device, which is waited for only where a reading needs it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

GIB = 2**30


def mark(device: torch.device) -> Any:
    """Return a mark in the work of the device: an event in its queue, or the time where it has none."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(marks: Sequence[Any], device: torch.device) -> list[float]:
    """Return the time from each mark to the next; wait for the last one."""
    pairs = list(pairwise(marks))
    if device.type != "cuda":
        return [1000 * (end - start) for start, end in pairs]
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairs]


def median_ms(work: Callable[[], Any], device: torch.device, *, warmup: int = 3, repeats: int = 10) -> float:
    """Return the median time of some work, after a warm-up."""
    for _ in range(warmup):
        work()
    marks = [mark(device)]
    for _ in range(repeats):
        work()
        marks.append(mark(device))
    return statistics.median(milliseconds(marks, device))


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> dict[str, float | None]:
    """Return the peak memory since then, of tensors and of the allocator; unknown on a CPU."""
    if device.type != "cuda":
        return {"allocated_gib": None, "reserved_gib": None}
    return {
        "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def allocated_gib(device: torch.device) -> float | None:
    """Return the memory of tensors now; unknown on a CPU."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else None


def give_back(device: torch.device) -> None:
    """Free memory that no tensor uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
