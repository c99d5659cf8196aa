"""A model without weights -> the memory that a run will need, by part.

    peak = weights + adapter + gradients + optimizer + activations + logits + buffers

Activations do not follow a formula for one family of models but are counted: the model is built on torch's meta device,
a few tokens are sent through it, and every tensor that autograd saves is added up, layer by layer. The count holds for
any architecture and includes dropout, norms and adapters as they are. For a Llama in bf16 with adapters on all linear
layers and no dropout it gives the 12 h + 4 k + 6 f bytes for each token and layer that one derives by hand (h: hidden
size, k: key heads times head size, f: size of the MLP).
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PreTrainedModel

from fastchat_qlora.model.adapter.lora import get_trainable_parameters
from fastchat_qlora.model.estimates.optimizer_state import get_resident_state_bytes
from fastchat_qlora.model.loading.base_model import get_repeated_layers
from fastchat_qlora.model.loading.quantization import NOT_QUANTIZED, BaseQuantization
from fastchat_qlora.model.ops import chunked_loss

TRACED_TOKENS = (64, 128)  # of two rows; the difference is the cost of tokens without what exists once


class TokenBytes(NamedTuple):
    """Bytes saved by autograd for one token, and the FLOPs of its forward pass."""

    layer: float  # in a layer that is not checkpointed; the mean over all layers
    checkpointed_layer: float  # its input
    outside: float  # of the layers: embeddings, last norm, head and loss
    widest: float  # output of a linear layer
    flops: float  # without attention's own products


class WeightBytes(NamedTuple):
    """Bytes of the frozen base model."""

    total: float
    largest_layer: float
    outside: float  # of the layers: embeddings, last norm and head
    scales: float  # of 4-bit weights, which no strategy shards; the other values include them


class ModelCost(NamedTuple):
    """The memory costs of a model, for any batch, strategy and optimizer."""

    layers: int  # that can be checkpointed
    token: TokenBytes
    weights: WeightBytes
    itemsize: int  # bytes of a value in the compute dtype
    trained: int  # parameters
    targets: float  # per token
    bytes_per_target: float  # while its loss is computed
    chunk_length: int | None  # targets whose logits exist at once; all of them if None
    bytes_per_softmax: float  # added for each target that is cast to fp32
    softmax_length: int  # targets that are cast to fp32 at once
    dequantized: float  # bytes of the largest 4-bit weight when it is dequantized


class MemoryNeed(NamedTuple):
    """Bytes on a device by part, at one moment of a step."""

    weights: float  # of the frozen base model
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    logits: float  # of the positions whose loss is being computed, with their gradient
    buffers: float  # dequantized weights, recomputed layers that need more than the logits, what a strategy gathers

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self)

    @property
    def temporary(self) -> float:
        """The temporary parts."""
        return self.logits + self.buffers

    @property
    def step_bytes(self) -> float:
        """All parts that a step adds to weights and adapter."""
        return self.total - self.weights - self.adapter


class _SaveAsAttention(torch.autograd.Function):
    """An attention kernel with the saved tensors of a real one, and no computation."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, saves_output: bool
    ) -> torch.Tensor:
        rows, heads, tokens, _ = query.shape
        output = torch.empty((rows, tokens, heads, value.shape[-1]), dtype=query.dtype, device=query.device)
        sums = torch.empty((rows, heads, tokens), dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, *([output, sums] if saves_output else []))
        return output


