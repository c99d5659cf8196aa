from types import SimpleNamespace

import torch
import torch.nn.functional as F

from fastchat_qlora.model.loss import row_losses, supervised_loss

IGNORED = -100


def random_batch(rows: int = 4, length: int = 9, vocabulary: int = 13) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, length, vocabulary, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels[:, :3] = IGNORED
    labels[1, 3:7] = IGNORED  # rows differ in how much they teach
    return {"logits": logits}, labels


def test_equals_the_plain_shifted_cross_entropy() -> None:
    outputs, labels = random_batch()
    plain = F.cross_entropy(outputs["logits"][:, :-1].reshape(-1, 13), labels[:, 1:].reshape(-1), ignore_index=IGNORED)
    torch.testing.assert_close(supervised_loss(outputs, labels, None), plain)


def test_micro_batches_add_up_to_the_batch() -> None:
    """The mean is one over tokens: 4 x 1 rows give the loss and the gradient of 1 x 4."""
    outputs, labels = random_batch()
    count = (labels[:, 1:] != IGNORED).sum()
    whole = supervised_loss(outputs, labels, count)
    (gradient,) = torch.autograd.grad(whole, outputs["logits"])
    parts = [supervised_loss({"logits": outputs["logits"][i : i + 1]}, labels[i : i + 1], count) for i in range(4)]
    torch.testing.assert_close(sum(parts), whole)
    (summed,) = torch.autograd.grad(sum(parts), outputs["logits"])
    torch.testing.assert_close(summed, gradient)


def test_nothing_to_learn_is_zero_and_not_nan() -> None:
    outputs, labels = random_batch()
    loss = supervised_loss(outputs, torch.full_like(labels, IGNORED), None)
    assert loss.item() == 0.0
    loss.backward()
    assert outputs["logits"].grad is not None and not outputs["logits"].grad.any()


def test_half_precision_logits_are_summed_in_fp32() -> None:
    outputs, labels = random_batch()
    half = {"logits": outputs["logits"].detach().bfloat16()}
    loss = supervised_loss(half, labels, None)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, supervised_loss({"logits": half["logits"].float()}, labels, None))


def test_reads_a_models_output() -> None:
    outputs, labels = random_batch()

    class Output(SimpleNamespace):
        def __getitem__(self, name: str) -> torch.Tensor:
            return getattr(self, name)

    assert supervised_loss(Output(**outputs), labels, None) == supervised_loss(outputs, labels, None)


def test_row_losses_are_the_same_losses_by_row() -> None:
    outputs, labels = random_batch()
    sums, counts = row_losses(outputs, labels)
    assert counts.tolist() == (labels[:, 1:] != IGNORED).sum(1).tolist()
    torch.testing.assert_close(sums.sum() / counts.sum(), supervised_loss(outputs, labels, None))
    for i in range(len(labels)):
        alone = supervised_loss({"logits": outputs["logits"][i : i + 1]}, labels[i : i + 1], num_items_in_batch=1)
        torch.testing.assert_close(sums[i], alone)


def test_label_smoothing_spreads_the_target() -> None:
    outputs, labels = random_batch()
    logits, targets = outputs["logits"][:, :-1].reshape(-1, 13), labels[:, 1:].reshape(-1)
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=0.2)
    torch.testing.assert_close(supervised_loss(outputs, labels, None, label_smoothing=0.2), expected)
