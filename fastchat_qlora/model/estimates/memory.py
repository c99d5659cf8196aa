"""A model without weights -> the memory that a run will need, by part.

    peak = weights + adapter + gradients + optimizer + activations + logits + buffers

Activations do not follow a formula for one family of models but are counted: the model is built on torch's meta device,
a few tokens are sent through it, and every tensor that autograd saves is added up, layer by layer. The count holds for
any architecture and includes dropout, norms and adapters as they are. For a Llama in bf16 with adapters on all linear
layers and no dropout it gives the 12 h + 4 k + 6 f bytes for each token and layer that one derives by hand (h: hidden
size, k: key heads times head size, f: size of the MLP).

Rows of three lengths tell what exists once, what every token adds, and what every pair of tokens of a conversation
adds: the scores of attention that no kernel computes in blocks.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from fastchat_qlora.model.adapter.lora import get_trainable_parameters
from fastchat_qlora.model.attention.attention import attend_per_conversation
from fastchat_qlora.model.estimates.optimizer_state import get_resident_state_bytes
from fastchat_qlora.model.estimates.repeated_layers import repeat_layers
from fastchat_qlora.model.loading.base_model import get_context_length, get_repeated_layers
from fastchat_qlora.model.ops import chunked_loss
from fastchat_qlora.model.ops.cpu_products import get_product_dtype
from fastchat_qlora.model.ops.meta_forward import run_on_meta
from fastchat_qlora.model.quantization.base_quantization import NOT_QUANTIZED, BaseQuantization
from fastchat_qlora.model.quantization.quantizer import find_packed, is_converted

TRACED_TOKENS = 256
"""Of the shortest of three rows, if the model has positions for all; state space models compute as many at once."""


class TokenBytes(NamedTuple):
    """Bytes saved by autograd for one token, and the FLOPs of its forward pass."""

    layer: float  # in a layer that is not checkpointed, in a conversation of the longest; the mean over all layers
    checkpointed_layer: float  # its input
    outside: float  # of the layers: embeddings, last norm, head and loss
    widest: float  # tensor saved in a layer, such as the output of its widest linear layer
    flops: float  # without attention's own products
    attention: dict[int, float]  # size of the window, 0 for none -> FLOPs for each key in it, of all layers together


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
    dequantized: float  # bytes of the largest quantized weight that is dequantized at once


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


class _TracedAttention:
    """An attention function that saves as the run's does, and counts the FLOPs for each key by size of the window.

    On a CPU, and everywhere with attention sinks, `attend_in_blocks` saves its inputs only. Capped scores are computed
    as they are in the run.
    """

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        self._in_blocks = device_type == "cpu"
        self.flops: Counter[int] = Counter()
        self.name = f"traced_{device_type}_{dtype}"
        self.masked_name = f"{self.name}_masked"  # for models that select keys in a mask, such as sparse attention
        AttentionMaskInterface.register(self.masked_name, sdpa_mask)
        for name in (self.name, self.masked_name):
            AttentionInterface.register(name, self.attend)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        **settings: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return a tensor of the shape of the output, and no weights."""
        if settings.get("softcap") is not None:
            tokens = query.shape[2]
            boundaries = torch.empty(2, dtype=torch.int32, device=query.device)
            settings |= {"cu_seq_lens_q": boundaries, "max_length_q": tokens, "conversation_lengths": [tokens]}
            return attend_per_conversation(module, query, key, value, None, **settings)
        width = query.shape[1] * (query.shape[3] + value.shape[3])
        self.flops[settings.get("sliding_window") or 0] += 2 * width
        saves_output = not self._in_blocks and settings.get("s_aux") is None
        output: torch.Tensor = _SaveAsAttention.apply(query, key, value, saves_output)  # type: ignore[no-untyped-call]
        return output, None


