"""Two-layer models with random weights, one of each family that attends or scores in its own way."""

import copy
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.data.batching.collator import Collator
from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.attention.attention import PER_CONVERSATION, attend_per_conversation
from fastchat_qlora.model.loading.base_model import keep_cpu_weights_trainable
from fastchat_qlora.training.trainer import LoraTrainer

AttentionInterface.register(PER_CONVERSATION, attend_per_conversation)  # as choose_attention does in a run

VOCABULARY = 89
WINDOW = 8  # shorter than most conversations of the tests
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # so that attention is not nearly uniform, and caps and windows matter
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": Phi3Config(**SIZES),
}


@cache
def _weights(family: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(AutoModelForCausalLM.from_config(FAMILIES[family]).state_dict())


def make_base(
    family: str, attention: str | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Build a model with the same weights every time; `changes` are made to the configuration."""
    config = copy.deepcopy(FAMILIES[family])
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if "vocab_size" not in changes:
        model.load_state_dict(_weights(family))
    return model.to(dtype)


def make_quantized_base(folder: Path, attention: str | None = None) -> PreTrainedModel:
    """Load the Llama in NF4 with double quantization, computing in fp32; `folder` is for its weights."""
    if not (folder / "config.json").exists():
        make_base("llama").save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, attn_implementation=attention
    )
    keep_cpu_weights_trainable(model)
    return model


def lora_config(**changes: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**settings | changes)


def randomize(model: torch.nn.Module) -> None:
    """Give every trained tensor values: an adapter's first ones do nothing. The same for the same names."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.1).to(parameter.dtype)


def plain_peft(base: PreTrainedModel, **changes: Any) -> PeftModel:
    """Attach an adapter as PEFT and transformers do, without this program."""
    model = get_peft_model(base, lora_config(**changes))
    randomize(model)
    return model


def our_peft(base: PreTrainedModel, **changes: Any) -> PeftModel:
    """Attach an adapter with this program's layers."""
    model = attach_adapter(base, lora_config(**changes))
    randomize(model)
    return model


class Padding:
    """The attributes of a tokenizer that a collator reads."""

    def __init__(self, side: str = "right") -> None:
        self.padding_side = side

    def pad(self, features: list[dict[str, Any]], pad_to_multiple_of: int, **_: Any) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in features)
        width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
        ids, mask = (torch.zeros(len(features), width, dtype=torch.long) for _ in range(2))
        for i, row in enumerate(features):
            length = len(row["input_ids"])
            place = slice(0, length) if self.padding_side == "right" else slice(width - length, width)
            ids[i, place] = torch.as_tensor(row["input_ids"])
            mask[i, place] = 1
        return {"input_ids": ids, "attention_mask": mask}


def make_trainer(model: PeftModel, folder: Path, layout: str = "end to end", **kwargs: Any) -> LoraTrainer:
    """Build a trainer with batches laid out end to end, padded on the right or padded on the left."""
    flags = {
        "model_name_or_path": "-",
        "data_path": "-",
        "output_dir": folder,
        "disable_tqdm": True,
        "report_to": "none",
    }
    flags |= kwargs.pop("flags", {})
    arguments = parse_args([text for name, value in flags.items() for text in (f"--{name}", str(value))])
    side = "left" if layout.endswith("left") else "right"
    collator = Collator(Padding(side), padding_free=layout == "end to end")
    trainer = LoraTrainer(model=model, args=arguments.training, data_collator=collator, **kwargs)
    trainer.state.max_steps = 10  # it makes batches without having been started
    return trainer


class Largest(TorchDispatchMode):
    """The most elements of a tensor that is made in the block, without views of older ones."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return result


def conversation(length: int, seed: int, supervised_share: float = 0.6) -> dict[str, list[int]]:
    """Draw random tokens, a share of them supervised, but not the first, which no token precedes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
    keep = torch.rand(length, generator=generator) < supervised_share
    keep[0] = False
    return {"input_ids": ids.tolist(), "labels": torch.where(keep, ids, -100).tolist()}


def weighted(row: dict[str, list[int]], *weights: float) -> dict[str, Any]:
    """Give the supervised tokens of a conversation these weights in the loss, in turn."""
    given = itertools.cycle(weights)
    return {**row, "weights": [0.0 if label == -100 else next(given) for label in row["labels"]]}