def _register_traced_attention(device_type: str, dtype: torch.dtype) -> str:
    """Register an attention function that saves as the run's does, and return its name.

    On a CPU `attend_in_blocks` (bf16) saves its inputs only, and other kernels are called for each conversation, which
    copies their output.
    """
    in_blocks = device_type == "cpu" and dtype == torch.bfloat16
    copies_output = device_type == "cpu" and not in_blocks

    def attend(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        output: torch.Tensor = _SaveAsAttention.apply(query, key, value, not in_blocks)  # type: ignore[no-untyped-call]
        return output.clone() if copies_output else output, None

    name = f"traced_{device_type}_{dtype}"
    AttentionInterface.register(name, attend)
    return name


def measure_model_cost(
    model: Any, *, supervised_share: float, quantization: BaseQuantization = NOT_QUANTIZED, device_type: str = "cpu"
) -> ModelCost:
    """Count the cost of a model.

    Args:
        model: a PeftModel on the meta device, in the compute dtype of the run; it is used up.
        supervised_share: targets per token.
        quantization: of the base model when it will be loaded.
        device_type: of the run's device, which decides on the size of a chunk of logits.

    Raises:
        Exception: any error of a model that cannot run on the meta device; ValueError for capped attention scores.
    """
    base: PreTrainedModel = model.get_base_model()
    if getattr(base.config.get_text_config(), "attn_logit_softcapping", None):
        raise ValueError("attention with capped scores saves all of them, so that a token has no fixed cost")
    vocabulary, size = base.get_output_embeddings().weight.shape[0], base.dtype.itemsize
    weights, largest = _measure_weights(base, quantization)
    chunked = not chunked_loss.explain_plain_loss(model)
    base.set_attn_implementation(_register_traced_attention(device_type, base.dtype))
    token, layers = _trace_model(model, supervised_share)
    return ModelCost(
        layers=layers,
        token=token,
        weights=weights,
        itemsize=size,
        trained=sum(parameter.numel() for parameter in get_trainable_parameters(model).values()),
        targets=supervised_share,
        bytes_per_target=float(vocabulary * (size if chunked else 12 + 2 * size)),
        chunk_length=chunked_loss.get_chunk_length(vocabulary, device_type) if chunked else None,
        bytes_per_softmax=4.0 * vocabulary if chunked and size < 4 else 0.0,
        softmax_length=chunked_loss.get_softmax_length(vocabulary, device_type),
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
    """Return one device's memory at the start of backward and in the optimizer step; one is the peak.

    The first layers are checkpointed. Backward reaches them last, when what the other layers saved is freed, so that
    recomputing one adds to the peak only where nearly all layers are checkpointed.

    Args:
        tokens: of the largest micro-batch, padding included.
        checkpointed: number of layers.
        optimizer: its name in transformers.
        scale: factor for activations and temporary parts, from a measured step.
        accumulates: whether gradients of earlier micro-batches exist while a later one is computed. If not, gradients
            grow as activations are freed, and only the larger of both counts.
    """
    token, adapter_bytes = model.token, 4.0 * model.trained
    saving = model.layers - checkpointed
    activations = tokens * (token.outside + saving * token.layer + checkpointed * token.checkpointed_layer)
    recomputed = max(0.0, tokens * token.layer * (1 - saving)) if checkpointed else 0.0
    targets = min(tokens * model.targets, model.chunk_length or math.inf)
    logits = targets * model.bytes_per_target + min(targets, model.softmax_length) * model.bytes_per_softmax
    # Backward of an MLP has three gradients of its width at once: of the product, of the gate and of the other factor.
    beyond_logits = max(0.0, recomputed + 3 * tokens * token.widest - logits)
    stepping = MemoryNeed(
        weights=model.weights.total,
        adapter=adapter_bytes,
        gradients=adapter_bytes,
        optimizer=model.trained * get_resident_state_bytes(optimizer),
        activations=0.0,
        logits=0.0,
        buffers=adapter_bytes,  # Adam makes its update for all parameters at once
    )
    computing = stepping._replace(
        gradients=adapter_bytes if accumulates else 0.0,
        activations=activations * scale,
        logits=logits * scale,
        buffers=beyond_logits * scale + 2 * model.dequantized,
    )
    return computing, stepping


def compute_peak_memory(
    model: ModelCost, tokens: int, checkpointed: int, *, shards: int = 1, **settings: Any
) -> MemoryNeed:
    """Return the peak memory of one device in a step; arguments as for compute_memory_phases.

    The optimizer's state, and with it the update, is divided into `shards`.
    """
    computing, stepping = compute_memory_phases(model, tokens, checkpointed, **settings)
    optimizer = stepping.optimizer / shards
    stepping = stepping._replace(buffers=stepping.buffers / shards, optimizer=optimizer)
    return max(computing._replace(optimizer=optimizer), stepping, key=lambda phase: phase.total)


def count_layers_to_checkpoint(model: ModelCost, tokens: int, available: float, **settings: Any) -> int | None:
    """Return the fewest layers to checkpoint for a step to fit into `available` bytes beside weights and adapter.

    None if it does not fit with all of them; further arguments as for compute_peak_memory.
    """
    phases = (compute_peak_memory(model, tokens, count, **settings) for count in range(model.layers + 1))
    return next((count for count, phase in enumerate(phases) if phase.step_bytes <= available), None)


def _measure_weights(base: PreTrainedModel, quantization: BaseQuantization) -> tuple[WeightBytes, int]:
    """Return the bytes of the frozen base as it will be loaded, and the elements of its largest quantized weight."""
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


def _trace_model(model: Any, supervised_share: float) -> tuple[TokenBytes, int]:
    """Return the cost of a token, from rows of two lengths, and the number of layers."""
    base: PreTrainedModel = model.get_base_model()
    layers = get_repeated_layers(base)
    head = None if chunked_loss.explain_plain_loss(model) else chunked_loss.install_loss_head(model)
    model.train()
    short, long = (_trace_row(model, layers, head, tokens, supervised_share) for tokens in TRACED_TOKENS)
    added = TRACED_TOKENS[1] - TRACED_TOKENS[0]
    inside, outside, widest, flops = ((b - a) / added for a, b in zip(short, long, strict=True))
    layer_input = base.config.get_text_config().hidden_size * base.dtype.itemsize
    return TokenBytes(inside / max(1, len(layers)), layer_input, outside, widest, flops), len(layers)


def _trace_row(
    model: Any,
    layers: Sequence[torch.nn.Module],
    head: chunked_loss.LossHead | None,
    tokens: int,
    supervised_share: float,
) -> tuple[int, int, int, int]:
    """Return bytes that a row saves in layers and outside, bytes of a linear layer's widest output, and FLOPs."""
    counter = _SavedBytesCounter(model)
    handles = [layer.register_forward_pre_hook(counter.enter_layer) for layer in layers]
    handles += [layer.register_forward_hook(counter.leave_layer) for layer in layers]
    linear = [module for layer in layers for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    handles += [module.register_forward_hook(counter.see_output) for module in linear]
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    targets = torch.zeros(round(supervised_share * tokens), dtype=torch.long, device="meta")
    expecting = head.expecting(targets, targets) if head else contextlib.nullcontext()
    try:
        with counter, FlopCounterMode(display=False) as flops, expecting:
            model(input_ids=ids, position_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return counter.inside, counter.outside, counter.widest, flops.get_total_flops()


class _SavedBytesCounter(torch.autograd.graph.saved_tensors_hooks):
    """A counter of the bytes saved by autograd: each storage once, without the model's weights and buffers."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(self._count, lambda tensor: tensor)
        own = [*model.parameters(), *model.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in own}
        self._alive: list[Any] = []  # the address of a freed tensor would be used again
        self._in_layer = False
        self.inside = self.outside = self.widest = 0

    def enter_layer(self, *_: Any) -> None:
        self._in_layer = True

    def leave_layer(self, *_: Any) -> None:
        self._in_layer = False

    def see_output(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.widest = max(self.widest, output.numel() * output.element_size())

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._alive.append(tensor)
            if self._in_layer:
                self.inside += storage.nbytes()
            else:
                self.outside += storage.nbytes()
        return tensor
