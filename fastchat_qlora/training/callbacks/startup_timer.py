"""Time from the start of the process to its first optimizer step."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fastchat_qlora.config.arguments import TrainingArguments

logger = logging.getLogger(__name__)

IMPORTED_AT = time.monotonic()


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
    """Logs the time from the start of the process, without its launcher, to the end of its first optimizer step."""

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
