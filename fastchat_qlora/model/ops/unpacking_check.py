"""Check that bitsandbytes unpacks weights in 4 bits to the values that they stand for."""

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.ops.experts import get_quant_states, is_served, unpack_absmax

CHECKED_ROWS = 64  # of a layer, so that they are whole blocks whatever its width
MAX_ERROR = 1e-2  # relative; bf16 rounds by 2e-3, NF4 itself by 9e-2


class Packing(NamedTuple):
    """What decides how weights in 4 bits are unpacked."""

    width: int  # inputs of a layer
    kind: str
    dtype: torch.dtype
    device: torch.device
    blocksize: int = 64  # bitsandbytes' own


def check_unpacking(
    flag: str, layers: Iterable[tuple[str, Packing]], unpack: Callable[..., torch.Tensor] | None = None
) -> None:
    """Require that bitsandbytes unpacks the layers of these names to what a table of the 16 values gives.

    bitsandbytes (0.50.2) is wrong by up to a third on CPUs with AVX-512 where a layer's inputs are a multiple of 16 and
    not of the block's 64, and raises nothing. This can go once it is right; see `findings/unpacking_avx512.sh`.

    Raises:
        UserError: a layer is unpacked to other values.
    """
    checked = set[Packing]()
    for name, packing in layers:
        if packing not in checked and not (error := _measure_error(packing, unpack)) <= MAX_ERROR:
            raise UserError(
                f"{flag}: bitsandbytes {version('bitsandbytes')} unpacks 4-bit weights of {packing.width:,} inputs, "
                f"such as {name}, wrongly on this machine, by {error:.0%} of their values; load them in 16 bits "
                "(--q_lora False; --dequantize_base True if they are published in 4 bits; --quantization none in chat "
                "and merge), use another version of bitsandbytes, or a GPU"
            )
        checked.add(packing)


def unpack_by_table(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return the weights by their definition, in fp32: a value of the table times the scale of its block of weights."""
    data = packed.detach().view(torch.uint8).flatten()
    values: torch.Tensor = state.code[torch.stack([data >> 4, data & 15], dim=1).flatten().long()].float()
    values = values[: state.shape.numel()]  # half a byte is left over where their number is odd
    scales = unpack_absmax(state).repeat_interleave(state.blocksize)[: values.numel()]
    return (values * scales).view(state.shape)


def find_packings(model: torch.nn.Module) -> Iterator[tuple[str, Packing]]:
    """Yield name -> packing of a loaded model's linear layers, and of experts that bitsandbytes unpacks."""
    for name, module in model.named_modules():
        states = {} if is_served(module) else get_quant_states(module)
        for state in (*states.values(), getattr(getattr(module, "weight", None), "quant_state", None)):
            if state is not None:
                device = state.absmax.device
                yield name, Packing(state.shape[-1], state.quant_type, state.dtype, device, state.blocksize)


def _measure_error(packing: Packing, unpack: Callable[..., torch.Tensor] | None) -> float:
    """Return the relative error with which random weights are unpacked, of scales that differ from block to block."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    width, kind, dtype, device, blocksize = packing
    shape, random = torch.Size((CHECKED_ROWS, width)), torch.Generator().manual_seed(0)
    packed = torch.randint(256, (shape.numel() // 2, 1), dtype=torch.uint8, generator=random).to(device)
    absmax = (0.5 + torch.rand(-(-shape.numel() // blocksize), generator=random)).to(device)
    code = get_4bit_type(kind, device=device)
    state = QuantState(absmax=absmax, shape=shape, code=code, blocksize=blocksize, quant_type=kind, dtype=dtype)
    expected = unpack_by_table(packed, state)
    return float(((unpack or dequantize_4bit)(packed, state).float() - expected).norm() / expected.norm())
