"""Sequences that share beginnings are trained on together as if by themselves, each token once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import (
    FAMILIES,
    VOCABULARY,
    conversation,
    make_base,
    make_quantized_base,
    make_trainer,
    our_peft,
    weighted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import make_mixture
from peft import PeftModel

from fastchat_qlora.data.dataset import Splits
from fastchat_qlora.model.attention.attention import PER_CONVERSATION
from fastchat_qlora.training.trainer import LoraTrainer

Rows = list[dict[str, Any]]


def continued(origin: dict[str, Any], kept: int, length: int, seed: int) -> dict[str, Any]:
    """Return the beginning of a row, which may end within an answer, and so many other tokens."""
    tail = conversation(max(length, 1), seed)
    return {name: origin[name][:kept] + tail[name][:length] for name in ("input_ids", "labels")}


def make_rows() -> Rows:
    """Return a row, rows that share parts of it, one equal, one a prefix, and one that shares nothing."""
    first = conversation(90, 0)
    rows = [first, continued(first, 40, 20, 1), continued(first, 75, 3, 2), continued(first, 75, 30, 3)]
    masked = {"input_ids": first["input_ids"][:70], "labels": [-100] * 35 + first["input_ids"][35:70]}
    return [*rows, conversation(25, 4), masked, first]


ROWS = make_rows()
CPU = torch.device("cpu")


def make_pair(make_model: Callable[[], PeftModel], folder: Path, **kwargs: Any) -> tuple[LoraTrainer, LoraTrainer]:
    """Return a trainer that shares prefixes and one that does not, with equal models."""
    trainers = tuple(make_trainer(make_model().train(), folder, **kwargs) for _ in range(2))
    trainers[0].data_collator.share_prefixes = True
    return trainers


def step(trainer: LoraTrainer, rows: Rows) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of an optimizer step of one pass, and its gradients."""
    trainer.model.zero_grad()
    ((batch,),), count = trainer.get_batch_samples(iter([[trainer.data_collator(rows)]]), 1, CPU)
    assert ("branches" in batch) == trainer.data_collator.share_prefixes
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def require_equal_steps(shared: LoraTrainer, separate: LoraTrainer, rows: Rows = ROWS) -> None:
    """Require equality up to rounding in fp32: of the loss, and of each gradient as a whole."""
    (loss, gradients), (expected, others) = step(shared, rows), step(separate, rows)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == others.keys() != set()
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() <= 1e-5 * others[name].norm(), name
        assert gradient.any(), name


def checkpoint(trainer: LoraTrainer) -> None:
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.enable_input_require_grads()


def make_experts() -> PeftModel:
    base = make_mixture("qwen3_moe")
    base.set_attn_implementation(PER_CONVERSATION)
    return our_peft(base, target_parameters=["experts.gate_up_proj", "experts.down_proj"])


MODELS: dict[str, Callable[[], PeftModel]] = {
    **{family: lambda family=family: our_peft(make_base(family, PER_CONVERSATION)) for family in FAMILIES},
    "mixture of experts": make_experts,
    "DoRA": lambda: our_peft(make_base("llama", PER_CONVERSATION), use_dora=True),
}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_separate_sequences(name: str, checkpointed: bool, tmp_path: Path) -> None:
    shared, separate = make_pair(MODELS[name], tmp_path)
    if checkpointed:
        checkpoint(shared)
    require_equal_steps(shared, separate)


def test_loss_and_gradients_with_4_bit_weights(tmp_path: Path) -> None:
    shared, separate = make_pair(lambda: our_peft(make_quantized_base(tmp_path, PER_CONVERSATION)), tmp_path)
    require_equal_steps(shared, separate)
    checkpoint(shared)
    require_equal_steps(shared, separate)


