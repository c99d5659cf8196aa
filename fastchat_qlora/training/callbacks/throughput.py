"""Throughput: tokens/s of training alone, and the memory of a process."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil
import torch


class TokenTotal(NamedTuple):
    """Tokens without padding that all processes have trained on, and the seconds of training alone."""

    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def supervised_rate(self) -> float:
        """Supervised tokens per second."""
        return self.supervised / self.seconds if self.seconds else 0.0


class Throughput:
    """Counts the tokens of this process and the time in which it trained on them.

    Within `paused` the clock stands: evaluations, saves and the like do not count. A device may still be at work on the
    last step then, which counts as part of the pause.
    """

    def __init__(self) -> None:
        self.total = TokenTotal()  # of all processes, as far as rates have been read
        self.seen = [0, 0]  # tokens and supervised tokens of this process
        self._logged = [0, 0]
        self._since: float | None = None
        self._paused = 0.0
        self._pauses = 0

    def begin(self) -> None:
        """Start the clock at the first step."""
        if self._since is None:
            self._since = time.perf_counter()

    def count(self, tokens: int, supervised: int) -> None:
        """Add the tokens of one optimizer step."""
        self.seen[0] += tokens
        self.seen[1] += supervised

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock; pauses may be nested."""
        began = time.perf_counter()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses and self._since is not None and self._since <= began:  # the clock was running
                self._paused += time.perf_counter() - began

    def read(self, accelerator: Any, device: torch.device) -> dict[str, float]:
        """Return the rates since the last reading, over all processes, and the largest memory of one in GiB.

        A collective operation, for moments at which the device is waited for anyway, as it is for a logged loss.
        """
        now = time.perf_counter()
        seconds = max(now - (now if self._since is None else self._since) - self._paused, 1e-9)
        new = [seen - logged for seen, logged in zip(self.seen, self._logged, strict=True)]
        self._since, self._paused, self._logged = now, 0.0, list(self.seen)
        everyone = accelerator.gather(torch.tensor([[*new, get_memory_bytes(device)]], device=device))
        tokens, supervised, _ = everyone.sum(0).tolist()
        added, before = TokenTotal(tokens, supervised, seconds), self.total
        self.total = TokenTotal(before.tokens + tokens, before.supervised + supervised, before.seconds + seconds)
        return {
            "tokens_per_second": round(added.rate, 1),
            "supervised_tokens_per_second": round(added.supervised_rate, 1),
            "memory_gib": round(int(everyone[:, 2].max()) / 2**30, 3),
        }


def get_memory_bytes(device: torch.device) -> int:
    """Return the bytes that this process holds: of the device, with its allocator's cache, or resident on the CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def peak_memory_mib(device: torch.device) -> float:
    """Return the most MiB that this process has held: on the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
