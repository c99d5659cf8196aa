"""The clock in a contestant's process: tokens and time of each step of its trainer.

It wraps transformers' Trainer, on which all contestants build, so it is the same for all.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from typing import Any

import torch
import transformers
from machine import read_memory
from training_task import Task

IGNORED = -100  # the label of tokens that are not supervised, the same in all four tools


class Meter(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """A callback that times optimizer steps, counts their tokens, ends the run in time, and writes JSON.

    With `task.in_parts` it times passes, and the process ends in the middle of a step.
    """

    def __init__(self, trainer: Any, task: Task, packages: tuple[str, ...]) -> None:
        self.trainer, self.task, self.packages = trainer, task, packages
        self.real = self.supervised = self.positions = self.passes = 0
        self.steps: list[dict[str, float]] = []
        self.began: dict[str, float] = {}  # when the first step did
        self.warmup = task.warmup
        trainer.model.get_input_embeddings().register_forward_pre_hook(self.count_positions)
        self.inner_step = trainer.training_step
        trainer.training_step = self.training_step

    def count_positions(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Count the positions that the model computes, padding included, and its passes."""
        self.positions += inputs[0].numel()
        self.passes += 1

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        """Count the tokens of a pass, for a trainer that does not count itself, and train on it."""
        self.began = self.began or self.read_clocks()
        if self.task.in_parts or not hasattr(self.trainer, "throughput"):
            real, supervised = count_tokens(inputs)
            self.real, self.supervised = self.real + real, self.supervised + supervised
        loss: torch.Tensor = self.inner_step(model, inputs, *rest)
        if self.task.in_parts and self.record():
            self.write(self.trainer.state)
            sys.stdout.flush()
            os._exit(0)
        return loss

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock of the first step."""
        self.last = self.phase_began = time.monotonic()

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Record the time and the counts of one optimizer step."""
        if not self.task.in_parts and self.record():
            control.should_training_stop = True

    def record(self) -> bool:
        """Record the time and the counts of a step or a pass; return whether the run ends."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        if hasattr(self.trainer, "throughput") and not self.task.in_parts:
            self.real, self.supervised = self.trainer.throughput.seen[:2]  # of this process
        counts = {name: getattr(self, name) for name in ("real", "supervised", "positions", "passes")}
        self.steps.append({"ended": now, "seconds": now - self.last, **self.read_clocks(), **counts})
        self.last = time.monotonic()
        return self.is_over(now)

    def read_clocks(self) -> dict[str, float]:
        """Return the seconds since the command, and those of CPU that this process has taken."""
        return {"since_start": time.monotonic() - self.task.started, "cpu": time.process_time()}

    def is_over(self, now: float) -> bool:
        """Return whether the run ends with this step; the warm-up ends, too, when it is done or late."""
        late = self.agree(now - self.phase_began > self.task.seconds)
        done = len(self.steps)
        if done <= self.warmup and (late or done == self.warmup):
            self.warmup, self.phase_began = done, now
            return False
        return late or done == self.warmup + self.task.steps

    def agree(self, late: bool) -> bool:
        """Return the first process's answer in all of them, which would wait for each other otherwise."""
        if not torch.distributed.is_initialized():
            return late
        answer = torch.tensor(int(late), device=self.trainer.args.device)
        torch.distributed.broadcast(answer, 0)
        return bool(answer)

    def on_train_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Write the measurements."""
        self.write(state)

    def write(self, state: Any) -> None:
        """Write what was measured in this process."""
        on_gpu = torch.cuda.is_available()
        measured = {
            "warmup": self.warmup,
            "steps": self.steps,
            "began": self.began,
            "first_step_seconds": self.steps[0]["ended"] - self.task.started,
            "peak_mib": read_memory("VmHWM"),
            "gpu_peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "threads": torch.get_num_threads(),
            "losses": [entry["loss"] for entry in state.log_history if "loss" in entry],
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in self.packages},
        }
        path = self.task.result_of(int(os.environ.get("RANK", "0")))
        path.write_text(json.dumps(measured, indent=1), encoding="utf-8")


def count_tokens(inputs: dict[str, Any]) -> tuple[int, int]:
    """Return the real tokens of a pass, and those that are a target of the loss."""
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
    if mask is None:  # sequences without padding, end to end
        real = ids.numel()
    elif mask.dim() == 2:
        real = int((mask != 0).sum())
    else:  # (rows, 1, positions, positions): a real token sees itself. Additive unless boolean.
        itself = mask.diagonal(dim1=-2, dim2=-1)
        real = int((itself if mask.dtype == torch.bool else itself == 0).sum())
    if "supervised" in inputs:  # the labels are those of the targets alone
        return real, labels.numel()
    return real, int((labels[..., 1:] != IGNORED).sum())


def watch_training(task: Task, packages: tuple[str, ...]) -> None:
    """Measure every trainer that begins to train from now on."""
    train = transformers.Trainer.train

    def measured_train(self: Any, *arguments: Any, **settings: Any) -> Any:
        self.add_callback(Meter(self, task, packages))
        return train(self, *arguments, **settings)

    transformers.Trainer.train = measured_train
