"""The clock in a contestant's process: tokens and time of each step of its trainer.

It wraps transformers' Trainer, on which all contestants build, so it is the same for all.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from typing import Any

import torch
import transformers
from machine import read_memory
from training_task import Task

IGNORED = -100  # the label of tokens that are not supervised, the same in all four tools


class Meter(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """A callback that times optimizer steps, counts their tokens, ends the run in time, and writes JSON."""

    def __init__(self, trainer: Any, task: Task, packages: tuple[str, ...]) -> None:
        self.trainer, self.task, self.packages = trainer, task, packages
        self.real = self.supervised = self.positions = 0
        self.steps: list[dict[str, float]] = []
        self.warmup = task.warmup
        trainer.model.get_input_embeddings().register_forward_pre_hook(self.count_positions)
        if not hasattr(trainer, "count_tokens"):
            self.inner_step = trainer.training_step
            trainer.training_step = self.training_step

    def count_positions(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Count the positions that the model computes, padding included."""
        self.positions += inputs[0].numel()

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        """Count the tokens of a micro-batch, for a trainer that does not count itself, and train on it."""
        real, supervised = count_tokens(inputs)
        self.real, self.supervised = self.real + real, self.supervised + supervised
        loss: torch.Tensor = self.inner_step(model, inputs, *rest)
        return loss

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock of the first step."""
        self.last = self.phase_began = time.monotonic()

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Record the time and the counts of one optimizer step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        real, supervised = (
            self.trainer.count_tokens() if hasattr(self.trainer, "count_tokens") else (self.real, self.supervised)
        )
        counts = {"real": real, "supervised": supervised, "positions": self.positions}
        self.steps.append({"ended": now, "seconds": now - self.last, **counts})
        self.last = time.monotonic()
        self.watch_the_clock(now, control)

    def watch_the_clock(self, now: float, control: Any) -> None:
        """End the warm-up, or the run, if it has lasted long enough."""
        late = now - self.phase_began > self.task.seconds
        done = len(self.steps)
        if done <= self.warmup and (late or done == self.warmup):
            self.warmup, self.phase_began = done, now
        elif late or done == self.warmup + self.task.steps:
            control.should_training_stop = True

    def on_train_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Write the measurements."""
        on_gpu = torch.cuda.is_available()
        measured = {
            "warmup": self.warmup,
            "steps": self.steps,
            "first_step_seconds": self.steps[0]["ended"] - self.task.started,
            "peak_mib": read_memory("VmHWM"),
            "gpu_peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "threads": torch.get_num_threads(),
            "losses": [entry["loss"] for entry in state.log_history if "loss" in entry],
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in self.packages},
        }
        self.task.results.write_text(json.dumps(measured, indent=1), encoding="utf-8")


def count_tokens(inputs: dict[str, Any]) -> tuple[int, int]:
    """Return the real tokens of a micro-batch, and those that are a target of the loss."""
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
    if mask is None:  # sequences without padding, end to end
        real = ids.numel()
    elif mask.dim() == 2:
        real = int((mask != 0).sum())
    else:  # (rows, 1, positions, positions): a real token sees itself. Additive unless boolean.
        itself = mask.diagonal(dim1=-2, dim2=-1)
        real = int((itself if mask.dtype == torch.bool else itself == 0).sum())
    return real, int((labels[..., 1:] != IGNORED).sum())


def watch_training(task: Task, packages: tuple[str, ...]) -> None:
    """Measure every trainer that begins to train from now on."""
    train = transformers.Trainer.train

    def measured_train(self: Any, *arguments: Any, **settings: Any) -> Any:
        self.add_callback(Meter(self, task, packages))
        return train(self, *arguments, **settings)

    transformers.Trainer.train = measured_train
