"""Counts, losses and evaluations of the trainer, without a whole run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import VOCABULARY, Largest, conversation, make_base, make_trainer, our_peft, weighted

from fastchat_qlora.model.attention.attention import PER_CONVERSATION
from fastchat_qlora.model.ops import chunked_loss as loss
from fastchat_qlora.training.trainer import LoraTrainer

CONVERSATIONS = [conversation(length, seed) for seed, length in enumerate((23, 4, 17, 9, 30, 12))]
UNSUPERVISED = conversation(11, seed=9, supervised_share=0.0)
WEIGHTED = [
    *CONVERSATIONS[:2],
    weighted(CONVERSATIONS[2], 0.25, 1.0),
    weighted(CONVERSATIONS[3], 0.1),
    CONVERSATIONS[4],
]
"""Some of the conversations with weights, which are less than 1 together in a batch of one of them."""
CPU = torch.device("cpu")


def attention(layout: str) -> str | None:
    return PER_CONVERSATION if layout == "end to end" else None


def step(trainer: LoraTrainer, *micro_batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of an optimizer step and its gradients, with that many micro-batches."""
    trainer.model.zero_grad()
    loader = iter([[trainer.data_collator(rows) for rows in micro_batches]])
    (batches,), count = trainer.get_batch_samples(loader, 1, CPU)
    total = 0.0
    for batch in batches:
        part = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        part.backward()
        total += part.item()
    return total, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


