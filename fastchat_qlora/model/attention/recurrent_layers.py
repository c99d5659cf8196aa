"""Recurrent layers and short convolutions that start over with each conversation of a packed sequence."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

PACKING_ARGUMENTS = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "conversation_lengths",
    "seq_idx",
)
"""Names under which layers are given the boundaries of conversations; a single conversation has none."""


class Boundaries:
    """The lengths of the conversations that a model computes, in one sequence; none for a padded batch."""

    def __init__(self) -> None:
        self.lengths: tuple[int, ...] = ()

    def read(self, _: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Read them from a model's inputs, as a hook before its forward."""
        lengths, ends = kwargs.get("conversation_lengths"), kwargs.get("cu_seq_lens_q")
        if lengths is None and ends is not None:
            lengths = ends.diff().tolist()
        self.lengths = tuple(lengths or ())


class _PerConversation(torch.nn.Module):
    """The part of a class whose forward computes a packed sequence one conversation after another."""

    boundaries: Boundaries

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled again for other lengths
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the original layer returns, with tokens in dimension 1."""
        lengths = self.boundaries.lengths
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if not lengths or hidden.shape[:2] != (1, sum(lengths)):
            return super().forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in PACKING_ARGUMENTS}
        outputs = [
            super(_PerConversation, self).forward(*own_args, **own_kwargs)
            for own_args, own_kwargs in zip(_split(args, lengths), _split(kwargs, lengths), strict=True)
        ]
        return _join(outputs, lengths, hidden.ndim)


def _split(value: Any, lengths: Sequence[int]) -> list[Any]:
    """Return each conversation's part of a value: of tensors with tokens in dimension 1, nested ones too."""
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == sum(lengths):
        return list(torch.split(value, list(lengths), dim=1))
    if isinstance(value, tuple | list):
        items = [_split(item, lengths) for item in value]
        return [type(value)(part) for part in zip(*items, strict=True)] if value else [value] * len(lengths)
    if isinstance(value, dict):
        parts = [_split(item, lengths) for item in value.values()]
        return [dict(zip(value, part, strict=True)) for part in zip(*parts, strict=True)] or [{}] * len(lengths)
    return [value] * len(lengths)


def _join(outputs: list[Any], lengths: Sequence[int], ndim: int) -> Any:
    """Return the outputs of conversations as one; of what has no tokens, such as a state, the last.

    What has tokens has as many dimensions as the hidden states, `ndim`: a state may be as wide as conversations are
    long.
    """
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_join(list(parts), lengths, ndim) for parts in zip(*outputs, strict=True))
    if not isinstance(first, torch.Tensor) or first.ndim != ndim:
        return outputs[-1]
    return torch.cat(outputs, dim=1) if [output.shape[1] for output in outputs] == list(lengths) else outputs[-1]


def split_recurrent_layers(model: torch.nn.Module) -> None:
    """Replace a model's recurrent layers by ones that start over with each conversation.

    transformers passes boundaries of conversations to kernels of other packages, if they are installed. Its own code
    (5.23) refuses or ignores them, and some layers, such as MiniMax's and Mamba's, have no argument for them.
    A new layer has the parameters, names and hooks of the old one, and a class derived from that of the old one.
    """
    boundaries, classes, replaced = Boundaries(), dict[type, type](), set[int]()
    for name, module in list(model.named_modules()):
        if id(module) not in replaced and _keeps_state(module):
            replaced |= {id(each) for each in module.modules()}  # those within it get one conversation at a time
            split_class = classes.setdefault(type(module), _make_split_class(type(module)))
            model.set_submodule(name, _make_split(module, split_class, boundaries))
    if replaced:
        model.register_forward_pre_hook(boundaries.read, with_kwargs=True)


def has_recurrent_layers(model: torch.nn.Module) -> bool:
    """Return whether a model has layers that start over with each conversation."""
    return any(map(_keeps_state, model.modules()))


def _keeps_state(module: torch.nn.Module) -> bool:
    """Return whether a layer carries something from token to token other than by attention."""
    convolves = any(isinstance(child, torch.nn.Conv1d) and child.groups > 1 for child in module.children())
    decays = "A_log" in dict(module.named_parameters(recurse=False))
    is_linear = getattr(module, "layer_type", "") == "linear_attention"
    return convolves or decays or (is_linear and not isinstance(module, GradientCheckpointingLayer))


def _make_split_class(original: type) -> type:
    """Return a derived class with the name of the original one, under which FSDP2 looks for it."""
    return type(original.__name__, (_PerConversation, original), {"__module__": original.__module__})


def _make_split(module: torch.nn.Module, split_class: type, boundaries: Boundaries) -> torch.nn.Module:
    split = cast(torch.nn.Module, object.__new__(split_class))
    vars(split).update(vars(module), boundaries=boundaries)
    return split
