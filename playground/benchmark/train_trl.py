"""TRL's side of run.py: an SFTTrainer as a user builds it, with a clock. Runs in TRL's environment."""

from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from measuring import watch_training
from peers import mark_answers, to_messages
from peft import LoraConfig
from training_task import ALPHA, RANK, TARGETS, Task, read_task, trainer_flags
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

PACKAGES = ("trl", "torch", "transformers", "peft", "accelerate", "datasets")


def make_config(task: Task, template: Path) -> SFTConfig:
    """Convert the task to TRL's settings."""
    settings: dict[str, Any] = trainer_flags(task) | {
        "max_length": task.max_length,
        "assistant_only_loss": True,
        "chat_template_path": str(template),
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": task.checkpointing,
        "model_init_kwargs": {"dtype": "bfloat16"},
        "train_sampling_strategy": "sequential",
    }
    return SFTConfig(**settings | task.options)


def main() -> None:
    """Train."""
    task = read_task()
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    template = Path(task.folder) / "training.jinja"
    template.write_text(mark_answers(tokenizer.chat_template), encoding="utf-8")
    dataset = load_dataset("json", data_files=task.data, split="train")
    dataset = dataset.map(to_messages, remove_columns="conversations")
    adapter = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=task.dropout, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        task.model,
        args=make_config(task, template),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    watch_training(task, PACKAGES)
    trainer.train()


if __name__ == "__main__":
    main()