LAYOUTS = ["end to end", "padded on the right"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "rows", [[*CONVERSATIONS[:3], UNSUPERVISED], [*WEIGHTED[1:4], UNSUPERVISED]], ids=["plain", "weighted"]
)
def test_accumulation_is_the_same_as_a_larger_batch(rows: list[dict[str, Any]], layout: str, tmp_path: Path) -> None:
    """Also if one micro-batch has no supervised token."""
    trainer = make_trainer(our_peft(make_base("llama", attention(layout))), tmp_path, layout)
    loss_of_one, gradients = step(trainer, rows)
    loss_of_four, summed = step(trainer, *([row] for row in rows))
    assert loss_of_four == pytest.approx(loss_of_one, rel=1e-6)
    assert summed.keys() == gradients.keys() != set()
    for name, gradient in gradients.items():
        assert (summed[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_counts_are_those_of_the_data(layout: str, tmp_path: Path) -> None:
    """Padding does not count, nor do unsupervised tokens as supervised ones."""
    trainer = make_trainer(our_peft(make_base("llama", attention(layout))), tmp_path, layout)
    batches = [CONVERSATIONS[:2], CONVERSATIONS[2:5], [CONVERSATIONS[5], UNSUPERVISED]]
    loader = ([trainer.data_collator(rows) for rows in step] for step in (batches[:2], batches[2:]))
    for taken in (2, 1):
        (micro_batches,), count = trainer.get_batch_samples(loader, 1, CPU)
        assert len(micro_batches) == taken
        assert count == sum(len(batch["labels"]) for batch in micro_batches)
        assert not any(isinstance(value, int) and "num_" in name for b in micro_batches for name, value in b.items())
    rows = [*CONVERSATIONS, UNSUPERVISED]
    supervised = sum(label != -100 for row in rows for label in row["labels"])
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert trainer.throughput.seen == [tokens, supervised, tokens]


def test_finished_run_takes_no_batch(tmp_path: Path) -> None:
    trainer = make_trainer(our_peft(make_base("llama", PER_CONVERSATION)), tmp_path)
    trainer.state.global_step = trainer.state.max_steps
    assert trainer.get_batch_samples(iter([[trainer.data_collator(CONVERSATIONS)]]), 1, CPU) == ([], None)
    assert trainer.control.should_training_stop and trainer.throughput.seen == [0, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_factors_in_the_mean(layout: str, tmp_path: Path) -> None:
    """Half of all weights change nothing; single ones make a weighted mean, whose denominator may be less than 1."""
    trainer = make_trainer(our_peft(make_base("llama", attention(layout))), tmp_path, layout)
    plain, gradients = step(trainer, CONVERSATIONS)
    halved, same = step(trainer, [weighted(row, 0.5) for row in CONVERSATIONS])
    assert halved == pytest.approx(plain, rel=1e-6)
    for name, gradient in gradients.items():
        assert (same[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    supervised = [i for i, label in enumerate(CONVERSATIONS[0]["labels"]) if label != -100]
    only = {**CONVERSATIONS[0], "weights": [0.0] * len(CONVERSATIONS[0]["labels"])}
    alone = {**CONVERSATIONS[0], "labels": [-100] * len(CONVERSATIONS[0]["labels"])}
    only["weights"][supervised[2]], alone["labels"][supervised[2]] = 0.125, CONVERSATIONS[0]["labels"][supervised[2]]
    assert step(trainer, [only])[0] == pytest.approx(step(trainer, [alone])[0], rel=1e-6)


def test_weights_of_a_step_are_added_up(tmp_path: Path) -> None:
    """Over micro-batches with weights and without."""
    trainer = make_trainer(our_peft(make_base("llama", PER_CONVERSATION)), tmp_path)
    batches = [WEIGHTED[:2], WEIGHTED[2:4], WEIGHTED[4:]]
    _, total = trainer.get_batch_samples(iter([[trainer.data_collator(rows) for rows in batches]]), 1, CPU)
    counts = [sum(label != -100 for label in row["labels"]) for row in WEIGHTED]
    sums = [sum(row["weights"]) if "weights" in row else count for row, count in zip(WEIGHTED, counts, strict=True)]
    assert float(total) == pytest.approx(sum(sums), rel=1e-6) and sum(sums) < sum(counts)
    assert trainer.throughput.seen[1] == trainer.step.supervised == sum(counts)


@pytest.mark.parametrize("data", [CONVERSATIONS, WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_evaluation_is_the_same_in_every_layout(family: str, data: list[dict[str, Any]], tmp_path: Path) -> None:
    """It is a weighted mean over tokens."""
    sequences = Dataset.from_list([{"weights": None, **row} for row in data])
    evaluated = []
    for layout in (*LAYOUTS, "padded on the left"):
        for rows in (1, 4):
            model = our_peft(make_base(family, attention(layout)))
            flags = {"per_device_eval_batch_size": rows}
            trainer = make_trainer(model, tmp_path, layout, eval_dataset=sequences, flags=flags)
            evaluated.append(trainer.evaluate()["eval_loss"])
            assert trainer.evaluate()["eval_loss"] == evaluated[-1], "each time from the start"
    model = make_trainer(our_peft(make_base(family)).eval(), tmp_path).model
    total = targets = 0.0
    for row in data:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        weights = torch.tensor(row.get("weights", [1.0] * len(row["labels"]))[1:]) * (labels != -100)
        total += (weights * torch.nn.functional.cross_entropy(logits, labels, reduction="none")).sum().item()
        targets += weights.sum().item()
    assert evaluated == pytest.approx([total / targets] * 6, rel=1e-5)


@pytest.mark.parametrize(("family", "rows_of_logits"), [("llama", 3), ("gemma2", 3), ("gemma2", None)])
def test_evaluation_keeps_no_logits(
    family: str, rows_of_logits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It creates logits of chunks only, or without a LossHead of supervised positions only."""
    vocabulary = 900
    monkeypatch.setitem(loss.LOGITS_BYTES, "cpu", 4 * vocabulary * 3)
    data = Dataset.from_list(CONVERSATIONS)
    model = our_peft(make_base(family, PER_CONVERSATION, vocab_size=vocabulary))
    flags = {"per_device_eval_batch_size": 6}
    trainer = make_trainer(model, tmp_path, eval_dataset=data, flags=flags)
    if rows_of_logits is None:
        trainer.use_plain_loss("the test says so")
    with Largest() as seen:
        output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "evaluation")
    supervised = sum(label != -100 for row in CONVERSATIONS for label in row["labels"])
    tokens = sum(len(row["input_ids"]) for row in CONVERSATIONS)
    assert supervised < tokens and tokens > VOCABULARY
    assert output.predictions is None and output.label_ids is None
    largest_activation = tokens * model.config.intermediate_size
    assert seen.numel == max((rows_of_logits or supervised) * vocabulary, largest_activation)


def test_label_smoothing_follows_the_flag(tmp_path: Path) -> None:
    """With the head and without it."""
    losses = {}
    for share in (0.0, 0.3):
        flags = {"label_smoothing_factor": share}
        trainer = make_trainer(our_peft(make_base("llama", PER_CONVERSATION)), tmp_path, flags=flags)
        by_head, gradients = step(trainer, CONVERSATIONS)
        trainer.loss_head = None
        by_logits, plain_gradients = step(trainer, CONVERSATIONS)
        assert by_head == pytest.approx(by_logits, rel=1e-6)
        for name, gradient in gradients.items():
            assert (gradient - plain_gradients[name]).norm() <= 1e-5 * gradient.norm(), name
        losses[share] = by_head
    assert losses[0.0] != pytest.approx(losses[0.3], rel=1e-3)
