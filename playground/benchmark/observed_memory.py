"""train_lora.py, which also writes how much memory tensors took in each process: `peak_bytes-RANK.json`.

On a GPU it is what torch's allocator has counted. On a CPU the profiler records every block that torch allocates and
frees; tensors from before are counted one by one. Measured from the second optimizer step on: only then
the optimizer has its state.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from fastchat_qlora import cli
from fastchat_qlora.training import run
from fastchat_qlora.training.trainer import LoraTrainer

BLOCK = "[memory]"
"""The profiler's name for a block that is allocated or freed."""


def live_bytes() -> int:
    """Return the bytes of all tensors of this process, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor):  # some objects pretend to be what they are not
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None, getattr(thing, "ds_tensor", None)):
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def highest(profiler: Any) -> int:
    """Return the peak of bytes above those at the profiler's start."""
    blocks = [event for event in profiler.profiler.kineto_results.events() if event.name() == BLOCK]
    level = peak = 0
    for block in sorted(blocks, key=lambda block: block.start_ns()):
        level += block.nbytes()
        peak = max(peak, level)
    return peak


class PeakMemory(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """A callback that measures every optimizer step but the first."""

    def __init__(self) -> None:
        self.peak = self._before = 0
        self._profiler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to measure."""
        if state.global_step == 0:
            return
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        gc.collect()
        self._before = live_bytes()
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the peak of the step."""
        if state.global_step == 1:
            return
        if args.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        elif self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self.peak = max(self.peak, self._before + highest(self._profiler))
            self._profiler = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the peak."""
        path = Path(args.output_dir) / f"peak_bytes-{os.environ.get('RANK', '0')}.json"
        path.write_text(json.dumps({"peak": self.peak, "before": self._before}))


class ObservedTrainer(LoraTrainer):
    """The trainer with its memory measured."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_callback(PeakMemory())


if __name__ == "__main__":
    run.LoraTrainer = ObservedTrainer  # type: ignore[misc]  # our own name, for this program only
    cli.program(["train", *sys.argv[1:]])
