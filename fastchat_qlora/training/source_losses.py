"""Losses by source of the data: sums over targets, of which only a reading waits for the device."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

TRAINING_LOSS, EVALUATION_LOSS = re.compile("loss/(.+)"), re.compile("eval_(.+)_loss")
"""Keys of the log that hold the loss of a source, with its name."""


class SourceLosses:
    """The mean loss of each source since the last reading, over micro-batches, steps and processes.

    With fewer than two sources nothing is computed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names if len(names) > 1 else ()
        self._sums: torch.Tensor | None = None

    def add(self, losses: torch.Tensor, batch: Mapping[str, Any]) -> None:
        """Add the losses of a batch's targets, with their weights if it has any."""
        if not self.names:
            return
        weights = batch.get("weights", torch.ones_like(losses))
        sources = batch["source"][batch["conversation"]]
        if self._sums is None:  # not every device has fp64
            dtype = torch.float32 if losses.device.type == "mps" else torch.float64
            self._sums = torch.zeros(2, len(self.names), dtype=dtype, device=losses.device)
        values = torch.stack([losses.detach() * weights, weights])
        self._sums.index_add_(1, sources, values.to(self._sums.dtype))

    def read(self, accelerator: Any) -> dict[str, float]:
        """Return the loss of each source that had targets as `loss/NAME`, and start over; a collective operation."""
        if self._sums is None:
            return {}
        losses, weights = accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        return {f"loss/{name}": loss for name, loss in compute_means(self.names, losses, weights).items()}


def compute_means(names: Sequence[str], losses: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
    """Return the mean loss of each name that has any weight."""
    return {name: loss / weight for name, loss, weight in zip(names, losses, weights, strict=True) if weight}


def find_source_losses(logs: Mapping[str, Any], keys: re.Pattern[str]) -> dict[str, str]:
    """Return the key of each source's loss in a log entry, by the source's name."""
    return {match[1]: key for key in logs if (match := keys.fullmatch(key))}
