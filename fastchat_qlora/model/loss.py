"""The loss, computed where there is something to learn."""

from typing import Any

import torch
import torch.nn.functional as F


def supervised_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross entropy over supervised tokens, summed and divided by the number of them in the whole optimizer step.

    Dividing by the step's count, not by the micro-batch's own, makes the mean one over tokens: the same for 1 x 4 as
    for 4 x 1 rows.

    Args:
        outputs: the model's output, with `logits` of shape (rows, length, vocabulary).
        labels: shape (rows, length), negative where nothing is learnt.
        num_items_in_batch: supervised tokens in all micro-batches of all processes; the batch's own if None.
        label_smoothing: share of each target spread evenly over the vocabulary.
    """
    losses, _ = _token_losses(outputs, labels, label_smoothing)
    count = losses.numel() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / torch.clamp(torch.as_tensor(count, device=losses.device), min=1)


def row_losses(outputs: Any, labels: torch.Tensor, label_smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same losses summed for each row, and the number of tokens that each sum is over.

    Returns:
        Two tensors of shape (rows,), in fp32.
    """
    losses, rows = _token_losses(outputs, labels, label_smoothing)
    sums = torch.zeros(len(labels), device=losses.device).index_add_(0, rows, losses)
    return sums, torch.bincount(rows, minlength=len(labels)).float()


def _token_losses(outputs: Any, labels: torch.Tensor, label_smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and row of each supervised token. Only the logits that predict one are turned to fp32."""
    targets = labels[:, 1:]
    learnt = targets >= 0
    logits = outputs["logits"][:, :-1][learnt].float()
    losses = F.cross_entropy(logits, targets[learnt], reduction="none", label_smoothing=label_smoothing)
    return losses, learnt.nonzero()[:, 0]
