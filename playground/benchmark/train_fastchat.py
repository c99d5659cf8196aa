"""FastChat's side of run.py: its train_lora.py from its wheel, with a clock. Runs in FastChat's environment."""

import sys
from typing import Any

import torch
import transformers
from measuring import watch_training
from peers import do_without_flash_attn
from training_task import lora_flags, read_task, to_flags, trainer_flags

PACKAGES = ("fschat", "torch", "transformers", "peft", "accelerate")


def take_in_order() -> None:
    """Train on sequences in the order of the file, for which the other tools have a setting."""

    def sampler(self: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    transformers.Trainer._get_train_sampler = sampler


def mark_legacy() -> None:
    """Set the attribute `legacy` of the tokenizer, which FastChat reads and only Llama's tokenizers have."""
    load = transformers.AutoTokenizer.from_pretrained

    def load_legacy(*arguments: Any, **settings: Any) -> Any:
        tokenizer = load(*arguments, **settings)
        tokenizer.legacy = True
        return tokenizer

    transformers.AutoTokenizer.from_pretrained = load_legacy


def main() -> None:
    """Train as FastChat's command line would."""
    task = read_task()
    settings = (
        trainer_flags(task)
        | lora_flags(task)
        | {
            "use_cpu": not torch.cuda.is_available(),
            "gradient_checkpointing": task.checkpointing,
            "weight_decay": 0.0,
        }
    )
    do_without_flash_attn()
    take_in_order()
    mark_legacy()
    watch_training(task, PACKAGES)
    sys.argv = ["train_lora.py", *to_flags(settings | task.options)]
    from fastchat.train.train_lora import train

    train()


if __name__ == "__main__":
    main()
