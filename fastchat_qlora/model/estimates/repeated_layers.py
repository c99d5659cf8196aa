"""The layers of a model by kind, and a model in which only two layers of each kind compute."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map

COMPUTED = 2  # layers of a kind: the input of a model's first layer needs no gradient, so that it saves less


def describe_layer(layer: torch.nn.Module) -> str:
    """Return the classes, shapes and settings of all modules of a layer, without its index."""
    described = []
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | bool | tuple) and key != "layer_idx"
        }
        shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)}
        described.append((name, type(module).__name__, sorted(settings.items(), key=str), shapes))
    return str(described)


@contextmanager
def repeat_layers(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> Iterator[dict[torch.nn.Module, int]]:
    """Replace all layers but two of each kind within the block, and yield layer -> layers that it stands for."""
    names = {module: name for name, module in model.named_modules()}
    kinds = defaultdict[str, list[torch.nn.Module]](list)
    for layer in layers:
        kinds[describe_layer(layer)].append(layer)
    stands_for = {layer: 1 for kind in kinds.values() for layer in kind[:COMPUTED]}
    replaced = []
    for kind in kinds.values():
        last = kind[:COMPUTED][-1]
        stands_for[last] += len(kind[COMPUTED:])
        replaced += [(layer, _Repetition(layer, last)) for layer in kind[COMPUTED:]]
    try:
        for layer, repetition in replaced:
            model.set_submodule(names[layer], repetition)
        yield stands_for
    finally:
        for layer, repetition in replaced:
            model.set_submodule(names[layer], layer)
            repetition.hook.remove()


class _Repetition(torch.nn.Module):
    """A layer that returns what another one of its kind has returned."""

    def __init__(self, replaced: torch.nn.Module, computed: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["replaced"] = replaced  # no submodule
        self.hook = computed.register_forward_hook(self._keep)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["replaced"], name)

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.__dict__["output"] = output

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return copies of the output."""
        return tree_map(
            lambda value: value.clone() if isinstance(value, torch.Tensor) else value, self.__dict__["output"]
        )
