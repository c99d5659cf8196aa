"""Before the first step: are conversations kept apart, and is the loss the loss? Asked of the run's model and data."""

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.data.batching.packing import PackedDataset, get_column
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.ops.attention import get_default_attention
from fastchat_qlora.model.ops.attention_checks import measure_leakage
from fastchat_qlora.model.ops.chunked_loss import token_losses
from fastchat_qlora.training.trainer import TARGETS, LoraTrainer
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

TOKENS = 128
"""Of each conversation, unless the model attends to a window: then as many as show that it does, up to LONGEST."""
LONGEST = 1024


class Failures(NamedTuple):
    """What is wrong with rows without padding, and with the loss head; empty where nothing is."""

    rows: str
    loss: str


class SanityCheck(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Under DeepSpeed and FSDP weights are where they can be computed with once training begins: the test is then."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop if the test fails, since the batches are laid out by now; every process takes part."""
        trainer = self._trainer
        if not _is_wrapped_late(trainer):
            return
        failures = find_failures(trainer, trainer.model_wrapped)
        if failures.rows:
            raise RunError(f"{failures.rows}; start again with --padding_free False")
        _fall_back(trainer, failures)


def run_sanity_check(trainer: LoraTrainer) -> None:
    """Test, and go on with padded batches or the plain loss where that fails, and say so."""
    if not _is_wrapped_late(trainer):
        if trainer.args.bf16_full_eval or trainer.args.fp16_full_eval:
            # With these flags Trainer leaves the model where it was loaded until training begins.
            trainer._move_model_to_device(trainer.model, trainer.args.device)
        _fall_back(trainer, find_failures(trainer, trainer.model))


def _is_wrapped_late(trainer: LoraTrainer) -> bool:
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def _fall_back(trainer: LoraTrainer, failures: Failures) -> None:
    if failures.rows:
        packing = isinstance(trainer.train_dataset, PackedDataset)
        logger.warning(
            f"Batches are padded{' and rows not packed' if packing else ''}, slower and larger than they could be: "
            f"{failures.rows}."
        )
        trainer.data_collator.padding_free = False
        if packing:
            trainer.train_dataset = trainer.train_dataset.conversations
        base = trainer.adapter.get_base_model()
        base.set_attn_implementation(get_default_attention(base))
    if failures.loss:
        trainer.use_plain_loss(failures.loss)


def find_failures(trainer: LoraTrainer, forward: torch.nn.Module) -> Failures:
    """Run the model on two conversations of the data.

    Args:
        trainer: set up; its model on its device.
        forward: the model, or what a strategy has wrapped around it.
    """
    first, second = _two_conversations(trainer)
    was_training = forward.training
    forward.eval()
    device, dtype = trainer.args.device.type, torch.float16 if trainer.args.fp16 else torch.bfloat16
    try:
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=trainer.accelerator.native_amp):
            rows = _test_rows(trainer, forward, first, second) if trainer.data_collator.padding_free else ""
            loss = _test_loss(trainer, forward, [first, second]) if trainer.loss_head else ""
        return _agreed(Failures(rows, loss))
    finally:
        forward.train(was_training)


def _agreed(found: Failures) -> Failures:
    """The first reason that any process has found: they must all go on in the same way."""
    everyone = gather_object([found]) if dist.is_initialized() else [found]
    return Failures(*(next((reason for reason in reasons if reason), "") for reasons in zip(*everyone, strict=True)))


def _two_conversations(trainer: LoraTrainer) -> list[list[int]]:
    """The first conversation and the longest one, cut short."""
    data = trainer.train_dataset
    conversations = data.conversations if isinstance(data, PackedDataset) else data
    longest = int(np.argmax(get_column(conversations, "length")))
    window = getattr(trainer.adapter.config.get_text_config(), "sliding_window", None) or 0
    most = window + 32 if window + 32 <= LONGEST else TOKENS
    return [list(conversations[index]["input_ids"])[: max(most, TOKENS)] for index in (0, longest)]


def _batch(trainer: LoraTrainer, conversations: list[list[int]]) -> dict[str, Any]:
    rows = [{"input_ids": ids, "labels": ids} for ids in conversations]
    batch: dict[str, Any] = trainer._prepare_inputs(trainer.data_collator(rows))
    return batch


def _test_rows(trainer: LoraTrainer, forward: torch.nn.Module, first: list[int], second: list[int]) -> str:
    model = trainer.adapter.get_base_model()
    shared, changed = (trainer.model_inputs(_batch(trainer, [neighbour, second])) for neighbour in (first, first[::-1]))
    try:
        leak = measure_leakage(model, shared, changed, torch.tensor([second], device=trainer.args.device), forward)
    except Exception as error:  # models fail in as many ways as there are authors
        return f"the model cannot be asked for rows without padding: {one_line(error, 300)}"
    if leak.is_tight(model.dtype):
        return ""
    return (
        f"conversations in one row are not kept apart: logits change by {leak.by_neighbour:.1e} with the conversation "
        f"before, and by {leak.by_row:.1e} against a row of their own"
    )


def _test_loss(trainer: LoraTrainer, forward: torch.nn.Module, conversations: list[list[int]]) -> str:
    assert trainer.loss_head is not None
    batch = _batch(trainer, conversations)
    targets = {name: batch[name] for name in TARGETS}
    try:
        with trainer.loss_head.expecting(**targets):
            losses = forward(**trainer.model_inputs(batch)).logits.flatten()
        plain = token_losses(forward(**trainer.model_inputs(batch)).logits, **targets)
        difference = float((losses - plain).norm() / plain.norm())
    except Exception as error:
        return f"the model cannot be asked for losses: {one_line(error, 300)}"
    rounding = torch.finfo(trainer.adapter.get_base_model().dtype).eps
    if difference <= max(4 * rounding, 1e-5):
        return ""
    return f"the model changes its logits behind the head, losses differ by {difference:.1e}"