@pytest.mark.parametrize("head", [True, False], ids=["chunked", "plain"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighs", [False, True], ids=["one", "weighted"])
def test_loss_is_the_same_in_each_form(head: bool, smoothing: float, weighs: bool, tmp_path: Path) -> None:
    """A token that several sequences share has a weight in each."""
    flags = {"label_smoothing_factor": smoothing}
    pair = make_pair(lambda: our_peft(make_base("llama", PER_CONVERSATION)), tmp_path, flags=flags)
    for trainer in pair:
        trainer.loss_head = trainer.loss_head if head else None
    rows = [weighted(row, 0.1 * (i + 1), 0.7) if i % 2 else row for i, row in enumerate(ROWS)] if weighs else ROWS
    require_equal_steps(*pair, rows)


@pytest.mark.parametrize("head", [True, False], ids=["chunked", "plain"])
def test_evaluation_is_that_of_separate_sequences(head: bool, tmp_path: Path) -> None:
    data = Dataset.from_list([row | {"source": i % 2, "weights": None} for i, row in enumerate(ROWS)])
    names = Splits(["a", "b"], ["a", "b"])
    flags = {"per_device_eval_batch_size": 5}
    model = lambda: our_peft(make_base("gemma2", PER_CONVERSATION))  # noqa: E731
    pair = make_pair(model, tmp_path, flags=flags, eval_dataset=data, source_names=names)
    found = []
    for trainer in pair:
        trainer.loss_head = trainer.loss_head if head else None
        metrics = trainer.evaluate()
        found.append({name: metrics[name] for name in ("eval_loss", "eval_a_loss", "eval_b_loss")})
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_losses_by_source_are_those_of_separate_sequences(tmp_path: Path) -> None:
    rows = [row | {"source": i % 2} for i, row in enumerate(ROWS)]
    pair = make_pair(lambda: our_peft(make_base("llama", PER_CONVERSATION)), tmp_path, source_names=Splits(["a", "b"]))
    found = []
    for trainer in pair:
        trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        found.append(trainer._losses_by_source.read(trainer.accelerator))
    assert found[0].keys() == {"loss/a", "loss/b"} and found[0] == pytest.approx(found[1], rel=1e-5)


@st.composite
def forests(draw: st.DrawFn) -> Rows:
    """Draw rows that go on from a place in an earlier one, perhaps its end, or begin anew."""
    rows: Rows = []
    for i in range(draw(st.integers(2, 7))):
        origin = rows[draw(st.integers(0, i - 1))] if i and draw(st.integers(0, 5)) else conversation(60, 50 + i)
        kept = min(draw(st.sampled_from([0, 20, 33, 45, 60, 90])), len(origin["labels"]))
        length = draw(st.sampled_from([0, 1, 8, 40]))
        rows.append(continued(origin, kept, length, i) if kept + length else origin)
    return rows


@settings(max_examples=25, deadline=None)
@given(rows=forests())
def test_losses_of_random_forests_are_those_of_separate_sequences(
    rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not PAIR:
        folder = tmp_path_factory.mktemp("pair")
        PAIR.extend(make_pair(lambda: our_peft(make_base("gemma2", PER_CONVERSATION)), folder))
    found = []
    for trainer in PAIR:
        trainer.model.zero_grad()
        losses, owners = trainer._token_losses(trainer.model, trainer.data_collator(rows))
        weights = torch.linspace(1, 2, len(losses))
        (losses * weights).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        found.append((losses.detach(), owners, grads))
    (losses, owners, grads), (expected, others, expected_grads) = found
    assert torch.equal(owners, others)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (grads - expected_grads).norm() <= 1e-5 * expected_grads.norm()


PAIR: list[LoraTrainer] = []
"""A trainer that shares prefixes and one that does not, for all examples of the test above."""


def list_losses(trainer: LoraTrainer, rows: Rows) -> list[torch.Tensor]:
    with torch.no_grad():
        losses, owners = trainer._token_losses(trainer.model, trainer.data_collator(rows))
    return [losses[owners == i] for i in range(len(rows))]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_other_tokens_of_a_branch_change_no_other_sequence(family: str, tmp_path: Path) -> None:
    """Bit for bit."""
    trainer = make_trainer(our_peft(make_base(family, PER_CONVERSATION)).eval(), tmp_path)
    trainer.data_collator.share_prefixes = True
    rows = [row | {"labels": row["input_ids"]} for row in ROWS[1:5]]  # each has a branch of its own
    before, branches = list_losses(trainer, rows), trainer.data_collator(rows)["branches"]
    assert branches == ((-1, 40), (0, 20), (0, 35), (2, 3), (2, 30), (-1, 25))
    for changed, kept in enumerate((40, 75, 75, 0)):
        ids = rows[changed]["input_ids"]
        other = ids[:kept] + [3 + (token - 2) % (VOCABULARY - 3) for token in ids[kept:]]
        data = [*rows[:changed], {"input_ids": other, "labels": other}, *rows[changed + 1 :]]
        assert trainer.data_collator(data)["branches"] == branches
        after = list_losses(trainer, data)
        for i, losses in enumerate(before):
            assert torch.equal(after[i], losses) == (i != changed), f"sequence {i} with other tokens in {changed}"


def test_shared_tokens_have_one_dropout_mask(tmp_path: Path) -> None:
    """Equal sequences have equal losses then, which they have not by themselves."""
    pair = make_pair(lambda: our_peft(make_base("llama", PER_CONVERSATION), lora_dropout=0.5), tmp_path)
    for trainer in pair:
        first, *_, last = list_losses(trainer, ROWS)
        assert torch.equal(first, last) == trainer.data_collator.share_prefixes
        again, *_ = list_losses(trainer, ROWS)
        assert not torch.equal(first, again), "another mask in the next pass"
