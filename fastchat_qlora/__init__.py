"""Fine-tune chat models with LoRA and QLoRA."""

__version__ = "0.1.0"
