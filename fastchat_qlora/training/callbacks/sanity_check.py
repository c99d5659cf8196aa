"""Check of layout, causality and loss head before the first step, on the run's data."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from fastchat_qlora.data.batching.packing import PackedDataset, get_column
from fastchat_qlora.data.batching.prefix_index import LEAST_SHARED
from fastchat_qlora.data.batching.prefix_tree import match_beginnings
from fastchat_qlora.data.batching.steps import get_sequences
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.attention.attention import PER_CONVERSATION, get_default_attention
from fastchat_qlora.model.attention.attention_checks import (
    Probe,
    TreeProbe,
    is_rounding_by_row,
    measure_influence,
    measure_leakage,
    measure_row,
    measure_tree,
)
from fastchat_qlora.model.attention.recurrent_layers import has_recurrent_layers
from fastchat_qlora.model.loading.auto_class import get_text_attention
from fastchat_qlora.model.ops.chunked_loss import LossHead, compute_token_losses
from fastchat_qlora.model.ops.cpu_products import LEAST_ROWS, get_product_dtype
from fastchat_qlora.training.trainer import TARGET_COPIES, TARGET_NAMES, LoraTrainer
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

CHECKED_TOKENS, CHECKED_TOKENS_ON_CPU, MAX_CHECKED_TOKENS = 128, 16, 1024
"""Tokens of each conversation, see `_count_checked`; the last are the most, for a window."""


class SanityCheck(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback for the check under DeepSpeed and FSDP, whose models cannot run before training begins."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Stop if padding-free batches fail, which cannot be changed any more; every process takes part."""
        if self._trainer.is_wrapped_late:
            _check(self._trainer)


def run_sanity_check(trainer: LoraTrainer) -> None:
    """Run the check, and fall back to another attention or layout, or to the plain loss, where it fails."""
    if not trainer.is_wrapped_late:
        if trainer.args.bf16_full_eval or trainer.args.fp16_full_eval:
            # With these flags Trainer leaves the model where it was loaded until training begins.
            trainer._move_model_to_device(trainer.model, trainer.args.device)
        _check(trainer)


def _check(trainer: LoraTrainer) -> None:
    conversations = _choose_conversations(trainer)
    with trainer.inference() as model:
        is_sound = not _agree(_find_doubt(trainer, model, *conversations))
        if trainer.data_collator.padding_free and not is_sound:
            _settle_layout(trainer, model, *conversations)
        if trainer.data_collator.padding_free and trainer.data_collator.share_prefixes:
            _settle_sharing(trainer, model, _choose_alike(trainer, conversations[1]))
        if not is_sound:
            _require_causality(trainer, model, conversations[1])
        checks_loss = trainer.loss_head and not is_sound
        loss = _agree(find_loss_failure(trainer, model, conversations)) if checks_loss else ""
    if loss:
        trainer.use_plain_loss(loss)


def _agree(reason: str) -> str:
    """Return the first reason that any process has found: all must fall back alike."""
    return next((found for found in gather_object([reason]) if found), "")


def _settle_layout(trainer: LoraTrainer, forward: torch.nn.Module, first: list[int], second: list[int]) -> None:
    """Set an attention that keeps conversations apart, or pad."""
    base = trainer.adapter.get_base_model()
    tried = dict.fromkeys((base.config._attn_implementation, PER_CONVERSATION, get_default_attention(base)))
    reasons = [reason] if (reason := _find_scaling_by_row(trainer)) else []
    for attention in () if reasons else tried:
        base.set_attn_implementation(get_text_attention(base.config, attention))
        reason = _agree(find_leak(trainer, forward, first, second))
        if not reason:
            if reasons:
                logger.warning(f"Attention is {attention}, the first to pass: {reasons[0]}.")
            return
        reasons.append(reason)
    if trainer.is_wrapped_late:
        raise RunError(f"{reasons[0]}; start again with --padding_free False")
    base.set_attn_implementation(get_text_attention(base.config, get_default_attention(base)))
    _pad(trainer, reasons[0])


def _settle_sharing(trainer: LoraTrainer, forward: torch.nn.Module, sequences: list[list[int]]) -> None:
    """Stop sharing if the prefix tree of these sequences has other logits."""
    attention = trainer.adapter.config._attn_implementation
    reason = f"attention {attention} takes no prefix tree" if attention != PER_CONVERSATION else ""
    reason = reason or _agree(find_tree_failure(trainer, forward, sequences))
    if reason:
        _separate(trainer, reason)