def measure_model_cost(
    model: Any,
    *,
    supervised_share: float,
    longest: int = TRACED_TOKENS,
    quantization: BaseQuantization = NOT_QUANTIZED,
    device_type: str = "cpu",
) -> ModelCost:
    """Count the cost of a model.

    Args:
        model: a PeftModel on the meta device, in the compute dtype of the run; it is used up.
        supervised_share: targets per token.
        longest: tokens of the longest conversation.
        quantization: of the base model when it will be loaded.
        device_type: of the run's device, which decides on the size of a chunk of logits.

    Raises:
        Exception: any error of a model that cannot run on the meta device.
    """
    base: PreTrainedModel = model.get_base_model()
    vocabulary, size = base.get_output_embeddings().weight.shape[0], base.dtype.itemsize
    weights, largest = _measure_weights(base, quantization, device_type)
    chunked = not chunked_loss.explain_plain_loss(model)
    product_size = get_product_dtype(base.dtype, torch.device(device_type)).itemsize
    attention = _TracedAttention(device_type, base.dtype)
    token, layers = _trace_model(model, attention, supervised_share, longest)
    return ModelCost(
        layers=layers,
        token=token,
        weights=weights,
        itemsize=size,
        trained=sum(parameter.numel() for parameter in get_trainable_parameters(model).values()),
        targets=supervised_share,
        bytes_per_target=float(vocabulary * (product_size if chunked else 12 + 2 * size)),
        chunk_length=chunked_loss.get_chunk_length(vocabulary, device_type) if chunked else None,
        bytes_per_softmax=4.0 * vocabulary if chunked and product_size < 4 else 0.0,
        softmax_length=chunked_loss.get_softmax_length(vocabulary, device_type),
        dequantized=largest * (size + product_size) / 2,
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


def _measure_weights(
    base: PreTrainedModel, quantization: BaseQuantization, device_type: str
) -> tuple[WeightBytes, int]:
    """Return the bytes of the frozen base as it will be loaded, and most elements that are dequantized at once."""
    packed = _find_packed(base, quantization)
    sizes = {
        id(p): math.ceil(p.numel() * quantization.bytes_per_weight) if id(p) in packed else p.numel() * p.element_size()
        for p in base.parameters()
        if not p.requires_grad
    }
    counted = set[int]()  # layers may share weights
    layers = []
    for layer in get_repeated_layers(base):
        own = {id(p) for p in layer.parameters() if id(p) in sizes}
        layers.append((sum(sizes[key] for key in own), sum(sizes[key] for key in own - counted)))
        counted |= own
    scales = sum(p.numel() for p in packed.values()) * (quantization.bytes_per_weight - 0.5)
    total = sum(sizes.values())
    outside = total - sum(own for _, own in layers)
    largest = max((whole for whole, _ in layers), default=0)
    weights = WeightBytes(total, largest, outside, scales if quantization.is_4bit else 0.0)
    at_once = (p[0] if p.ndim == 3 and device_type == "cpu" else p for p in packed.values())  # an expert at a time
    return weights, max((p.numel() for p in at_once), default=0)


def _find_packed(base: PreTrainedModel, quantization: BaseQuantization) -> dict[int, torch.nn.Parameter]:
    """Return id -> weight of those that will be quantized: by transformers those of plain linear layers only."""
    if not quantization.is_quantized:
        return {}
    if quantization.is_4bit and not quantization.is_as_published:
        found = [*find_packed(base).values()]
    else:
        head, kept = base.get_output_embeddings(), base._keep_in_fp32_modules or ()
        linear = ((name, m) for name, m in base.named_modules() if type(m) in (torch.nn.Linear, Conv1D))
        found = [module.weight for name, module in linear if module is not head and is_converted(name, kept)]
    return {id(weight): weight for weight in found if not weight.requires_grad}  # without an adapter's own


class _Trace(NamedTuple):
    """Counts of one row."""

    inside: float  # bytes saved in layers
    outside: float  # bytes saved elsewhere
    widest: float  # bytes of the largest tensor saved in a layer
    flops: float


def _trace_model(
    model: Any, attention: _TracedAttention, supervised_share: float, longest: int
) -> tuple[TokenBytes, int]:
    """Return the cost of a token, from rows of three lengths, and the number of layers."""
    base: PreTrainedModel = model.get_base_model()
    layers = get_repeated_layers(base)
    head = None if chunked_loss.explain_plain_loss(model) else chunked_loss.install_loss_head(model)
    model.train()
    shortest = min(TRACED_TOKENS, (get_context_length(base.config) or 3 * TRACED_TOKENS) // 3)
    lengths = [shortest, 2 * shortest, 3 * shortest]

    def trace(stands_for: Mapping[torch.nn.Module, int]) -> list[_Trace]:
        attention.flops.clear()
        return [_trace_row(model, stands_for, attention, head, tokens, supervised_share) for tokens in lengths]

    base.set_attn_implementation(attention.name)
    try:
        with repeat_layers(base, layers) as stands_for:
            rows = trace(stands_for)
    except Exception:  # layers that read what others keep must all be computed, or some need a mask
        base.set_attn_implementation(attention.masked_name)
        rows = trace(dict.fromkeys(layers, 1))
    inside, outside, widest, flops = (_fit_quadratic(lengths, counts) for counts in zip(*rows, strict=True))
    keys = {window: count / len(lengths) for window, count in attention.flops.items()}
    # What is computed for all pairs of tokens is computed for twice the keys that causal attention has.
    keys[0] = keys.get(0, 0.0) + 2 * flops.pair
    token = TokenBytes(
        layer=inside.add_up(longest) / max(1, len(layers)),
        checkpointed_layer=base.config.get_text_config().hidden_size * base.dtype.itemsize,
        outside=outside.add_up(longest),
        widest=widest.add_up(longest),
        flops=flops.token,
        attention=keys,
    )
    return token, len(layers)


class _Growth(NamedTuple):
    """What a token adds to a count."""

    token: float
    pair: float  # for each token of its row

    def add_up(self, tokens: int) -> float:
        """Return what a token adds in a row of `tokens`."""
        return self.token + self.pair * tokens


def _fit_quadratic(lengths: Sequence[int], counts: Sequence[float]) -> _Growth:
    """Return what a token adds, from the counts of three rows."""
    (a, b, c), (x, y, z) = lengths, counts
    first, second = (y - x) / (b - a), (z - y) / (c - b)
    pair = (second - first) / (c - a)
    return _Growth(first - pair * (a + b), pair)


def _trace_row(
    model: Any,
    stands_for: Mapping[torch.nn.Module, int],
    attention: _TracedAttention,
    head: chunked_loss.LossHead | None,
    tokens: int,
    supervised_share: float,
) -> _Trace:
    """Return the counts of a row of tokens, where a layer counts for all that it stands for."""
    flops = FlopCounterMode(display=False)
    counter = _SavedBytesCounter(model, flops, attention, stands_for)
    handles = [layer.register_forward_pre_hook(counter.enter_layer) for layer in stands_for]
    handles += [layer.register_forward_hook(counter.leave_layer) for layer in stands_for]
    targets = torch.zeros(round(supervised_share * tokens), dtype=torch.long, device="meta")
    expecting = head.expecting(targets, targets) if head else contextlib.nullcontext()
    try:
        with counter, flops, expecting:
            run_on_meta(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return _Trace(counter.inside, counter.outside, counter.widest, counter.flops)


class _SavedBytesCounter(torch.autograd.graph.saved_tensors_hooks):
    """A counter of the bytes saved by autograd: each storage once, without the model's weights and buffers."""

    def __init__(
        self,
        model: torch.nn.Module,
        flops: FlopCounterMode,
        attention: _TracedAttention,
        stands_for: Mapping[torch.nn.Module, int],
    ) -> None:
        super().__init__(self._count, lambda tensor: tensor)
        own = [*model.parameters(), *model.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in own}
        self._alive: list[Any] = []  # the address of a freed tensor would be used again
        self._counter, self._attention, self._stands_for = flops, attention, stands_for
        self._before: tuple[int, int, Counter[int]] | None = None  # counts when a layer began; None outside of layers
        self._repeated = 0  # FLOPs of layers that do not compute
        self.inside = self.outside = self.widest = 0

    @property
    def flops(self) -> int:
        """FLOPs of all layers and outside."""
        return self._counter.get_total_flops() + self._repeated

    def enter_layer(self, *_: Any) -> None:
        """Keep the counts at the beginning of a layer."""
        self._before = self.inside, self._counter.get_total_flops(), self._attention.flops.copy()

    def leave_layer(self, layer: torch.nn.Module, *_: Any) -> None:
        """Add the counts of the layers that this one stands for."""
        assert self._before is not None
        (saved, flops, attention), more = self._before, self._stands_for[layer] - 1
        self._before = None
        self.inside += more * (self.inside - saved)
        self._repeated += more * (self._counter.get_total_flops() - flops)
        for window, count in self._attention.flops.items():
            self._attention.flops[window] += more * (count - attention[window])

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._alive.append(tensor)
            if self._before is not None:
                self.inside += storage.nbytes()
                # Of gate and up in one tensor each is saved as a view; their gradients are tensors of their own.
                self.widest = max(self.widest, min(storage.nbytes(), tensor.nbytes))
            else:
                self.outside += storage.nbytes()
        return tensor
