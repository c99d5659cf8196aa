"""The loss, computed where there is something to learn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

LOGITS_BYTES = {"cpu": 2**24}
"""How large the fp32 logits of a chunk may become, by type of device: on the CPU so that they stay near the caches. For
820 targets of SmolLM2 one core took 0.69, 0.61, 0.65 and 0.78 s with 64, 32, 16 and 8 MiB."""

LOGITS_BYTES_ELSEWHERE = 2**29
"""On an accelerator so that a chunk keeps it busy: 1,000 tokens at a vocabulary of 128k."""

TILE = 128
"""Rows that an accelerator's matrix products take at once; a chunk of a few more would leave the last tile empty."""


def chunk_length(vocabulary: int, device_type: str) -> int:
    """How many positions have their logits computed at once."""
    length = LOGITS_BYTES.get(device_type, LOGITS_BYTES_ELSEWHERE) // (4 * vocabulary)
    if device_type not in LOGITS_BYTES and length > TILE:
        length -= length % TILE
    return max(1, length)


def mean_loss(losses: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """The losses of one micro-batch as its share of the mean over the whole optimizer step.

    Dividing by the step's count, not by the micro-batch's own, makes the mean one over tokens: the same for 1 x 4 as
    for 4 x 1 rows.

    Args:
        losses: of each target, shape (targets,).
        num_items_in_batch: targets in all micro-batches of all processes; the batch's own if None.
    """
    count = losses.numel() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / torch.clamp(torch.as_tensor(count, device=losses.device), min=1)


def token_losses(
    logits: torch.Tensor, supervised: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross entropy of each target in fp32, from the logits of a whole batch or of its supervised positions only.

    Args:
        logits: shape (rows, length, vocabulary), or (1, targets, vocabulary).
        supervised: shape (targets,), positions in the flattened batch.
        labels: shape (targets,), the token to be predicted at each.
        label_smoothing: share of each target spread evenly over the vocabulary.
    """
    flat = logits.flatten(0, 1)
    if len(flat) != len(labels):
        flat = flat[supervised]
    return F.cross_entropy(flat.float(), labels, reduction="none", label_smoothing=label_smoothing)


class LossHead(torch.nn.Linear):
    """The output projection of a model, frozen, that can answer with losses in place of logits.

    While it `expects` targets it takes the hidden states at supervised positions, chunk after chunk, and computes for
    each chunk the logits, their losses and the gradient of the hidden states, all in the forward pass: the head is
    frozen, so that gradient is all that backward will ask for. Logits never exist whole, and nothing is computed
    twice. Losses come as (1, targets, 1), so that what a model does around its head need not know.

    It stands in the head's place (`set_output_embeddings`) rather than beside the model, because only there is the
    weight at hand under every strategy: gathered by FSDP2 or ZeRO-3 for as long as this module's forward runs.

    Args:
        head: the model's own; weight and bias are shared with it.
    """

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.requires_grad_(False)
        self._expected: tuple[torch.Tensor, torch.Tensor, float] | None = None

    @contextmanager
    def expecting(self, supervised: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> Iterator[None]:
        """Answer with losses; arguments as for token_losses."""
        self._expected = supervised, labels, label_smoothing
        try:
            yield
        finally:
            self._expected = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of shape (..., vocabulary), or the losses of what is expected, in fp32, shape (1, targets, 1)."""
        if self._expected is None:
            return super().forward(hidden)
        supervised, labels, smoothing = self._expected
        chosen = hidden.flatten(0, -2).index_select(0, supervised).to(self.weight.dtype)
        chunk = chunk_length(self.out_features, hidden.device.type)
        losses: torch.Tensor = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]  # torch is untyped here
            chosen, self.weight, self.bias, labels, smoothing, chunk, torch.is_grad_enabled() and chosen.requires_grad
        )
        return losses[None, :, None]


class _FrozenHeadLoss(torch.autograd.Function):
    """Hidden states (targets, width) -> losses (targets,), with the gradient made on the way forward.

    Each loss depends on its own hidden state only, so what backward needs is one row per target: (softmax - target) of
    that position times the head's weight; it is scaled by whatever gradient comes from above.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        smoothing: float,
        chunk: int,
        with_gradient: bool,
    ) -> torch.Tensor:
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if with_gradient else None
        device_type = "cpu" if hidden.is_meta else hidden.device.type  # torch knows no autocast for meta tensors
        with torch.autocast(device_type, enabled=False):
            for start in range(0, len(labels), chunk):
                part = slice(start, start + chunk)
                target = labels[part, None]
                log_p = F.linear(hidden[part], weight, bias).log_softmax(-1, dtype=torch.float32)
                chosen = log_p.gather(1, target)[:, 0]
                losses[part] = -chosen if not smoothing else -(1 - smoothing) * chosen - smoothing * log_p.mean(-1)
                if gradient is None:
                    continue
                error = log_p.exp_()  # softmax; then minus the target
                if smoothing:
                    error -= smoothing / error.shape[1]
                error.scatter_add_(1, target, torch.full_like(target, -(1 - smoothing), dtype=error.dtype))
                torch.mm(error.to(weight.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0][:, None]).to(gradient.dtype), *[None] * 6


def _base(model: Any) -> Any:
    """A model without the adapter that may be on it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def why_plain(model: Any) -> str:
    """Why the head of a model cannot be a LossHead; nothing if it can.

    Args:
        model: with its adapter, so that what is trained is known.
    """
    base = _base(model)
    head = base.get_output_embeddings()
    config = base.config.get_text_config()
    if type(head) is not torch.nn.Linear:
        return f"the head is a {type(head).__name__}" if head is not None else "the model names no head"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "the head is trained"
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"the model changes its logits ({name})"
    return ""


def install_loss_head(model: Any) -> LossHead:
    """Put a LossHead in the place of the head of a model for which `why_plain` says nothing."""
    base = _base(model)
    head = LossHead(base.get_output_embeddings())
    base.set_output_embeddings(head)
    return head
