"""The merged model and the base model with its adapter -> whether they predict the same."""

import gc
import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastchat_qlora.commands.load_adapter import TrainedAdapter, get_device, load_with_adapter
from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.loading.auto_class import get_auto_class
from fastchat_qlora.model.loading.base_model import get_context_length

logger = logging.getLogger(__name__)

TEST_TURNS = (
    ("Who are you?", "I am an assistant. What would you like to know?"),
    ("What is the capital of France?", "The capital of France is Paris, which lies on the Seine."),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Count to five, please.", "One, two, three, four, five."),
)
"""Questions and answers; their content matters little, since every position is compared."""

MAX_TEST_TOKENS = 512  # of a conversation: a few templates put a manual in front of each

ROUNDING_NATS = {torch.float32: 1e-4, torch.bfloat16: 0.01, torch.float16: 0.003}
"""Divergence that rounding to a dtype may cause; SmolLM2-135M in bfloat16 has 0.002."""

INT8_ROUNDING_NATS = 0.1  # only the base model rounds activations to 8 bits; SmolLM2-135M has 0.04 to 0.06
MAX_EFFECT_SHARE, MAX_NATS = 0.1, 0.05
"""Divergence that is allowed beyond rounding: a share of the adapter's own effect, and a limit of that share."""


class Difference(NamedTuple):
    """The difference of two models' predictions."""

    positions: int
    largest: float  # absolute difference of logits
    divergence: float  # Kullback-Leibler, in nats, mean of all positions
    agreement: float  # share of positions with the same most likely token


def verify_merge(adapter: TrainedAdapter, folder: Path) -> None:
    """Compare the logits of the merged model and the base model with its adapter; RunError if they differ too much."""
    sequences = make_test_sequences(adapter.tokenizer, get_context_length(adapter.config))
    model = load_with_adapter(adapter)
    expected, base = get_logits(model, sequences), get_logits(model, sequences, adapter=False)
    del model
    gc.collect()
    effect = compare_logits(expected, base).divergence
    del base
    merged = get_auto_class(adapter.config).from_pretrained(
        folder,
        dtype=adapter.precision.dtype,
        trust_remote_code=adapter.model_args.trust_remote_code,
        use_safetensors=True,
    )
    difference = compare_logits(expected, get_logits(merged.to(get_device()).eval(), sequences))
    dtypes = {adapter.precision.dtype, adapter.config.dtype, merged.config.dtype} & ROUNDING_NATS.keys()
    rounding = max(ROUNDING_NATS[dtype] for dtype in dtypes)
    if adapter.precision.quantization.kind == "int8":
        rounding = max(rounding, INT8_ROUNDING_NATS)
    _check_difference(difference, effect, rounding)


def _check_difference(difference: Difference, effect: float, rounding: float) -> None:
    """Log a difference, and check that it is explained by rounding and smaller than the adapter's effect, in nats."""
    limit = max(rounding, min(MAX_EFFECT_SHARE * effect, MAX_NATS))
    logger.info(
        f"Merged model compared with base model and adapter at {difference.positions} positions: logits differ by at "
        f"most {difference.largest:.3g}, the most likely token is the same at {difference.agreement:.1%}, the "
        f"divergence is {difference.divergence:.2g} nats (limit {limit:.2g}; without the adapter {effect:.2g})."
    )
    has_adapter = difference.divergence < effect / 2  # is nearer to the model with the adapter than to the base model
    if not difference.divergence <= limit or (effect > rounding and not has_adapter):
        raise RunError(
            f"the merged model is not the base model with its adapter: their predictions diverge by "
            f"{difference.divergence:.3g} nats, at most {min(limit, effect / 2):.2g} is allowed; nothing was written. "
            "To write it anyway, give --verify False"
        )
    if not has_adapter:
        logger.warning(
            f"Not verified: the adapter changes the predictions by {effect:.2g} nats, no more than rounding may, so a "
            "merged model with it cannot be told from one without it."
        )


def make_test_sequences(tokenizer: Any, context_length: int | None) -> list[torch.Tensor]:
    """Return test conversations as token ids of shape (1, tokens), by the chat template if it can be used."""
    conversations = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in TEST_TURNS
    ]
    try:
        texts = [render_chat_template(tokenizer, messages) for messages in conversations]
    except TemplateRefusal:
        texts = ["\n".join(turn) for turn in TEST_TURNS]
    length = min(MAX_TEST_TOKENS, context_length or MAX_TEST_TOKENS)
    return [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :length] for text in texts]


@torch.inference_mode()
def get_logits(model: Any, sequences: Iterable[torch.Tensor], *, adapter: bool = True) -> list[torch.Tensor]:
    """Return a model's logits for token ids of shape (1, tokens): in fp32, on the CPU, shape (tokens, vocabulary)."""
    with nullcontext() if adapter else model.disable_adapter():
        return [model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu() for ids in sequences]


def compare_logits(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> Difference:
    """Return the difference of logits of shape (tokens, vocabulary) for each sequence."""
    first, second = torch.cat(list(expected)), torch.cat(list(found))
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp(min=0)
    return Difference(
        positions=len(first),
        largest=float((first - second).abs().max()),
        divergence=float(divergence),
        agreement=float((first.argmax(-1) == second.argmax(-1)).float().mean()),
    )