def _separate(trainer: LoraTrainer, reason: str) -> None:
    """Stop sharing, and pack again by length what was packed by what it would have computed."""
    _allow_separation(trainer, reason)
    index, data, again = trainer.cutting.prefixes, trainer.train_dataset, ""
    if index is not None and index.shared.any():
        if trainer.is_wrapped_late:  # steps are planned already
            raise RunError(f"{reason}; start again with --share_prefixes False")
        if isinstance(data, PackedDataset):
            trainer.train_dataset = PackedDataset(data.conversations, data.sampler.without_sharing())
            again = f", and packed again ({len(trainer.train_dataset):,} packed sequences in place of {len(data):,})"
    trainer.data_collator.share_prefixes = False
    logger.warning(
        f"Sequences that begin alike are computed each by itself{again}, slower than they could be: {reason}."
    )


def _allow_separation(trainer: LoraTrainer, reason: str) -> None:
    """Raise RunError if the run is to share what sequences begin with, or to stop."""
    if trainer.cutting.must_share:
        raise RunError(f"--share_prefixes True: is not possible: {reason}; leave it on auto")


def _find_scaling_by_row(trainer: LoraTrainer) -> str:
    """Return why a token's place in its row matters, not that in its conversation; empty if it does not.

    Llama 4 (transformers 5.23, `Llama4TextAttention.forward`) scales queries by their place in the row, from
    `floor_scale` tokens on. This can go once it takes the position ids.
    """
    text = trainer.adapter.config.get_text_config()
    first = getattr(text, "floor_scale", 0) if getattr(text, "attn_temperature_tuning", False) else 0
    if 0 < first <= trainer.largest_pass:
        return f"the model scales attention by the place in a row, from token {first} on"
    return ""


def _pad(trainer: LoraTrainer, reason: str) -> None:
    _allow_separation(trainer, reason)
    packing = isinstance(trainer.train_dataset, PackedDataset)
    logger.warning(
        f"Batches are padded{' and sequences not packed' if packing else ''}, slower and larger than they could "
        f"be: {reason}."
    )
    trainer.data_collator.padding_free = False
    if packing:
        trainer.train_dataset = trainer.train_dataset.conversations


def _choose_conversations(trainer: LoraTrainer) -> list[list[int]]:
    """Return the first conversation and the longest one, cut short."""
    conversations = get_sequences(trainer.train_dataset)
    longest = int(np.argmax(get_column(conversations, "length")))
    return [list(conversations[index]["input_ids"])[: _count_checked(trainer)] for index in (0, longest)]


def _count_checked(trainer: LoraTrainer) -> int:
    """Return the tokens of each conversation that are checked: few on a CPU, where they take seconds.

    They must be more for a sliding window, behind which a token is to be hidden, for layers that carry a state, which
    compute in chunks of 64 tokens, and for products in fp32, which few rows do not take. With more than that a model
    does nothing else, up to the thousands at which some choose other factors of their positions or select keys.
    """
    text = trainer.adapter.config.get_text_config()
    window = getattr(text, "sliding_window", None) or 0
    is_short = trainer.args.device.type == "cpu" and not has_recurrent_layers(trainer.adapter)
    dtype = trainer.adapter.dtype
    few = CHECKED_TOKENS_ON_CPU if get_product_dtype(dtype, trainer.args.device) == dtype else LEAST_ROWS
    tokens = few if is_short else CHECKED_TOKENS
    return int(max(tokens, window + 32) if 0 < window <= MAX_CHECKED_TOKENS - 32 else tokens)


