"""A chat model without downloads: a tokenizer trained on the dummy data, and a Llama with random weights."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parents[2] / "data" / "dummy_conversation.json"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
}
"""Sizes of a model of two layers, for tests."""


def make_tokenizer(folder: Path) -> None:
    """Save a byte-level BPE tokenizer of 600 tokens with those of ChatML."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = json.loads(DATA.read_text(encoding="utf-8"))
    bpe.train_from_iterator((turn["value"] for record in text for turn in record["conversations"]), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def make_model(folder: Path, sizes: dict[str, int | bool], dtype: torch.dtype = torch.float32) -> None:
    """Save a Llama with random weights, N(0, 0.02), for that tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=600, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
