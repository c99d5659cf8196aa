"""How many tokens a second training goes through, and what memory it holds."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil
import torch


class Total(NamedTuple):
    """What all processes have trained on since they began.

    Attributes:
        tokens: real ones.
        supervised: those of them that are learnt.
        seconds: in which nothing but training was done.
    """

    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def supervised_rate(self) -> float:
        """Learnt tokens per second."""
        return self.supervised / self.seconds if self.seconds else 0.0


class Throughput:
    """Counts the tokens of this process, and the time in which it trained on them.

    Evaluations, saves and whatever else is done in between do not count: within `paused` the clock stands. A device may
    still be at work on the last step by then, which counts as part of the pause.

    Attributes:
        seen: real and supervised tokens of this process since its start.
        total: of all processes, as far as rates have been read.
    """

    def __init__(self) -> None:
        self.total = Total()
        self.seen = [0, 0]
        self._logged = [0, 0]
        self._since: float | None = None
        self._paused = 0.0
        self._pauses = 0

    def begin(self) -> None:
        """Start the clock, at the first step."""
        if self._since is None:
            self._since = time.perf_counter()

    def count(self, real: int, supervised: int) -> None:
        """Note the tokens of one optimizer step."""
        self.seen[0] += real
        self.seen[1] += supervised

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While this is entered, the time is not training's. It may be entered again within itself."""
        began = time.perf_counter()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses and self._since is not None and self._since <= began:  # the clock was running
                self._paused += time.perf_counter() - began

    def read(self, accelerator: Any, device: torch.device) -> dict[str, float]:
        """The rates since the last reading, over all processes, and the memory of the one that holds most.

        A collective, to be called where the device has just been waited for, as it is for a loss that is logged.

        Returns:
            Real and supervised tokens per second, and GiB.
        """
        now = time.perf_counter()
        seconds = max(now - (now if self._since is None else self._since) - self._paused, 1e-9)
        new = [seen - logged for seen, logged in zip(self.seen, self._logged, strict=True)]
        self._since, self._paused, self._logged = now, 0.0, list(self.seen)
        own = torch.tensor([[*new, round(memory_gib(device) * 2**30)]], dtype=torch.int64, device=device)
        everyone = accelerator.gather(own)
        real, supervised, _ = everyone.sum(0).tolist()
        new_total, before = Total(real, supervised, seconds), self.total
        self.total = Total(before.tokens + real, before.supervised + supervised, before.seconds + seconds)
        return {
            "tokens_per_second": round(new_total.rate, 1),
            "supervised_tokens_per_second": round(new_total.supervised_rate, 1),
            "memory_gib": round(int(everyone[:, 2].max()) / 2**30, 3),
        }


def memory_gib(device: torch.device) -> float:
    """What this process holds now, in GiB: of the device, with what its allocator keeps; or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this process has held, in MiB: on the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
