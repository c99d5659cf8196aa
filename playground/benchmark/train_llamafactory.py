"""LLaMA-Factory's side of run.py: its `train` command, with a clock. Runs in LLaMA-Factory's environment."""

from pathlib import Path

import torch
from measuring import watch_training
from peers import do_without_torchaudio, read_system_message, write_dataset_info
from training_task import ALPHA, RANK, TARGETS, read_task, trainer_flags
from transformers import AutoTokenizer

PACKAGES = ("llamafactory", "torch", "transformers", "peft", "accelerate", "datasets")


def main() -> None:
    """Train as `llamafactory-cli train` would, with the task and otherwise the settings of its example for LoRA."""
    task = read_task()
    do_without_torchaudio()
    from llamafactory.train.tuner import run_exp

    settings = trainer_flags(task) | {
        "model_name_or_path": task.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": task.dropout,
        "lora_target": ",".join(TARGETS),
        "dataset": "talks",
        "dataset_dir": str(write_dataset_info(Path(task.data), Path(task.folder))),
        "template": "chatml",
        "default_system": read_system_message(AutoTokenizer.from_pretrained(task.model)),
        "cutoff_len": task.max_length,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": not task.checkpointing,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    watch_training(task, PACKAGES)
    run_exp(settings | task.options)


if __name__ == "__main__":
    main()
