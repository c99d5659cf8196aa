"""Measurements of a process: tokens/s of training alone, memory, and the time to the first optimizer step."""

import logging
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import TrainerCallback

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.utils.free_cores import FreeCores

logger = logging.getLogger(__name__)

IMPORTED_AT = time.monotonic()


class TokenTotal(NamedTuple):
    """Tokens without padding that all processes have trained on, and the seconds of training alone.

    What several sequences share from their beginning on counts for each of them among `tokens`, and among `computed` as
    often as a pass had it.
    """

    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0
    computed: int = 0

    def plus(self, other: "TokenTotal") -> "TokenTotal":
        """Return the sum of both."""
        return TokenTotal(*map(add, self, other))

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def computed_rates(self) -> dict[str, float]:
        """Computed tokens per second under the name of a metric, where sequences share tokens."""
        if not self.seconds or self.computed == self.tokens:
            return {}
        return {"computed_tokens_per_second": round(self.computed / self.seconds, 1)}

    @property
    def supervised_rate(self) -> float:
        """Supervised tokens per second."""
        return self.supervised / self.seconds if self.seconds else 0.0


class Throughput:
    """Counter of the tokens of this process, and of the time in which it trained on them.

    Within `paused` the clock stands: evaluations, saves and the like do not count. A device may still be at work on the
    last step then, which counts as part of the pause.
    """

    def __init__(self) -> None:
        self.total = TokenTotal()  # of all processes since the run began, as far as they have been added up
        self.seen = [0, 0, 0]  # tokens, supervised and computed tokens of this process
        self._added = [0, 0, 0]  # of those
        self._unread = TokenTotal()
        self._since: float | None = None
        self._paused = 0.0
        self._pauses = 0

    def begin(self) -> None:
        """Start the clock at the first step."""
        if self._since is None:
            self._since = time.perf_counter()

    def count(self, tokens: int, supervised: int, computed: int) -> None:
        """Add the tokens of one optimizer step."""
        self.seen = [sum(pair) for pair in zip(self.seen, (tokens, supervised, computed), strict=True)]

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

    def add_up(self, accelerator: Any, device: torch.device) -> int:
        """Add to the total what all processes have trained on; return the largest memory of one in bytes.

        A collective operation, for moments at which the device is waited for anyway, as it is for a logged loss.
        """
        now = time.perf_counter()
        new = [seen - added for seen, added in zip(self.seen, self._added, strict=True)]
        passed = now - (now if self._since is None else self._since) - self._paused
        seconds = max(passed, 1e-9) if new[0] else 0.0  # what passes between a log entry and a save is no training
        self._since, self._paused, self._added = now, 0.0, list(self.seen)
        everyone = accelerator.gather(torch.tensor([[*new, get_memory_bytes(device)]], device=device))
        tokens, supervised, computed, _ = everyone.sum(0).tolist()
        added = TokenTotal(tokens, supervised, seconds, computed)
        self.total, self._unread = self.total.plus(added), self._unread.plus(added)
        return int(everyone[:, -1].max())

    def read(self, accelerator: Any, device: torch.device) -> dict[str, float]:
        """Return the rates since the last reading, over all processes, and the largest memory of one in GiB."""
        memory = self.add_up(accelerator, device)
        read, self._unread = self._unread, TokenTotal()
        return {
            "tokens_per_second": round(read.rate, 1),
            "supervised_tokens_per_second": round(read.supervised_rate, 1),
            **read.computed_rates,
            "memory_gib": round(memory / 2**30, 3),
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


def seconds_since_start() -> float:
    """Return the age of this process, with the start of Python and all imports.

    Linux knows it to a hundredth of a second (proc(5): field 22 of stat, in ticks since the machine was booted).
    Elsewhere it is counted from the import of this module, some seconds later.
    """
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return time.monotonic() - IMPORTED_AT
    fields_from_third = stat.rpartition(")")[2].split()  # the second is the program's name, which may hold anything
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields_from_third[19]) / os.sysconf("SC_CLK_TCK")


class FirstStepClock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback that logs the time from the start of the process to the end of its first optimizer step."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def on_optimizer_step(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Read the clock once, when the device is done with the step."""
        if self.metrics:
            return
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.metrics["time_to_first_step"] = round(seconds_since_start(), 2)
        logger.info(f"First step done {self.metrics['time_to_first_step']} s after the start of the process.")


class ThreadsByLoad(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback that gives a thread to each core that is free, before each pass on the CPU."""

    def __init__(self, cores: FreeCores) -> None:
        self._cores = cores

    def on_step_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Choose the threads of a pass. Compiled functions are compiled again for another number."""
        if args.device.type == "cpu" and not args.torch_compile and not args.compile_layers:
            self._cores.follow()

    on_substep_end = on_prediction_step = on_step_begin
