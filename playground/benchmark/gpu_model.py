"""The model and data of gpu_suite.py: a Llama with random weights, and conversations of random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from conversations import SEED, SHAPES
from transformers import BitsAndBytesConfig, LlamaConfig, PreTrainedModel

from fastchat_qlora.data.batching.packing import PackedDataset, PackingSampler
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX, TokenizedConversation
from fastchat_qlora.data.tokenization.truncation import truncate
from fastchat_qlora.model.loading.base_model import build_meta_model, keep_cpu_weights_trainable

DTYPE = torch.bfloat16
WEIGHT_DEVIATION = 0.02
"""A product of zeros would draw less power and run faster than one of weights."""

TEMPLATE_TOKENS = 5
"""Tokens that Llama 3's template adds to a message: the role between two special tokens, line ends, the end token."""


class Size(NamedTuple):
    """The sizes of a Llama."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    intermediate: int
    vocabulary: int

    @property
    def key_width(self) -> int:
        """Elements of a token's keys in one layer."""
        return self.hidden // self.heads * self.key_heads

    def config(self) -> LlamaConfig:
        """Return the configuration of such a model."""
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            max_position_embeddings=131072,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )


LLAMA_8B = Size(layers=32, hidden=4096, heads=32, key_heads=8, intermediate=14336, vocabulary=128256)
TINY = Size(layers=2, hidden=64, heads=4, key_heads=2, intermediate=128, vocabulary=512)


def quantization() -> BitsAndBytesConfig:
    """Return the configuration of NF4 with double quantization."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
    )


def make_base(size: Size, device: torch.device, *, quantized: bool, attention: str | None) -> PreTrainedModel:
    """Build a base model as it would be loaded; each weight is drawn on the device, and quantized before the next.

    Args:
        size: of the model.
        device: where it is built and stays.
        quantized: NF4 with double quantization for all linear layers but the head; else bf16.
        attention: its name in transformers; transformers' choice if None.
    """
    meta_model = build_meta_model(size.config())
    assert meta_model is not None
    model = meta_model.to(DTYPE)
    quantizer = None
    if quantized:
        from transformers.quantizers.auto import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(quantization(), pre_quantized=False)
        quantizer.preprocess_model(model, device_map=None)
    random = torch.Generator(device).manual_seed(SEED)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, _drawn(module, parameter, device, random))
    # Positions are worked out rather than loaded; in fp32 whatever the model computes in.
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        if device.type == "cuda":
            model.hf_device_map = {"": device.index or 0}  # as from_pretrained leaves it
    keep_cpu_weights_trainable(model)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def _drawn(
    module: torch.nn.Module, parameter: torch.nn.Parameter, device: torch.device, random: torch.Generator
) -> torch.nn.Parameter:
    """Return a parameter with values: ones for a norm, random ones else, quantized if it is to be."""
    if parameter.dim() == 1:
        return torch.nn.Parameter(torch.ones(parameter.shape, dtype=DTYPE, device=device), requires_grad=False)
    shape = (module.out_features, module.in_features) if isinstance(module, torch.nn.Linear) else parameter.shape
    values = torch.empty(shape, dtype=DTYPE, device=device).normal_(0, WEIGHT_DEVIATION, generator=random)
    if not hasattr(parameter, "quant_type"):
        return torch.nn.Parameter(values, requires_grad=False)
    four_bits = type(parameter)(
        values,
        requires_grad=False,
        quant_type=parameter.quant_type,
        compress_statistics=parameter.compress_statistics,
        quant_storage=parameter.quant_storage,
        module=module,
    )
    return four_bits.to(device)  # bitsandbytes quantizes here


class Conversations(torch.utils.data.Dataset[Any]):
    """Tokenized conversations in memory, with the interface of `datasets`, which need not be installed."""

    def __init__(self, conversations: Sequence[TokenizedConversation]) -> None:
        self._rows = [{"input_ids": one.input_ids, "labels": one.labels} for one in conversations]
        supervised = [int((one.labels[1:] != IGNORE_INDEX).sum()) for one in conversations]
        lengths = [len(one.input_ids) for one in conversations]
        records = range(len(lengths))
        self.data, self._indices = pa.table({"length": lengths, "supervised": supervised, "record": records}), None
        self.lengths = np.array(lengths)
        self.supervised_share = sum(supervised) / sum(lengths)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return several conversations, as a data set does."""
        return [self._rows[index] for index in indices]

    def packed(self, capacity: int) -> PackedDataset:
        """Return packed sequences of up to so many tokens."""
        return PackedDataset(self, PackingSampler(self.lengths, capacity, SEED))


def draw_conversations(
    count: int, max_length: int, vocabulary: int, *, scale: float = 1.0, seed: int = SEED
) -> Conversations:
    """Draw conversations as long as those of ShareGPT (see conversations.SHAPES), truncated as the program does.

    Args:
        count: number to draw; those without a supervised token before the cut are dropped, as the program does.
        max_length: most tokens of a conversation.
        vocabulary: of the random tokens.
        scale: of all lengths, for a small model.
        seed: of the random numbers.
    """
    random, shape = np.random.default_rng(seed), SHAPES["sharegpt"]

    def message(mean: float, sigma: float) -> int:
        # The mean of a log-normal distribution is exp(mu + sigma^2 / 2).
        return max(1, round(random.lognormal(np.log(mean * scale) - sigma**2 / 2, sigma)))

    def talk() -> TokenizedConversation:
        supervised: list[bool] = []
        ends = []
        for _ in range(min(shape.most_exchanges, int(random.geometric(1 / shape.mean_exchanges)))):
            supervised += [False] * (message(shape.user_tokens, shape.user_sigma) + 2 * TEMPLATE_TOKENS - 1)
            supervised += [True] * (message(shape.assistant_tokens, shape.assistant_sigma) + 1)  # the end token too
            ends.append(len(supervised))
        ids = random.integers(3, vocabulary, len(supervised), dtype=np.int32)
        return TokenizedConversation(
            ids, np.where(supervised, ids, IGNORE_INDEX).astype(np.int32), ends, len(supervised)
        )

    drawn = [talk() for _ in range(count)]
    fitting = [one for one in drawn if (one.labels[:max_length] != IGNORE_INDEX).any()]
    return Conversations([truncate(one, max_length) for one in fitting])