def _choose_alike(trainer: LoraTrainer, conversation: list[int]) -> list[list[int]]:
    """Return two sequences that begin alike, of the data if there are any, and a third that leaves the first one later.

    They are cut to some tokens before and after the place where they part.
    """
    tokens, parted = _count_checked(trainer), np.empty(0, dtype=np.int64)
    index = trainer.cutting.prefixes
    if index is not None and index.shared.any():
        rows, most = get_sequences(trainer.train_dataset), int(index.shared.argmax())
        pair = [np.asarray(rows[int(row)]["input_ids"]) for row in np.argsort(index.rank)[most - 1 : most + 1]]
        pair.sort(key=len, reverse=True)  # stable
        parted = np.flatnonzero(pair[0][: len(pair[1])] != pair[1])
    if len(parted) and parted[0] + 1 < len(pair[0]):
        start = max(0, int(parted[0]) - tokens // 2)
        place = int(parted[0]) - start
        first, second = (ids[start : start + tokens].tolist() for ids in pair)
    else:  # nothing begins alike, one is the beginning of the other, or they part at their last tokens
        first, place = (conversation * tokens)[:tokens], tokens // 2
        second = _change(first, place)
    return [first, second, _change(first, (place + len(first)) // 2)]


def _change(sequence: list[int], start: int, by: int = 1) -> list[int]:
    """Return a sequence with other tokens from a place on."""
    return sequence[:start] + [token - by if token >= by else token + by for token in sequence[start:]]


def _find_doubt(trainer: LoraTrainer, forward: torch.nn.Module, first: list[int], second: list[int]) -> str:
    """Return why three passes do not show layout, causality and losses to be right at once; empty if they do.

    In the second pass another conversation stands before, the last token is another one, and the head returns losses.
    So all other tokens of the second conversation must give it the same hidden states, to the bit. Where rounding moves
    them, as in mixtures of experts, or something is wrong, each is checked by itself.
    """
    if not trainer.data_collator.padding_free or not trainer.loss_head or _find_scaling_by_row(trainer):
        return "there are no losses end to end"
    model = trainer.adapter.get_base_model()
    batches = [trainer.build_batch([first, second]), trainer.build_batch([first[::-1], _change_last(second)])]
    own = slice(len(first), len(first) + len(second) - 1)
    try:
        with _recording(trainer.loss_head) as record:
            logits = forward(**trainer.model_inputs(batches[0])).logits
            returned = _compute_with_head(trainer, forward, batches[1])
        (before, _), (after, given) = record
        # Before any comparison: under ZeRO-3 and FSDP2 all processes need the same number of passes.
        alone = torch.tensor([second], device=trainer.args.device)
        by_row = measure_row(model, logits[0, len(first) :].float(), alone, forward)
        if not torch.equal(before.flatten(0, -2)[own], after.flatten(0, -2)[own]):
            return "logits move"
    except Exception as error:  # untrusted code of a model may raise anything
        return one_line(error, 300)
    if not is_rounding_by_row(by_row, model.dtype):
        return "logits move"
    supervised = batches[1]["supervised"]
    is_own = (supervised >= own.start) & (supervised < own.stop)
    plain = compute_token_losses(logits, **{name: batches[1][name][is_own] for name in TARGET_NAMES})
    return _compare_losses(trainer, returned, given, plain, is_own)


def find_leak(trainer: LoraTrainer, forward: torch.nn.Module, first: list[int], second: list[int]) -> str:
    """Return how the second conversation's logits change with the one before it in its row; empty if they do not."""
    model, device = trainer.adapter.get_base_model(), trainer.args.device
    batches = [trainer.model_inputs(trainer.build_batch([neighbor, second])) for neighbor in (first, first[::-1])]
    positions = torch.arange(len(first) + len(second), device=device)
    probe = Probe(batches[0], batches[1], positions[: len(first)], positions[len(first) :])
    try:
        alone = torch.tensor([second], device=device)
        leak = measure_leakage(model, probe, alone, forward, differentiable=not trainer.is_wrapped_late)
    except Exception as error:  # untrusted code of a model may raise anything
        return f"the model cannot run on padding-free batches: {one_line(error, 300)}"
    if leak.is_tight(model.dtype):
        return ""
    return (
        f"conversations in one batch are not kept apart: logits change by {leak.by_neighbor.change:.1e} with the "
        f"conversation before, and by {leak.by_row:.1e} against a batch of its own"
    )


def find_tree_failure(trainer: LoraTrainer, forward: torch.nn.Module, sequences: list[list[int]]) -> str:
    """Return how the logits of a prefix tree differ from those of its sequences; empty if they do not.

    Of the three sequences, the branch of the second one is its own, and is changed.
    """
    model, (first, second, third) = trainer.adapter.get_base_model(), sequences
    parted, left = (match_beginnings(*map(np.asarray, (first, one))) for one in (second, third))
    other = next(changed for by in (1, 2) if (changed := _change(second, parted, by))[parted] != first[parted])
    least = min(LEAST_SHARED, max(1, left - parted))  # of short sequences there is a tree as well
    trees = [trainer.build_batch([first, ids, third], least_shared=least) for ids in (second, other)]
    separate = trainer.build_batch(sequences)
    differs = (trees[0]["input_ids"] != trees[1]["input_ids"])[0]
    inputs = [trainer.model_inputs(batch) for batch in (*trees, separate)]
    trees_probe = Probe(inputs[0], inputs[1], differs.nonzero()[:, 0], (~differs).nonzero()[:, 0])
    places = trees[0]["supervised"][trees[0][TARGET_COPIES]], separate["supervised"]
    try:
        probe = TreeProbe(trees_probe, inputs[2], *places)
        found = measure_tree(model, probe, forward, differentiable=not trainer.is_wrapped_late)
    except Exception as error:  # untrusted code of a model may raise anything
        return f"the model cannot run on prefix trees: {one_line(error, 300)}"
    if found.is_tight(model.dtype):
        return ""
    return (
        f"the logits of a prefix tree change by {found.by_row:.1e} against those of its sequences, and by "
        f"{found.by_neighbor.change:.1e} with another branch"
    )


def _require_causality(trainer: LoraTrainer, forward: torch.nn.Module, conversation: list[int]) -> None:
    """Raise RunError if the last token has an influence on the logits of those before it."""
    if change := _agree(_find_foresight(trainer, forward, conversation)):
        name = trainer.adapter.get_base_model().name_or_path
        raise RunError(
            f"--model_name_or_path {name}: the last token of a conversation changes the logits before it (by {change}),"
            " so the model would see the answers that it is to predict; use a model for causal language modeling"
        )


def _find_foresight(trainer: LoraTrainer, forward: torch.nn.Module, conversation: list[int]) -> str:
    """Return how much logits change with a later token; empty if they do not."""
    model = trainer.adapter.get_base_model()
    both = conversation, _change_last(conversation)
    batches = [trainer.model_inputs(trainer.build_batch([ids])) for ids in both]
    is_token = batches[0].get("attention_mask", torch.ones_like(batches[0]["input_ids"])).flatten()
    positions = is_token.nonzero()[:, 0]
    probe = Probe(batches[0], batches[1], positions[-1:], positions[:-1])
    try:
        influence = measure_influence(model, probe, forward, differentiable=not trainer.is_wrapped_late)
    except Exception as error:  # the first step will fail with it, or not
        logger.warning(f"Whether the model sees later tokens is not checked: {one_line(error, 300)}.")
        return ""
    # Without numbers there is nothing to tell; the first step reports them.
    in_8_bits = getattr(model, "is_loaded_in_8bit", False)
    is_causal = influence.is_rounding(model.dtype, in_8_bits=in_8_bits) or math.isnan(influence.change)
    return "" if is_causal else f"{influence.change:.1e}"


def _change_last(conversation: list[int]) -> list[int]:
    return [*conversation[:-1], abs(conversation[-1] - 1)]


def find_loss_failure(trainer: LoraTrainer, forward: torch.nn.Module, conversations: list[list[int]]) -> str:
    """Return how the losses of the loss head differ from those of the model's logits; empty if they do not."""
    batch = trainer.build_batch(conversations)
    assert trainer.loss_head is not None
    try:
        with _recording(trainer.loss_head) as record:
            returned = _compute_with_head(trainer, forward, batch)
        logits = forward(**trainer.model_inputs(batch)).logits
        plain = compute_token_losses(logits, **{name: batch[name] for name in TARGET_NAMES})
        return _compare_losses(trainer, returned, record[0][1], plain, torch.ones_like(plain, dtype=torch.bool))
    except Exception as error:
        return f"the model cannot compute losses with the loss head: {one_line(error, 300)}"


@contextmanager
def _recording(head: LossHead) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Yield a list of what the head takes and returns in the block."""
    record: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = head.register_forward_hook(lambda *call: record.append((call[1][0], call[2].flatten())))
    try:
        yield record
    finally:
        hook.remove()


def _compute_with_head(trainer: LoraTrainer, forward: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Return what the model makes of the loss head's losses, shape (targets,)."""
    assert trainer.loss_head is not None
    with trainer.loss_head.expecting(**{name: batch[name] for name in TARGET_NAMES}):
        return forward(**trainer.model_inputs(batch)).logits.flatten()  # type: ignore[no-any-return]


def _compare_losses(
    trainer: LoraTrainer, returned: torch.Tensor, given: torch.Tensor, plain: torch.Tensor, is_target: torch.Tensor
) -> str:
    """Return how losses of the head differ from plain ones; empty if they do not.

    Args:
        returned, given: by the model and by its head, shape (targets,).
        plain: the losses of some of the targets.
        is_target: which they are, shape (targets,).
    """
    assert trainer.loss_head is not None
    # Losses are in fp32, so that this tells in every dtype what the model does to logits.
    is_scaled_so = torch.allclose(returned, given * trainer.loss_head.transform.scale, rtol=1e-5, atol=0)
    losses = trainer.loss_head.read_losses(returned)[is_target]
    difference = float((losses - plain).norm() / plain.norm())
    rounding = torch.finfo(trainer.adapter.get_base_model().dtype).eps
    if is_scaled_so and difference <= max(4 * rounding, 1e-5):
        return ""
    return f"the model changes its logits after the head, losses differ by {difference:.1e}"
