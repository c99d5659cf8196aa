"""The task of a contestant of run.py. Only the standard library is imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Task(NamedTuple):
    """One run; the contestant's process gets it as JSON.

    Attributes:
        model: folder of the model.
        data: the ShareGPT file.
        folder: for everything that the run writes.
        max_length: maximum of tokens of a sequence.
        micro_batch: sequences that are computed at once in a process; this program counts conversations, and cuts them.
        accumulation: micro-batches of an optimizer step.
        warmup: steps, or passes, before the clock starts.
        steps: steps, or passes, that are timed.
        seconds: after which warm-up and timed steps both end early.
        checkpointing: whether activations are recomputed in the backward pass.
        dropout: on the adapter's input.
        learning_rate: constant.
        options: the contestant's own settings.
        in_parts: whether passes are timed in place of steps, and the run ends in the middle of one.
        started: start of its process, by time.monotonic().
    """

    model: str
    data: str
    folder: str
    max_length: int
    micro_batch: int
    accumulation: int
    warmup: int
    steps: int
    seconds: float
    checkpointing: bool
    dropout: float
    learning_rate: float
    options: dict[str, Any]
    in_parts: bool = False
    started: float = 0.0

    @property
    def results(self) -> Path:
        """The file of the first process's measurements."""
        return self.result_of(0)

    def result_of(self, rank: int) -> Path:
        """Return the file of a process's measurements."""
        return Path(self.folder) / f"measured-{rank}.json"

    def write(self) -> Path:
        """Write the task into its folder and return the path."""
        path = Path(self.folder) / "task.json"
        path.write_text(json.dumps(self._asdict(), indent=1), encoding="utf-8")
        return path


RANK, ALPHA, TARGETS = 8, 16, ("q_proj", "v_proj")  # the adapter, the same for everybody


def read_task() -> Task:
    """Read the task from the file that the command line names."""
    return Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def trainer_flags(task: Task) -> dict[str, Any]:
    """Return the settings with the same names in the TrainingArguments of all contestants."""
    return {
        "output_dir": str(Path(task.folder) / "output"),
        "per_device_train_batch_size": task.micro_batch,
        "gradient_accumulation_steps": task.accumulation,
        "max_steps": task.warmup + task.steps,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def lora_flags(task: Task) -> dict[str, Any]:
    """Return the flags of model, data and adapter, which have the same names in FastChat and here."""
    return {
        "model_name_or_path": task.model,
        "data_path": task.data,
        "model_max_length": task.max_length,
        "bf16": True,
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_target_modules": TARGETS,
        "lora_dropout": task.dropout,
    }


def to_flags(settings: dict[str, Any]) -> list[str]:
    """Convert settings to the words of a command line; a list becomes several words."""
    words: list[str] = []
    for name, value in settings.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return words
