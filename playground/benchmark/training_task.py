"""What a contestant of run.py is given to train. Nothing but the standard library."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Task(NamedTuple):
    """One run; it travels to the contestant's process as JSON.

    Attributes:
        model: the model's folder.
        data: the ShareGPT file.
        folder: where everything goes that the run writes.
        max_length: the most tokens of a row.
        micro_batch: rows that go through the model at once.
        accumulation: micro-batches of an optimizer step.
        warmup: steps before the clock starts.
        steps: steps that are timed.
        seconds: warm-up and timed steps both end early, with the first step that ends after so long.
        checkpointing: whether activations are computed again in the backward pass.
        dropout: on the adapter's input.
        learning_rate: constant.
        options: settings of the contestant's own.
        started: when its process was started, by time.monotonic().
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
    started: float = 0.0

    @property
    def results(self) -> Path:
        """The file of what was measured."""
        return Path(self.folder) / "measured.json"

    def write(self) -> Path:
        """Write it into its folder."""
        path = Path(self.folder) / "task.json"
        path.write_text(json.dumps(self._asdict(), indent=1), encoding="utf-8")
        return path


RANK, ALPHA, TARGETS = 8, 16, ("q_proj", "v_proj")  # the adapter, the same for everybody


def read_task() -> Task:
    """The task whose file the command line names."""
    return Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def trainer_flags(task: Task) -> dict[str, Any]:
    """Settings that every contestant's TrainingArguments know by the same name."""
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
    """Model, data and adapter, by the names that FastChat gave the flags and this program has kept."""
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
    """Settings as they stand on a command line; of a list, one after the other."""
    words: list[str] = []
    for name, value in settings.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return words
