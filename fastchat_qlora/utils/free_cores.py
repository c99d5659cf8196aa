"""Threads of torch on the CPU: as many as other processes leave cores."""

import logging
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

LOAD_SECONDS = 1.0  # between two looks at what others use; the system counts in hundredths
# With one of them, the number of threads is what the user says.
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
GIVEN_UP, TAKEN_BACK = 0.4, 0.25  # of a core: what others use of one that is given up, and of one that is taken back
CONTROL_GROUP = Path("/sys/fs/cgroup")


class Use(NamedTuple):
    """Seconds of CPU that have been used: on the cores of this process, in its control group, and by itself."""

    at: float  # of a clock
    cores: float
    group: float
    own: float


class FreeCores:
    """Cores that other processes leave, each of which gets a thread.

    torch splits an operation into equal parts, one for each core. Where one of them is taken by another process, all
    threads wait for the one on it, and libgomp's do so without giving theirs up, thousands of times a second. On one
    core less there is nothing to wait for. The number of threads decides how some products are rounded, so that runs
    with --full_determinism keep it, like those with one of THREAD_SETTINGS, and those of several processes, which would
    also take each other for others.
    """

    def __init__(self) -> None:
        self._most = self._threads = torch.get_num_threads()
        self._quota, self._is_logged = _read_quota(), False
        is_set = any(name in os.environ for name in THREAD_SETTINGS)
        self._is_fixed = is_set or self._most == 1 or int(os.environ.get("WORLD_SIZE") or 1) > 1
        self._last = Use(time.monotonic(), 0.0, 0.0, 0.0)
        if not self._is_fixed:
            try:
                self._last = _read_use(math.isfinite(self._quota))
            except OSError:  # another system than Linux, or one that hides it
                self._is_fixed = True

    def follow(self) -> None:
        """Set torch's threads by what others have used since the last time, if that was a second or more ago."""
        if self._is_fixed or torch.are_deterministic_algorithms_enabled():
            return
        if time.monotonic() - self._last.at < LOAD_SECONDS:
            return
        last, self._last = self._last, _read_use(math.isfinite(self._quota))
        passed = self._last.at - last.at
        own = (self._last.own - last.own) / passed
        others = (self._last.cores - last.cores) / passed - own
        in_group = (self._last.group - last.group) / passed - own
        cores = len(os.sched_getaffinity(0))
        threads = min(
            choose_threads(cores, others, self._threads),
            choose_threads(min(self._quota, cores), in_group, self._threads),
            self._most,
        )
        if threads < self._most and not self._is_logged:
            self._is_logged = True
            logger.info(
                f"Other processes or a quota leave fewer than {self._most} cores: torch computes on {threads}, and on "
                f"as many as are free from now on, at most {self._most} (set OMP_NUM_THREADS to decide yourself)."
            )
        if threads != self._threads:
            self._threads = threads
            torch.set_num_threads(threads)


def choose_threads(cores: float, others: float, threads: int) -> int:
    """Return the threads for which others leave room, at least 1; a number between two is as it was.

    A busy process that shares a core with one of ours is counted as half a core at least.
    """
    fewest, most = (cores - math.ceil(others - limit) for limit in (TAKEN_BACK, GIVEN_UP))
    return max(1, math.floor(min(max(threads, fewest), most)))


def _read_use(has_quota: bool) -> Use:
    """Read what has been used; a control group counts if it has a quota of its own.

    Raises:
        OSError: the system does not tell.
    """
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set[str]()
    ticks = 0
    for name, *fields in map(str.split, Path("/proc/stat").read_text().splitlines()):
        if name in names:
            user, nice, system, _, _, irq, softirq = map(int, fields[:7])
            # Processes with a lower priority take nothing from this one, unless it has one itself.
            ticks += user + system + irq + softirq + (nice if os.nice(0) > 0 else 0)
    own = time.process_time()
    group = _read_group_seconds() if has_quota else own
    return Use(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), group, own)


def _read_quota() -> float:
    """Return the cores' worth of time that this process's control group may use (cgroup v2), or infinity."""
    try:
        quota, period = (CONTROL_GROUP / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def _read_group_seconds() -> float:
    fields = dict(line.split() for line in (CONTROL_GROUP / "cpu.stat").read_text().splitlines())
    return int(fields["usage_usec"]) / 1e6
