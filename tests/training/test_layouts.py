"""In every layout, each conversation is trained on as if by itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import (
    FAMILIES,
    WINDOW,
    conversation,
    make_base,
    make_quantized_base,
    make_trainer,
    our_peft,
    plain_peft,
    weighted,
)
from hybrids import HYBRIDS, SINKS, make_hybrid
from peft import PeftModel

from fastchat_qlora.data.batching.packing import PackingSampler
from fastchat_qlora.model.attention.attention import PER_CONVERSATION
from fastchat_qlora.model.ops.chunked_loss import LossHead
from fastchat_qlora.training.trainer import LoraTrainer

CONVERSATIONS = [conversation(length, seed) for seed, length in enumerate((23, 4, 17, 9, 2))]
LAYOUTS = {
    "packed": (PER_CONVERSATION, "end to end"),
    "padding-free": (PER_CONVERSATION, "end to end"),
    "transformers' masks": (None, "end to end"),
    "padded on the right": (None, "padded on the right"),
    "padded on the left": (None, "padded on the left"),
}
CHECKPOINTING = {
    "kept": None,
    "checkpointed": {"use_reentrant": False},
}
LossAndGradients = tuple[torch.Tensor, dict[str, torch.Tensor]]


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def truth(model: PeftModel, rows: Sequence[dict[str, Any]] = CONVERSATIONS) -> LossAndGradients:
    """Return loss and gradients of transformers and PEFT, conversation by conversation."""
    losses, targets = [], 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        weights = torch.tensor(row.get("weights", [1.0] * len(row["labels"]))[1:]) * (labels != -100)
        losses.append((weights * F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")).sum())
        targets += float(weights.sum())
    loss = sum(losses) / targets
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.fixture(scope="module")
def truths() -> dict[str, LossAndGradients]:
    return {family: truth(plain_peft(make_base(family)).train()) for family in FAMILIES}


def batch_of(trainer: LoraTrainer, layout: str, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return all conversations as one batch; packed in sequences of 24 tokens, they have another order."""
    if layout != "packed":
        return trainer.data_collator(data)
    sampler = PackingSampler([len(row["input_ids"]) for row in data], 24, seed=0)
    rows = list(sampler)
    assert 1 < len(rows) < len(data)
    return trainer.data_collator([data[index] for row in rows for index in row])


def train_step(
    model: PeftModel, folder: Path, layout: str, checkpointing: str, rows: Sequence[dict[str, Any]] = CONVERSATIONS
) -> LossAndGradients:
    trainer = make_trainer(model.train(), folder, LAYOUTS[layout][1])
    if settings := CHECKPOINTING[checkpointing]:
        model.gradient_checkpointing_enable(settings)
        model.enable_input_require_grads()
    ((batch,),), count = trainer.get_batch_samples(iter([[batch_of(trainer, layout, rows)]]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(model, batch, num_items_in_batch=count)
    loss.backward()
    return loss.detach(), gradients(model)


def require_equal(found: LossAndGradients, expected: LossAndGradients) -> None:
    """Require equality up to rounding in fp32: of the loss, and of each gradient as a whole."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, gradient in found[1].items():
        assert (gradient - expected[1][name]).norm() <= 1e-5 * expected[1][name].norm(), name
        assert gradient.any(), name


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_each_conversation_alone(
    family: str, layout: str, checkpointing: str, truths: dict[str, LossAndGradients], tmp_path: Path
) -> None:
    model = our_peft(make_base(family, LAYOUTS[layout][0]))
    require_equal(train_step(model, tmp_path, layout, checkpointing), truths[family])
    assert isinstance(model.get_output_embeddings(), LossHead)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weighted_loss_and_gradients_are_those_of_each_conversation_alone(layout: str, tmp_path: Path) -> None:
    """Some conversations have no weights, others a fraction for each token."""
    rows = [weighted(CONVERSATIONS[0], 0.25, 1.0, 0.7), *CONVERSATIONS[1:3], weighted(CONVERSATIONS[3], 0.5)]
    rows.append(CONVERSATIONS[4])
    expected = truth(plain_peft(make_base("llama")).train(), rows)
    found = train_step(our_peft(make_base("llama", LAYOUTS[layout][0])), tmp_path, layout, "kept", rows)
    require_equal(found, expected)


MIXER_TARGETS = [
    *("q_proj", "o_proj", "q_b_proj", "kv_b_proj", "in_proj", "in_proj_qkv", "in_proj_qkvz", "in_proj_ba"),
    *("qkv_proj", "output_gate", "f_b_proj", "g_b_proj"),
]
"""Linear layers before and within attention, recurrent layers and convolutions."""


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", HYBRIDS | SINKS)
def test_padding_free_hybrids_train_as_on_each_conversation_alone(
    name: str, checkpointing: str, tmp_path: Path
) -> None:
    expected = truth(plain_peft(make_hybrid(name), target_modules=MIXER_TARGETS).train())
    model = our_peft(make_hybrid(name, PER_CONVERSATION), target_modules=MIXER_TARGETS)
    require_equal(train_step(model, tmp_path, "padding-free", checkpointing), expected)
    assert isinstance(model.get_output_embeddings(), LossHead)


def test_loss_and_gradients_with_4_bit_weights(tmp_path: Path) -> None:
    expected = truth(plain_peft(make_quantized_base(tmp_path)).train())
    for layout, (attention, _) in LAYOUTS.items():
        for checkpointing in CHECKPOINTING:
            model = our_peft(make_quantized_base(tmp_path, attention))
            require_equal(train_step(model, tmp_path, layout, checkpointing), expected)


def test_models_of_these_tests_depend_on_their_layout() -> None:
    """Their windows, caps and positions have an effect on these conversations: without them the loss differs."""
    without = {
        "mistral": {"sliding_window": None},
        "gemma2": {"attn_logit_softcapping": None},
        "gemma3": {"sliding_window": 4 * WINDOW},
    }
    ids = torch.tensor([CONVERSATIONS[0]["input_ids"]])
    for family, changes in without.items():
        model = make_base(family)
        logits = model(input_ids=ids).logits
        changed = make_base(family, **changes)
        assert (changed(input_ids=ids).logits - logits).norm() > 1e-2 * logits.norm(), family


def losses_by_conversation(trainer: LoraTrainer, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        losses, owners = trainer._token_losses(trainer.model, batch)
    return [losses[owners == i] for i in range(len(rows))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_conversation_is_independent_of_its_neighbors(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, whichever neighbor changes; in bf16 the CPU computes attention in blocks."""
    trainer = make_trainer(our_peft(make_base(family, PER_CONVERSATION, dtype)).eval(), tmp_path)
    before = losses_by_conversation(trainer, CONVERSATIONS)
    for changed, row in enumerate(CONVERSATIONS):
        other = conversation(len(row["input_ids"]), seed=100 + changed)
        after = losses_by_conversation(
            trainer, [*CONVERSATIONS[:changed], other | {"labels": other["input_ids"]}, *CONVERSATIONS[changed + 1 :]]
        )
        for i, losses in enumerate(before):
            if i != changed:
                assert torch.equal(after[i], losses), f"conversation {i} sees number {changed}"
            elif losses.numel():
                assert after[i].numel() != losses.numel() or not torch.equal(after[i], losses)
