"""The loss and its gradient at supervised positions, a chunk of logits at a time."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastchat_qlora.model.ops.cpu_products import get_product_dtype, multiply, multiply_by_transpose

LOGITS_BYTES, LOGITS_BYTES_ON_ACCELERATOR = {"cpu": 2**26}, 2**29
"""Size of a chunk's logits in fp32: enough to read the head's weight rarely (410 targets of SmolLM2 in bf16 took two
cores with AMX 59 ms with 48 MiB, 76 with 16), and to keep an accelerator busy (1,000 tokens of 128k logits)."""

SOFTMAX_BYTES, SOFTMAX_BYTES_ON_ACCELERATOR = {"cpu": 2**22}, 2**27
"""Size of the part of a chunk that is cast to fp32 at once; on the CPU it is to stay in the caches."""

TILE_POSITIONS = 128  # that an accelerator's matrix products take at once; chunks consist of whole tiles


def get_chunk_length(vocabulary: int, device_type: str) -> int:
    """Return the number of positions whose logits are computed at once."""
    length = LOGITS_BYTES.get(device_type, LOGITS_BYTES_ON_ACCELERATOR) // (4 * vocabulary)
    if device_type not in LOGITS_BYTES and length > TILE_POSITIONS:
        length -= length % TILE_POSITIONS
    return max(1, length)


def get_softmax_length(vocabulary: int, device_type: str) -> int:
    """Return the number of positions of a chunk that are cast to fp32 at once."""
    return max(1, SOFTMAX_BYTES.get(device_type, SOFTMAX_BYTES_ON_ACCELERATOR) // (4 * vocabulary))


def compute_mean_loss(
    losses: torch.Tensor, num_items_in_batch: torch.Tensor | float | None, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a micro-batch's share of the weighted mean loss over the whole optimizer step.

    Dividing by the weights of the targets in all micro-batches of all processes (`num_items_in_batch`) makes it a mean
    over tokens: the same for 1 x 4 as for 4 x 1 conversations. None stands for the targets of this micro-batch.

    Args:
        weights: of each target, shape (targets,); None where each weighs 1.
    """
    total = losses if weights is None else losses * weights
    if num_items_in_batch is None:
        num_items_in_batch = losses.numel() if weights is None else weights.sum()
    return total.sum() / at_least_tiny(torch.as_tensor(num_items_in_batch, device=losses.device))


def at_least_tiny(total: torch.Tensor) -> torch.Tensor:
    """Return a sum of weights to divide by, which is 0 where nothing is supervised and may be less than 1."""
    return total.clamp(min=torch.finfo(torch.float32).tiny)


def compute_token_losses(
    logits: torch.Tensor, supervised: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return the cross entropy of each target in fp32, shape (targets,).

    Args:
        logits: of a batch, shape (rows, length, vocabulary), or of supervised positions, (1, targets, vocabulary).
        supervised: positions in the flattened batch, shape (targets,).
        labels: the token to predict at each, shape (targets,).
        label_smoothing: share of each target spread evenly over the vocabulary.
    """
    flat = logits.flatten(0, 1)
    if len(flat) != len(labels):
        flat = flat[supervised]
    return F.cross_entropy(flat.float(), labels, reduction="none", label_smoothing=label_smoothing)


class LogitTransform(NamedTuple):
    """The change that a model makes to its logits after the head: softcap * tanh(scale * logit / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return changed logits, and the derivative of each."""
        if self.softcap is None:
            return (logits, 1.0) if self.scale == 1 else (logits * self.scale, self.scale)
        share = (logits * (self.scale / self.softcap)).tanh_()
        return share * self.softcap, share.square_().neg_().add_(1).mul_(self.scale)


IDENTITY = LogitTransform()
SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


def read_logit_transform(config: Any) -> LogitTransform:
    """Return what the models of transformers do to their logits by these fields of a configuration."""
    scale = math.prod(getattr(config, name, None) or 1.0 for name in SCALES)
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # Granite divides logits by this field, HyperCLOVA X multiplies them, and MiniCPM3 divides the hidden states.
    if config.model_type.startswith("granite"):
        scale /= scaling
    elif config.model_type.startswith("hyperclovax"):
        scale *= scaling
    return LogitTransform(scale, next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None))


CAPPED_SHARE = 2.0**-20
"""Share of losses of which a cap takes nothing in fp32, since tanh(x) is x there."""


class LossHead(torch.nn.Linear):
    """The frozen output projection of a model, with losses in place of logits on demand.

    While it expects targets it takes the hidden states at supervised positions, chunk by chunk, and computes the
    logits, their losses and the gradient of the hidden states, all in the forward pass: since the head is frozen, that
    gradient is all that backward needs. Logits never exist as a whole, and nothing is computed twice. Losses have the
    shape (1, targets, 1), so that the model treats them as logits: scales and caps them. So they are made smaller by
    its scale, and to be left alone by its cap; `read_losses` reverses this.

    It replaces the head (`set_output_embeddings`), because only the head's own forward has the weight under every
    strategy: FSDP2 and ZeRO-3 gather it for as long as that runs.
    """

    def __init__(self, head: torch.nn.Linear, transform: LogitTransform = IDENTITY) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.requires_grad_(False)
        self.transform = transform
        self._share = 1.0 if transform.softcap is None else CAPPED_SHARE
        self._expected: tuple[torch.Tensor, torch.Tensor, float] | None = None

    @contextmanager
    def expecting(self, supervised: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> Iterator[None]:
        """Return losses from forward within the block; arguments as for compute_token_losses."""
        self._expected = supervised, labels, label_smoothing
        try:
            yield
        finally:
            self._expected = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (..., vocabulary), or shares of expected losses in fp32, shape (1, targets, 1)."""
        if self._expected is None:
            return super().forward(hidden)
        supervised, labels, smoothing = self._expected
        chosen = hidden.flatten(0, -2).index_select(0, supervised).to(self.weight.dtype)
        losses: torch.Tensor = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
            chosen, self.weight, self.bias, labels, (smoothing, self.transform)
        )
        return losses[None, :, None] * (self._share / self.transform.scale)

    def read_losses(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the losses, shape (targets,), from what a model returns as logits while this head expects targets."""
        return logits.flatten() / self._share


class _Chunk(NamedTuple):
    """Some positions of a batch, and the place of their results."""

    hidden: torch.Tensor  # shape (positions, hidden size)
    targets: torch.Tensor  # shape (positions, 1)
    losses: torch.Tensor  # written, shape (positions,)
    gradient: torch.Tensor | None  # of `hidden`, written; None where it is not needed


class _FrozenHeadLoss(torch.autograd.Function):
    """The losses (targets,) of hidden states (targets, hidden size), with the gradient computed in forward.

    A loss depends on its own hidden state only. So backward needs one row per target, (softmax - target) of that
    position times the head's weight, which it scales by the gradient of the loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: Any,
        labels: torch.Tensor,
        settings: tuple[float, LogitTransform],
    ) -> torch.Tensor:
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        device_type = "cpu" if hidden.is_meta else hidden.device.type  # torch has no autocast for meta tensors
        with torch.autocast(device_type, enabled=False):
            for part in _split_into_chunks(len(labels), len(weight), device_type):
                of_part = None if gradient is None else gradient[part]
                chunk = _Chunk(hidden[part], labels[part, None], losses[part], of_part)
                _compute_chunk(chunk, weight, bias, settings)  # a function, so that its logits are freed at its end
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0][:, None]).to(gradient.dtype), None, None, None, None


