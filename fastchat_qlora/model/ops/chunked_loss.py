"""The loss, computed where there is something to learn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

LOGITS_BYTES = {"cpu": 2**26}
"""How large the logits of a chunk would be in fp32, by type of device: on the CPU so that the head's weight is not read
for a few positions only. For 410 targets of SmolLM2 in bf16 two cores with AMX took 59 ms with 48 MiB, 62 with 32, 76
with 16, of which 35, 46 and 59 were the two matrix products."""

LOGITS_BYTES_ELSEWHERE = 2**29
"""On an accelerator so that a chunk keeps it busy: 1,000 tokens at a vocabulary of 128k."""

SOFTMAX_BYTES = {"cpu": 2**22}
"""How large what is turned to fp32 of a chunk at once may be: on the CPU so that it stays in the caches."""

SOFTMAX_BYTES_ELSEWHERE = 2**27

TILE = 128
"""Rows that an accelerator's matrix products take at once; chunks are made of whole ones."""


def get_chunk_length(vocabulary: int, device_type: str) -> int:
    """How many positions have their logits computed at once."""
    length = LOGITS_BYTES.get(device_type, LOGITS_BYTES_ELSEWHERE) // (4 * vocabulary)
    if device_type not in LOGITS_BYTES and length > TILE:
        length -= length % TILE
    return max(1, length)


def softmax_length(vocabulary: int, device_type: str) -> int:
    """How many of these are turned to fp32 at once."""
    return max(1, SOFTMAX_BYTES.get(device_type, SOFTMAX_BYTES_ELSEWHERE) // (4 * vocabulary))


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
        with_gradient = torch.is_grad_enabled() and chosen.requires_grad
        losses: torch.Tensor = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]  # torch is untyped here
            chosen, self.weight, self.bias, labels, smoothing, with_gradient
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
        with_gradient: bool,
    ) -> torch.Tensor:
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if with_gradient else None
        device_type = "cpu" if hidden.is_meta else hidden.device.type  # torch knows no autocast for meta tensors
        with torch.autocast(device_type, enabled=False):
            for part in _parts(len(labels), len(weight), device_type):
                # In a function of its own, so that the logits of one chunk are gone before those of the next come.
                _work_on_chunk(
                    hidden[part],
                    weight,
                    bias,
                    labels[part, None],
                    smoothing,
                    losses[part],
                    None if gradient is None else gradient[part],
                )
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0][:, None]).to(gradient.dtype), *[None] * 5


def _parts(targets: int, vocabulary: int, device_type: str) -> list[slice]:
    """Chunks of about one size, as few as can be."""
    most = get_chunk_length(vocabulary, device_type)
    tile = TILE if device_type not in LOGITS_BYTES and most > TILE else 1
    length = -(-targets // max(1, -(-targets // most)))
    length = max(1, -(-length // tile) * tile)
    return [slice(start, start + length) for start in range(0, targets, length)]


def _work_on_chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    smoothing: float,
    losses: torch.Tensor,
    gradient: torch.Tensor | None,
) -> None:
    """Fill in the losses of some positions, shape (positions,), and their gradient if there is a place for it.

    Args:
        hidden: shape (positions, width).
        weight: of the head, shape (vocabulary, width).
        bias: of the head, shape (vocabulary,).
        targets: shape (positions, 1).
        smoothing: share of each target spread evenly over the vocabulary.
        losses: the place for the losses.
        gradient: the place for the gradient, shaped as hidden.
    """
    logits = F.linear(hidden, weight, bias)
    piece = softmax_length(len(weight), logits.device.type)
    pieces = (torch.split(tensor, piece) for tensor in (logits, targets, losses))
    for rows, their_targets, their_losses in zip(*pieces, strict=True):
        their_losses.copy_(_losses_and_errors(rows, their_targets, smoothing, gradient is not None))
    if gradient is not None:
        torch.mm(logits, weight, out=gradient)  # no longer logits, but their errors


def _losses_and_errors(logits: torch.Tensor, targets: torch.Tensor, smoothing: float, errors: bool) -> torch.Tensor:
    """The losses of some positions, computed in fp32.

    Args:
        logits: shape (positions, vocabulary); spoilt, or if errors are asked for made into softmax minus target.
        targets: shape (positions, 1).
        smoothing: share of each target spread evenly over the vocabulary.
        errors: whether they are asked for.

    Returns:
        Shape (positions,).
    """
    exact = logits.float()
    exact -= exact.amax(-1, keepdim=True)
    losses = (smoothing - 1) * exact.gather(1, targets)
    if smoothing:
        losses -= smoothing * exact.mean(-1, keepdim=True)
    total = exact.exp_().sum(-1, keepdim=True)
    losses += total.log()
    if errors:
        exact /= total
        if smoothing:
            exact -= smoothing / exact.shape[1]
        exact.scatter_add_(1, targets, torch.full_like(targets, smoothing - 1, dtype=exact.dtype))
        logits.copy_(exact)
    return losses[:, 0]


def _base(model: Any) -> Any:
    """A model without the adapter that may be on it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def explain_plain_loss(model: Any) -> str:
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
