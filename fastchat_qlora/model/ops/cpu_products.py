"""Products of frozen half-precision weights in fp32, on CPUs that multiply faster in it.

Without matrix units for bf16, oneDNN multiplies in it at half the speed of fp32, at a fifth without AVX512-BF16. A
weight is cast a block at a time, so that no fp32 copy of it exists, and results are rounded once, at the end.
"""

import functools
import platform
from typing import Any

import torch

HALF = (torch.bfloat16, torch.float16)
LEAST_ROWS = 64  # of an input; with fewer, casting the weight takes longer than is gained
BLOCK_WEIGHTS = 2**20  # cast at a time; with 4 MiB, the allocator gives the same pages again and again


@functools.cache
def multiplies_fast_in_bf16() -> bool:
    """Return whether this CPU has matrix units for bf16.

    Without AMX, oneDNN's products in bf16 take twice as long as those in fp32, with AVX512-BF16 as well.
    """
    if platform.machine().lower() in {"x86_64", "amd64"}:
        return bool(torch.cpu._is_amx_tile_supported())
    return has_bf16_kernels()


def has_bf16_kernels() -> bool:
    """Return whether oneDNN multiplies bf16 on this CPU; torch's own kernels are many times slower than fp32."""
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())  # torch may lack oneDNN


def get_product_dtype(dtype: torch.dtype, device: torch.device, rows: int = LEAST_ROWS) -> torch.dtype:
    """Return the dtype of products of so many rows: fp32 on a CPU that multiplies faster in it than in half precision.

    The default is as many as take it.
    """
    if device.type != "cpu" or dtype not in HALF or rows < LEAST_ROWS:
        return dtype
    return dtype if dtype == torch.bfloat16 and multiplies_fast_in_bf16() else torch.float32


def multiply_by_transpose(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return rows @ weight.T in the dtype of the rows, shape (rows, outputs), for a weight (outputs, inputs)."""
    product = rows.new_empty(len(rows), len(weight))
    for part in _split_weight(weight):
        torch.mm(rows, weight[part].to(rows.dtype).t(), out=product[:, part])
    return product


def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return rows @ weight in the dtype of the rows, shape (rows, inputs), for a weight (outputs, inputs)."""
    first, *others = _split_weight(weight)
    product = rows[:, first] @ weight[first].to(rows.dtype)
    for part in others:
        product.addmm_(rows[:, part], weight[part].to(rows.dtype))
    return product


def _split_weight(weight: torch.Tensor) -> list[slice]:
    length = max(1, BLOCK_WEIGHTS // weight.shape[1])
    return [slice(start, start + length) for start in range(0, len(weight), length)]


class FrozenLinear(torch.nn.Linear):
    """A frozen linear layer, whose output is rounded once, from the sum of its products and its bias in fp32."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output, shape (..., out_features)."""
        is_slow = get_product_dtype(x.dtype, x.device, x.shape[:-1].numel()) != x.dtype
        is_trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if not is_slow or is_trained or x.dtype != self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # which would cast to half precision again
            output: torch.Tensor = _FrozenProduct.apply(x.flatten(0, -2), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output if x.ndim == 2 else output.view(*x.shape[:-1], -1)


class _FrozenProduct(torch.autograd.Function):
    """The function x @ weight.T + bias for an x of shape (rows, inputs), of which backward needs the weight only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        product = multiply_by_transpose(x.float(), weight)
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return multiply(grad_outputs[0].float(), weight).to(grad_outputs[0].dtype), None, None
