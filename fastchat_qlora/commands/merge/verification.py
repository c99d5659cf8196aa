"""Whether two models say the same: their logits on a few conversations."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template

TURNS = (
    ("Who are you?", "I am an assistant. What would you like to know?"),
    ("What is the capital of France?", "The capital of France is Paris, which lies on the Seine."),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Count to five, please.", "One, two, three, four, five."),
)
"""Questions and answers; what they say matters little, as every position of them is compared."""


class Difference(NamedTuple):
    """How far one model's predictions are from another's.

    Attributes:
        positions: how many were compared.
        largest: difference of two logits.
        divergence: Kullback-Leibler divergence, the mean over positions, in nats.
        agreement: share of positions at which the likeliest token is the same.
    """

    positions: int
    largest: float
    divergence: float
    agreement: float


LONGEST = 512
"""Tokens of a conversation that are compared; a few templates put a manual in front of each."""


def make_test_sequences(tokenizer: Any, context: int | None) -> list[torch.Tensor]:
    """The conversations as token ids of shape (1, tokens), by the chat template if there is one.

    Args:
        tokenizer: of the model.
        context: tokens that the model has positions for; None if there is no limit.
    """
    texts = [text for question, answer in TURNS if (text := _render(tokenizer, question, answer)) is not None]
    texts = texts or [f"{question}\n{answer}" for question, answer in TURNS]
    rows = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
    return [row[:, : min(LONGEST, context or LONGEST)] for row in rows]


def _render(tokenizer: Any, question: str, answer: str) -> str | None:
    """Return a conversation of one turn as text; None without a chat template, or where it refuses."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        return render_chat_template(tokenizer, messages)
    except TemplateRefusal:
        return None


@torch.inference_mode()
def get_logits(model: Any, rows: Iterable[torch.Tensor], *, adapter: bool = True) -> list[torch.Tensor]:
    """Logits at every position, in fp32 on the CPU.

    Args:
        model: in evaluation mode.
        rows: token ids of shape (1, tokens).
        adapter: False leaves an adapter aside.

    Returns:
        For each row shape (tokens, vocabulary).
    """
    with nullcontext() if adapter else model.disable_adapter():
        return [model(input_ids=row.to(model.device)).logits[0].float().cpu() for row in rows]


def compare(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> Difference:
    """The second against the first.

    Args:
        some: logits of shape (tokens, vocabulary) for each row.
        others: of the same shapes.
    """
    first, second = torch.cat(list(some)), torch.cat(list(others))
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp(min=0)
    return Difference(
        positions=len(first),
        largest=float((first - second).abs().max()),
        divergence=float(divergence),
        agreement=float((first.argmax(-1) == second.argmax(-1)).float().mean()),
    )
