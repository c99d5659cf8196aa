"""This program's side of run.py: train_lora.py with a clock."""

from measuring import watch_training
from training_task import lora_flags, read_task, to_flags, trainer_flags

from fastchat_qlora import cli

PACKAGES = ("fastchat-qlora", "torch", "transformers", "peft", "accelerate", "datasets")


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
    watch_training(task, PACKAGES)
    cli.program(["train", *to_flags(settings | task.options)])


if __name__ == "__main__":
    main()