def _split_into_chunks(targets: int, vocabulary: int, device_type: str) -> list[slice]:
    """Return as few chunks as possible, of about equal size."""
    longest = get_chunk_length(vocabulary, device_type)
    tile = TILE_POSITIONS if device_type not in LOGITS_BYTES and longest > TILE_POSITIONS else 1
    length = -(-targets // max(1, -(-targets // longest)))
    length = max(1, -(-length // tile) * tile)
    return [slice(start, start + length) for start in range(0, targets, length)]


def _compute_chunk(
    chunk: _Chunk, weight: torch.Tensor, bias: torch.Tensor | None, settings: tuple[float, LogitTransform]
) -> None:
    """Write the losses of a chunk, and its gradient if that is needed."""
    dtype = get_product_dtype(weight.dtype, weight.device, len(chunk.hidden))
    if dtype == weight.dtype:
        logits = F.linear(chunk.hidden, weight, bias)
    else:
        logits = multiply_by_transpose(chunk.hidden.to(dtype), weight)
        if bias is not None:
            logits += bias
    length = get_softmax_length(len(weight), logits.device.type)
    pieces = (torch.split(tensor, length) for tensor in (logits, chunk.targets, chunk.losses))
    for piece_logits, targets, losses in zip(*pieces, strict=True):
        losses.copy_(_compute_losses(piece_logits, targets, *settings, write_gradient=chunk.gradient is not None))
    if chunk.gradient is not None:  # `logits` holds softmax minus target by now
        if dtype == weight.dtype:
            torch.mm(logits, weight, out=chunk.gradient)
        else:
            chunk.gradient.copy_(multiply(logits, weight))


def _compute_losses(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float, transform: LogitTransform, *, write_gradient: bool
) -> torch.Tensor:
    """Return the losses of some positions, computed in fp32, shape (positions,).

    Args:
        logits: shape (positions, vocabulary); overwritten.
        targets: shape (positions, 1).
        smoothing: share of each target spread evenly over the vocabulary.
        transform: what the model does to its logits.
        write_gradient: overwrite the logits with their gradient, (softmax - target) times the transform's derivative.
    """
    exact, derivative = transform.apply(logits.float())
    exact -= exact.amax(-1, keepdim=True)
    losses = (smoothing - 1) * exact.gather(1, targets)
    if smoothing:
        losses -= smoothing * exact.mean(-1, keepdim=True)
    total = exact.exp_().sum(-1, keepdim=True)
    losses += total.log()
    if write_gradient:
        exact /= total
        if smoothing:
            exact -= smoothing / exact.shape[1]
        exact.scatter_add_(1, targets, torch.full_like(targets, smoothing - 1, dtype=exact.dtype))
        logits.copy_(exact.mul_(derivative))
    return losses[:, 0]


def explain_plain_loss(model: Any) -> str:
    """Return the reason why a LossHead cannot replace the head of a model with its adapter; empty if it can."""
    base = getattr(model, "get_base_model", lambda: model)()
    head = base.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return f"the head is a {type(head).__name__}" if head is not None else "the model names no head"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "the head is trained"
    return ""


def install_loss_head(model: Any) -> LossHead:
    """Replace the head of a model for which `explain_plain_loss` gives no reason."""
    base = getattr(model, "get_base_model", lambda: model)()
    head = LossHead(base.get_output_embeddings(), read_logit_transform(base.config.get_text_config()))
    base.set_output_embeddings(head)
    return head
