"""The best rates of the device, and the time of single pieces of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from gpu_clock import GIB, give_back, median_ms, peak_gib, reset_peak
from gpu_model import DTYPE, Size, draw_conversations, make_base
from gpu_training import attempt

from fastchat_qlora.model.attention import attention
from fastchat_qlora.model.attention.tree_attention import VarlenInputs, supports_varlen
from fastchat_qlora.model.ops import chunked_loss as loss
from fastchat_qlora.model.ops.lora_linear import EfficientLoraLinear

CHUNK_BYTES = (2**28, 2**29, 2**30)
"""Sizes of a chunk's fp32 logits to compare; the second is the one that chunked_loss.py uses on an accelerator."""


def measure_ceilings(
    size: Size, device: torch.device, *, max_length: int, scale: float, tiny: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the measurement of each piece."""
    rows = draw_conversations(200, max_length, size.vocabulary, scale=scale).packed(4 * max_length)
    lengths = rows.conversations.lengths[next(iter(rows.sampler))].tolist()
    pieces: dict[str, Callable[[], dict[str, Any]]] = {
        "GEMM": lambda: _gemm(256 if tiny else 8192, device),
        "copy": lambda: _copy(2**20 if tiny else 2 * GIB, device),
        "dequantization": lambda: _dequantization(size, device),
        "adapter": lambda: _adapter(size, 4 * max_length, device),
        "attention": lambda: _attention(size, lengths, device),
        "loss head": lambda: _loss_head(size, 2 * max_length, device),
    }
    for name, piece in pieces.items():
        yield name, attempt(piece)
        give_back(device)


def _random(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE)


def _gemm(width: int, device: torch.device) -> dict[str, Any]:
    a, b = _random(width, width, device=device), _random(width, width, device=device)
    ms = median_ms(lambda: a @ b, device, repeats=20)
    return {"shape": f"{width}^3, bf16, random", "ms": ms, "tflops": 2 * width**3 / ms / 1e9}


def _copy(count: int, device: torch.device) -> dict[str, Any]:
    source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), device)
    return {"bytes": f"{count} read and as many written", "ms": ms, "terabytes_per_second": 2 * count / ms / 1e9}


def _dequantization(size: Size, device: torch.device) -> dict[str, Any]:
    """Time the dequantization of all 4-bit weights: of one layer, times the layers."""
    import bitsandbytes

    model = make_base(size._replace(layers=1), device, quantized=True, attention=None)
    weights = [module.weight for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    ms = median_ms(lambda: [bitsandbytes.functional.dequantize_4bit(w.data, w.quant_state) for w in weights], device)
    return {"ms of one layer": ms, "ms": ms * size.layers, "weights": len(weights) * size.layers}


def _adapter(size: Size, tokens: int, device: torch.device) -> dict[str, Any]:
    """Time forward and backward of the widest linear layer: alone, with our LoRA layer, and with PEFT's."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = torch.nn.Linear(size.hidden, size.intermediate, bias=False, device=device, dtype=DTYPE).requires_grad_(False)
    config = LoraConfig(r=16, lora_alpha=32)
    x = _random(1, tokens, size.hidden, device=device).requires_grad_()
    layers: dict[str, torch.nn.Module] = {"no adapter": base}
    layers |= {
        name: cls(base, "default", config, r=16) for name, cls in (("ours", EfficientLoraLinear), ("PEFT", Linear))
    }
    upper = _random(1, tokens, size.intermediate, device=device)
    found = {"tokens": tokens}
    for name, layer in layers.items():
        layer.to(device)
        autocast = torch.autocast(device.type, dtype=DTYPE, enabled=name == "PEFT")

        def step(layer: torch.nn.Module = layer, autocast: Any = autocast) -> None:
            with autocast:
                output = layer(x)
            output.backward(upper)

        found[f"{name}, ms"] = median_ms(step, device)
    return found


def _attention(size: Size, lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Time one layer's attention, forward and backward: by conversation, and with a mask over the packed sequence."""
    width, tokens = size.hidden // size.heads, sum(lengths)
    query, upper = (_random(1, size.heads, tokens, width, device=device) for _ in range(2))
    key, value = (_random(1, size.key_heads, tokens, width, device=device) for _ in range(2))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    where = {"cu_seq_lens_q": boundaries, "max_length_q": max(lengths), "conversation_lengths": lengths}
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    mask = (owner[:, None] == owner).tril_()[None, None]
    groups = size.heads // size.key_heads

    def by_conversation() -> None:
        output, _ = attention.attend_per_conversation(torch.nn.Module(), query, key, value, None, **where)
        output.transpose(1, 2).backward(upper)

    def masked() -> None:
        # As transformers calls it: with a mask, key heads are repeated.
        repeated = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        F.scaled_dot_product_attention(query, *repeated, attn_mask=mask).backward(upper)

    inputs_of_kernel = VarlenInputs(boundaries, boundaries, max(lengths), max(lengths), None)
    fits = supports_varlen(query, value, inputs_of_kernel)
    return {
        "tokens": tokens,
        "conversations": len(lengths),
        "kernel": "varlen_attn" if fits else "sdpa, one by one",
        "by conversation, ms": _with_gradients(by_conversation, inputs, device),
        "sdpa with a mask, ms": _with_gradients(masked, inputs, device),
    }


def _with_gradients(work: Callable[[], None], inputs: list[torch.Tensor], device: torch.device) -> float:
    def fresh() -> None:
        for tensor in inputs:
            tensor.grad = None
        work()

    return median_ms(fresh, device)


def _loss_head(size: Size, tokens: int, device: torch.device) -> dict[str, Any]:
    """Time forward and backward from hidden states to the mean loss, for as many targets as ShareGPT has."""
    head = torch.nn.Linear(size.hidden, size.vocabulary, bias=False, device=device, dtype=DTYPE).requires_grad_(False)
    hidden = _random(1, tokens, size.hidden, device=device).requires_grad_()
    supervised = torch.arange(math.ceil(0.22 * tokens), tokens, device=device)
    labels = torch.randint(size.vocabulary, (len(supervised),), device=device)
    ours = loss.LossHead(head)

    def in_chunks() -> None:
        with ours.expecting(supervised, labels):
            ours(hidden).mean().backward()

    def plain() -> None:
        logits = head(hidden)[0].float()
        targets = torch.full((tokens,), -100, device=device).index_put((supervised,), labels)
        F.cross_entropy(logits, targets).backward()

    found: dict[str, Any] = {"tokens": tokens, "targets": len(supervised)}
    for size_in_bytes in CHUNK_BYTES:
        with patch.object(loss, "LOGITS_BYTES_ON_ACCELERATOR", size_in_bytes):
            found |= _timed(f"chunks of {size_in_bytes // 2**20} MiB", in_chunks, hidden, device)
    return found | _timed("plain cross entropy", plain, hidden, device)


def _timed(name: str, work: Callable[[], None], hidden: torch.Tensor, device: torch.device) -> dict[str, Any]:
    give_back(device)
    reset_peak(device)
    before = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    ms = _with_gradients(work, [hidden], device)
    peak = peak_gib(device)["allocated_gib"]
    return {f"{name}, ms": ms} | ({} if peak is None else {f"{name}, GiB on top": peak - before})
