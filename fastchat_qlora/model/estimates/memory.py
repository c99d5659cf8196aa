"""The arithmetic of memory: what a run needs, by part, before it needs it.

    peak = weights + adapter + gradients + optimizer + activations + logits + buffers

Activations are not taken from a formula for one family of models but counted: the model is built without memory (on
torch's meta device), a few tokens are sent through it, and every tensor that autograd would keep is added up, layer by
layer. The count holds for any architecture and follows the code as it is, dropout, norms and adapters included. For a
Llama in bf16 with adapters on all linear layers and no dropout it comes to the 12 h + 4 k + 6 f bytes for each token
and layer that one finds by hand (h: hidden size, k: key heads times head size, f: size of the MLP).
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PreTrainedModel

from fastchat_qlora.model.adapter.lora import get_trainable_parameters
from fastchat_qlora.model.estimates.optimizer_state import state_bytes_on_device
from fastchat_qlora.model.loading.base_model import get_repeated_layers
from fastchat_qlora.model.loading.quantization import NOT_QUANTIZED, BaseQuantization
from fastchat_qlora.model.ops.chunked_loss import (
    LossHead,
    explain_plain_loss,
    get_chunk_length,
    get_softmax_length,
    install_loss_head,
)

TRACED_TOKENS = (64, 128)
"""Rows that are sent through; what the longer one costs more is what its tokens cost, without what is there once."""

KEPT_BY_ATTENTION = ("inputs", "inputs and output", "inputs and output, which is copied")
"""What attention keeps: recomputing all, as in blocks on a CPU; a fused kernel; one called for each conversation."""


class TokenBytes(NamedTuple):
    """What autograd keeps for one token, in bytes.

    Attributes:
        layer: of one layer that is not checkpointed; the mean over all layers.
        carried: of one that is: its input.
        outside: of all that is not in a layer: embeddings, last norm, head and loss.
        widest: of the largest output of a linear layer.
        flops: floating-point operations of its forward pass, attention's own products not among them.
    """

    layer: float
    carried: float
    outside: float
    widest: float
    flops: float


class WeightBytes(NamedTuple):
    """Bytes of the frozen base.

    Attributes:
        total: all of it.
        largest_layer: of the largest of the repeated layers.
        ends: of all that is in none of them: embeddings, last norm and head.
        constants: of the scales of 4-bit weights, which no strategy shards; they are in the others too.
    """

    total: float
    largest_layer: float
    ends: float
    constants: float


class ModelCost(NamedTuple):
    """What there is to know of a model for the sums below.

    Attributes:
        layers: how many can be checkpointed.
        token: what a token costs.
        weights: of the frozen base.
        itemsize: bytes of a number in the compute dtype.
        trained: numbers that are trained.
        targets: for each token.
        target_work: bytes for each target whose loss is being computed.
        chunk: how many targets that are at once; all of them if None.
        softmax_work: bytes for each of these that is turned to fp32.
        piece: how many targets that are at once.
        dequantised: bytes of the largest 4-bit weight, unpacked.
    """

    layers: int
    token: TokenBytes
    weights: WeightBytes
    itemsize: int
    trained: int
    targets: float
    target_work: float
    chunk: int | None
    softmax_work: float
    piece: int
    dequantized: float


class MemoryNeed(NamedTuple):
    """Bytes by part, at the moment when they are most.

    Attributes:
        weights: of the frozen base.
        adapter: what is trained.
        gradients: of the adapter.
        optimizer: its state.
        activations: what forward keeps for backward.
        logits: of the positions whose loss is being computed, and their gradient.
        buffers: what comes and goes beside these: 4-bit weights unpacked, a layer that is computed again where that is
            more than the logits, and what a strategy gathers or sends.
    """

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)

    @property
    def work(self) -> float:
        """What is there for a moment only."""
        return self.logits + self.buffers

    @property
    def of_a_step(self) -> float:
        """What comes on top once weights and adapter are there."""
        return self.total - self.weights - self.adapter


def _traced_attention(kept: str) -> Callable[..., tuple[torch.Tensor, None]]:
    def attend(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """Stands in for a kernel: keeps what it keeps, and computes nothing."""
        output: torch.Tensor = _Keep.apply(query, key, value, kept != KEPT_BY_ATTENTION[0])  # type: ignore[no-untyped-call]
        return output.clone() if kept == KEPT_BY_ATTENTION[2] else output, None

    return attend


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, with_output: bool
    ) -> torch.Tensor:
        rows, heads, tokens, _ = query.shape
        output = torch.empty((rows, tokens, heads, value.shape[-1]), dtype=query.dtype, device=query.device)
        sums = torch.empty((rows, heads, tokens), dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, *([output, sums] if with_output else []))
        return output


for name in KEPT_BY_ATTENTION:
    AttentionInterface.register(name, _traced_attention(name))


def measure_model_cost(
    model: Any, *, supervised_share: float, quantization: BaseQuantization = NOT_QUANTIZED, device_type: str = "cpu"
) -> ModelCost:
    """Count what a model needs.

    Args:
        model: a PeftModel on the meta device, in the compute dtype of the run; it is used up.
        supervised_share: targets for each token.
        quantization: how linear layers will be loaded.
        device_type: of the run's device, which decides on the size of a chunk of logits.

    Raises:
        ValueError: what its attention keeps grows with the square of a conversation's length.
        Exception: whatever else a model raises that cannot be run in this way.
    """
    base: PreTrainedModel = model.get_base_model()
    if getattr(base.config.get_text_config(), "attn_logit_softcapping", None):
        raise ValueError("attention whose scores are capped keeps them all, so that a token has no price of its own")
    head = base.get_output_embeddings()
    size = base.dtype.itemsize
    weights, largest = _weigh(base, quantization)
    chunked = not explain_plain_loss(model)
    vocabulary = head.weight.shape[0]
    on_cpu = KEPT_BY_ATTENTION[0 if base.dtype == torch.bfloat16 else 2]
    base.set_attn_implementation(on_cpu if device_type == "cpu" else KEPT_BY_ATTENTION[1])
    token, layers = _trace(model, supervised_share)
    return ModelCost(
        layers=layers,
        token=token,
        weights=weights,
        itemsize=size,
        trained=sum(parameter.numel() for parameter in get_trainable_parameters(model).values()),
        targets=supervised_share,
        target_work=float(vocabulary * (size if chunked else 12 + 2 * size)),
        chunk=get_chunk_length(vocabulary, device_type) if chunked else None,
        softmax_work=4.0 * vocabulary if chunked and size < 4 else 0.0,
        piece=get_softmax_length(vocabulary, device_type),
        dequantized=float(largest * size if quantization.is_quantized else 0),
    )


def compute_memory_phases(
    model: ModelCost,
    tokens: int,
    checkpointed: int,
    *,
    optimizer: str = "adamw_torch",
    scale: float = 1.0,
    accumulates: bool = True,
) -> tuple[MemoryNeed, MemoryNeed]:
    """What a run needs on one device when it needs most: where backward begins, and where the optimizer steps.

    With some layers checkpointed these are the first ones: backward comes to them last, when what the others kept is
    gone, so that recomputing one adds to the peak only where nearly all are checkpointed.

    Args:
        model: from `profile`.
        tokens: of the largest micro-batch, padding included.
        checkpointed: how many layers are.
        optimizer: by its transformers name.
        scale: what a measured step needed for activations and work, as a multiple of what this function says.
        accumulates: whether gradients of earlier micro-batches are there while a later one is computed. Where they are
            not, they come as activations go, and only one of both counts: the one that is more.
    """
    token = model.token
    kept = model.layers - checkpointed
    activations = tokens * (token.outside + kept * token.layer + checkpointed * token.carried)
    recomputed = max(0.0, tokens * token.layer * (1 - kept)) if checkpointed else 0.0
    # The gradients that one MLP has at once on its way back: of the product, of the gate and of the other factor.
    at_once = min(tokens * model.targets, model.chunk or math.inf)
    of_loss = at_once * model.target_work + min(at_once, model.piece) * model.softmax_work
    in_backward = max(0.0, recomputed + 3 * tokens * token.widest - of_loss)
    stepping = MemoryNeed(
        weights=model.weights.total,
        adapter=4.0 * model.trained,
        gradients=4.0 * model.trained,
        optimizer=model.trained * state_bytes_on_device(optimizer),
        activations=0.0,
        logits=0.0,
        buffers=4.0 * model.trained,  # Adam's update is made of all parameters at once
    )
    computing = stepping._replace(
        gradients=stepping.gradients * accumulates,
        activations=activations * scale,
        logits=of_loss * scale,
        buffers=in_backward * scale + 2 * model.dequantized,
    )
    return computing, stepping


def compute_peak_memory(model: ModelCost, tokens: int, checkpointed: int, *, shards: int = 1, **how: Any) -> MemoryNeed:
    """The larger of the two moments.

    Args:
        model: from `profile`.
        tokens: of the largest micro-batch.
        checkpointed: how many layers are.
        shards: over how many processes optimizer state is divided, and with it the update.
        how: further arguments of `moments`.
    """
    computing, stepping = compute_memory_phases(model, tokens, checkpointed, **how)
    divided = {"optimizer": stepping.optimizer / shards}
    stepping = stepping._replace(buffers=stepping.buffers / shards, **divided)
    return max(computing._replace(**divided), stepping, key=lambda moment: moment.total)


def count_layers_to_checkpoint(model: ModelCost, tokens: int, available: float, **how: Any) -> int | None:
    """The fewest layers to checkpoint for a step to fit; None if it does not fit with all of them.

    Args:
        model: from `profile`.
        tokens: of the largest micro-batch.
        available: bytes there are beside weights and adapter.
        how: further arguments of `need`.
    """
    counts = range(model.layers + 1)
    return next(
        (count for count in counts if compute_peak_memory(model, tokens, count, **how).of_a_step <= available), None
    )


def _weigh(base: PreTrainedModel, quantization: BaseQuantization) -> tuple[WeightBytes, int]:
    """Bytes of the frozen base as it will be loaded, and the numbers in its largest quantised weight."""
    ends = {id(module.weight) for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module}
    linear = {id(m.weight) for m in base.modules() if isinstance(m, torch.nn.Linear)} - ends
    frozen = {id(parameter): parameter for parameter in base.parameters() if not parameter.requires_grad}
    packed = {key: p.numel() for key, p in frozen.items() if quantization.is_quantized and key in linear}
    sizes = {
        key: math.ceil(packed[key] * quantization.bytes_per_weight) if key in packed else p.numel() * p.element_size()
        for key, p in frozen.items()
    }
    layers = [sum(sizes.get(id(p), 0) for p in layer.parameters()) for layer in get_repeated_layers(base)]
    scales = sum(packed.values()) * (quantization.bytes_per_weight - 0.5) if quantization.is_4bit else 0.0
    total = sum(sizes.values())
    weights = WeightBytes(total, max(layers, default=0), total - sum(layers), scales)
    return weights, max(packed.values(), default=0)


def _trace(model: Any, supervised_share: float) -> tuple[TokenBytes, int]:
    """Send two rows through the model and compare what is kept, in the layers and outside of them."""
    base: PreTrainedModel = model.get_base_model()
    layers = get_repeated_layers(base)
    head = None if explain_plain_loss(model) else install_loss_head(model)
    model.train()
    short, long = (_count_kept(model, layers, head, tokens, supervised_share) for tokens in TRACED_TOKENS)
    more = TRACED_TOKENS[1] - TRACED_TOKENS[0]
    inside, outside, widest, flops = ((b - a) / more for a, b in zip(short, long, strict=True))
    carried = base.config.get_text_config().hidden_size * base.dtype.itemsize
    return TokenBytes(inside / max(1, len(layers)), carried, outside, widest, flops), len(layers)


def _count_kept(
    model: Any, layers: Sequence[torch.nn.Module], head: LossHead | None, tokens: int, supervised_share: float
) -> tuple[int, int, int, int]:
    """Bytes kept for a row in the layers and outside of them, those of a linear layer's widest output, and FLOPs."""
    count = _SavedBytes(model)
    hooks = [layer.register_forward_pre_hook(lambda *_: count.enter()) for layer in layers]
    hooks += [layer.register_forward_hook(lambda *_: count.leave()) for layer in layers]
    linear = [module for layer in layers for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    hooks += [module.register_forward_hook(count.look) for module in linear]
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    targets = torch.zeros(round(supervised_share * tokens), dtype=torch.long, device="meta")
    try:
        expecting = head.expecting(targets, targets) if head else contextlib.nullcontext()
        with count, FlopCounterMode(display=False) as flops, expecting:
            model(input_ids=ids, position_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return count.inside, count.outside, count.widest, flops.get_total_flops()


class _SavedBytes:
    """Counts the bytes that autograd keeps: each storage once, weights and buffers not at all.

    Args:
        model: whose weights and buffers are left out.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        own = [*model.parameters(), *model.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in own}
        self._alive: list[Any] = []  # an address is used again once its tensor has gone
        self._in_layer = False
        self.inside = self.outside = self.widest = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def look(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """See an output of a linear layer."""
        self.widest = max(self.widest, output.numel() * output.element_size())

    def enter(self) -> None:
        self._in_layer = True

    def leave(self) -> None:
        self._in_layer = False

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._alive.append(tensor)
            size = storage.nbytes()
            self.inside, self.outside = (
                (self.inside + size, self.outside) if self._in_layer else (self.inside, self.outside + size)
            )
        return tensor
