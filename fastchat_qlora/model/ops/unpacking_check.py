"""Check that weights in 4 bits are unpacked to the values that they stand for."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.ops.experts import make_state, unpack, unpack_absmax

CHECKED_ROWS = 64  # of a layer, so that they are whole blocks whatever its width
MAX_ERROR = 1e-2  # relative; bf16 rounds by 2e-3, NF4 itself by 9e-2


class _Layer(NamedTuple):
    """The first rows of a packed weight."""

    packed: torch.Tensor
    state: Any  # bitsandbytes' QuantState


def check_unpacking(model: torch.nn.Module, unpack: Callable[..., torch.Tensor] = unpack) -> None:
    """Require that `unpack` returns what a table of the 16 values gives, for one layer of each width.

    bitsandbytes (0.50.2) is wrong by 20 to 36 % on CPUs with AVX-512 where a layer's inputs are a multiple of 16 and
    not of 64, and raises nothing. This can go once it is right.

    Raises:
        UserError: a layer is unpacked to other values.
    """
    for width, (packed, state) in _choose_layers(model).items():
        expected = unpack_by_table(packed, state)
        error = float((unpack(packed, state).float() - expected).norm() / expected.norm())
        if not error <= MAX_ERROR:
            raise UserError(
                f"--q_lora True: bitsandbytes unpacks 4-bit weights of {width:,} inputs wrongly on this machine, by "
                f"{error:.0%} of their values; use --q_lora False, another version of bitsandbytes, or a GPU"
            )


def unpack_by_table(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return the weights by their definition, in fp32: a value of the table times the scale of its block of weights."""
    data = packed.detach().view(torch.uint8).flatten()
    values: torch.Tensor = state.code[torch.stack([data >> 4, data & 15], dim=1).flatten().long()].float()
    scales = unpack_absmax(state).repeat_interleave(state.blocksize)[: values.numel()]
    return (values * scales).view(state.shape)


def _choose_layers(model: torch.nn.Module) -> dict[int, _Layer]:
    """Return inputs -> the first rows of a linear layer with so many."""
    found = dict[int, _Layer]()
    for weight, state in _iterate_packed(model):
        width = state.shape[-1]
        is_whole = weight.numel() * weight.element_size() * 2 == state.shape.numel()  # no strategy has sharded it
        if width not in found and is_whole and len(state.shape) == 2 and len(weight):
            found[width] = _cut_rows(weight, state)
    return found


def _iterate_packed(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, Any]]:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and (state := getattr(weight, "quant_state", None)) is not None:
            yield weight, state


def _cut_rows(weight: torch.Tensor, state: Any) -> _Layer:
    rows, width = min(CHECKED_ROWS, state.shape[0]), state.shape[1]
    blocks = -(-rows * width // state.blocksize)
    data = weight.detach().view(torch.uint8).flatten()[: rows * width // 2]
    return _Layer(data[:, None], make_state(state, unpack_absmax(state)[:blocks], (rows, width)))
