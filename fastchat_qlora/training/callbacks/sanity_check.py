"""Check of attention and loss head before the first step, on the run's data."""

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from fastchat_qlora.data.batching.packing import PackedDataset, get_column
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.loading.auto_class import get_text_attention
from fastchat_qlora.model.ops.attention import get_default_attention
from fastchat_qlora.model.ops.attention_checks import measure_leakage
from fastchat_qlora.model.ops.chunked_loss import compute_token_losses
from fastchat_qlora.training.trainer import TARGET_NAMES, LoraTrainer
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 128
"""Tokens of each conversation; for a model with sliding windows as many as exceed a window, up to the next constant."""
MAX_CHECKED_TOKENS = 1024


class Failures(NamedTuple):
    """Faults of padding-free batches, and of the loss head; empty if there are none."""

    padding_free: str
    loss: str


class SanityCheck(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback for the check under DeepSpeed and FSDP, whose models cannot run before training begins."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Stop if padding-free batches fail, which cannot be changed any more; every process takes part."""
        trainer = self._trainer
        if not trainer.is_wrapped_late:
            return
        failures = find_failures(trainer)
        if failures.padding_free:
            raise RunError(f"{failures.padding_free}; start again with --padding_free False")
        _fall_back(trainer, failures)


def run_sanity_check(trainer: LoraTrainer) -> None:
    """Run the check, and fall back to padded batches or the plain loss if it fails."""
    if not trainer.is_wrapped_late:
        if trainer.args.bf16_full_eval or trainer.args.fp16_full_eval:
            # With these flags Trainer leaves the model where it was loaded until training begins.
            trainer._move_model_to_device(trainer.model, trainer.args.device)
        _fall_back(trainer, find_failures(trainer))


def _fall_back(trainer: LoraTrainer, failures: Failures) -> None:
    if failures.padding_free:
        packing = isinstance(trainer.train_dataset, PackedDataset)
        logger.warning(
            f"Batches are padded{' and sequences not packed' if packing else ''}, slower and larger than they could "
            f"be: {failures.padding_free}."
        )
        trainer.data_collator.padding_free = False
        if packing:
            trainer.train_dataset = trainer.train_dataset.conversations
        base = trainer.adapter.get_base_model()
        base.set_attn_implementation(get_text_attention(base.config, get_default_attention(base)))
    if failures.loss:
        trainer.use_plain_loss(failures.loss)


def find_failures(trainer: LoraTrainer) -> Failures:
    """Run the model on two conversations of the data, and return what is wrong."""
    conversations = _choose_conversations(trainer)
    with trainer.inference() as model:
        leak = _check_padding_free(trainer, model, *conversations) if trainer.data_collator.padding_free else ""
        loss = _check_loss(trainer, model, conversations) if trainer.loss_head else ""
    return _agree_on_failures(Failures(leak, loss))


def _agree_on_failures(found: Failures) -> Failures:
    """Return the first reason that any process has found: all must fall back alike."""
    everyone = zip(*gather_object([found]), strict=True)
    return Failures(*(next((reason for reason in reasons if reason), "") for reasons in everyone))


def _choose_conversations(trainer: LoraTrainer) -> list[list[int]]:
    """Return the first conversation and the longest one, cut short."""
    data = trainer.train_dataset
    conversations = data.conversations if isinstance(data, PackedDataset) else data
    longest = int(np.argmax(get_column(conversations, "length")))
    window = getattr(trainer.adapter.config.get_text_config(), "sliding_window", None) or 0
    tokens = window + 32 if window + 32 <= MAX_CHECKED_TOKENS else CHECKED_TOKENS
    return [list(conversations[index]["input_ids"])[: max(tokens, CHECKED_TOKENS)] for index in (0, longest)]


def _check_padding_free(trainer: LoraTrainer, forward: torch.nn.Module, first: list[int], second: list[int]) -> str:
    """Return how the second conversation's logits change with the one before it in its row; empty if they do not."""
    model = trainer.adapter.get_base_model()
    neighbors = (first, first[::-1])
    shared, changed = (trainer.model_inputs(trainer.build_batch([neighbor, second])) for neighbor in neighbors)
    try:
        leak = measure_leakage(model, shared, changed, torch.tensor([second], device=trainer.args.device), forward)
    except Exception as error:  # untrusted code of a model may raise anything
        return f"the model cannot run on padding-free batches: {one_line(error, 300)}"
    if leak.is_tight(model.dtype):
        return ""
    return (
        f"conversations in one batch are not kept apart: logits change by {leak.by_neighbor:.1e} with the conversation "
        f"before, and by {leak.by_row:.1e} against a batch of its own"
    )


def _check_loss(trainer: LoraTrainer, forward: torch.nn.Module, conversations: list[list[int]]) -> str:
    """Return how the losses of the loss head differ from those of the model's logits; empty if they do not."""
    assert trainer.loss_head is not None
    batch = trainer.build_batch(conversations)
    targets = {name: batch[name] for name in TARGET_NAMES}
    try:
        with trainer.loss_head.expecting(**targets):
            losses = forward(**trainer.model_inputs(batch)).logits.flatten()
        plain = compute_token_losses(forward(**trainer.model_inputs(batch)).logits, **targets)
        difference = float((losses - plain).norm() / plain.norm())
    except Exception as error:
        return f"the model cannot compute losses with the loss head: {one_line(error, 300)}"
    rounding = torch.finfo(trainer.adapter.get_base_model().dtype).eps
    if difference <= max(4 * rounding, 1e-5):
        return ""
    return f"the model changes its logits after the head, losses differ by {difference:.1e}"
