"""This program's side of run.py: the command line with a clock, whose libraries are imported as the program does it."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

from training_task import Task, lora_flags, read_task, to_flags, trainer_flags

PACKAGES = ("fastchat-qlora", "torch", "transformers", "peft", "accelerate", "datasets")
TRAINER = "fastchat_qlora.training.trainer"  # imported before anything is trained


class ClockLoader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A finder that starts to measure trainers as soon as the program has imported its own.

    The clock imports torch and transformers, which is to come neither before the program's settings for them nor at
    another moment than without a clock.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._found: importlib.machinery.ModuleSpec | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return how the module of the trainer is found otherwise, with this as its loader."""
        if name != TRAINER:
            return None
        self._found = importlib.machinery.PathFinder.find_spec(name, path, target)
        return self._found and importlib.machinery.ModuleSpec(name, self, origin=self._found.origin)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave the module to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Load the module, and set the clock."""
        assert self._found and self._found.loader
        module.__file__ = self._found.origin
        self._found.loader.exec_module(module)
        from measuring import watch_training

        watch_training(self._task, PACKAGES)


def main() -> None:
    """Train as the command line would."""
    task = read_task()
    settings = (
        trainer_flags(task)
        | lora_flags(task)
        | {
            "activation_checkpointing": task.checkpointing,
            "train_sampling_strategy": "sequential",
        }
    )
    sys.meta_path.insert(0, ClockLoader(task))
    from fastchat_qlora import cli

    cli.program(["train", *to_flags(settings | task.options)])


if __name__ == "__main__":
    main()
