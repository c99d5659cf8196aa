"""Adapters on two-layer models as PEFT saves them, and the same models by plain transformers and PEFT."""

import json
from pathlib import Path
from typing import Any

import torch
from families import lora_config, make_base, randomize
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from fastchat_qlora.model.loading.base_model import keep_cpu_weights_trainable

VOCABULARY_SIZE = 600


def save_base(folder: Path, tokenizer: Path, family: str, dtype: torch.dtype, **changes: Any) -> Path:
    """Save a base model with the tokenizer of the tests."""
    torch.manual_seed(3)
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY_SIZE,
                n_embd=64,
                n_layer=2,
                n_head=4,
                n_positions=256,
                bos_token_id=1,
                eos_token_id=2,
            )
        ).to(dtype)
    else:
        model = make_base(family, dtype=dtype, vocab_size=VOCABULARY_SIZE, **changes)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, training: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Save an adapter with random values, the base model's tokenizer, and the precision of the training."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(**changes))
    randomize(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    if training is not None:
        write_training_args(folder, **training)
    return folder


def write_training_args(
    folder: Path, *, quantization: str = "none", double_quant: bool = True, dtype: str = "float32"
) -> None:
    """Write the part of training_args.json that has the precision of the base model."""
    lora = {
        "q_lora": quantization in ("nf4", "fp4"),
        "load_in_8bit": quantization == "int8",
        "bnb_4bit_quant_type": quantization if quantization in ("nf4", "fp4") else "nf4",
        "bnb_4bit_use_double_quant": double_quant,
    }
    training = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    (folder / "training_args.json").write_text(json.dumps({"lora": lora, "training": training}))


def load_reference(
    base: Path, adapter: Path, *, quantization: str = "none", double_quant: bool = True, dtype: str = "float32"
) -> PeftModel:
    """Load a base model and its adapter by plain transformers and PEFT."""
    compute = getattr(torch, dtype)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
    )
    kinds = {"none": None, "int8": BitsAndBytesConfig(load_in_8bit=True)}
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=compute, quantization_config=kinds.get(quantization, four_bits)
    )
    keep_cpu_weights_trainable(model)  # and in plain layout
    return PeftModel.from_pretrained(model, adapter).eval()


@torch.inference_mode()
def compute_logits(model: Any, seed: int = 0) -> torch.Tensor:
    """Return the logits of a sequence of random tokens, in fp32."""
    ids = torch.randint(3, VOCABULARY_SIZE, (1, 24), generator=torch.Generator().manual_seed(seed))
    found: torch.Tensor = model(input_ids=ids).logits.float()
    return found
