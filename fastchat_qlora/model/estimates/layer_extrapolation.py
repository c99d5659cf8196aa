"""What a deep model needs, from two shallow ones: seconds become tenths where layers are all alike."""

import copy
from typing import Any

import torch
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel

from fastchat_qlora.model.estimates.memory import ModelCost
from fastchat_qlora.model.loading.base_model import get_repeated_layers

DEPTHS = (2, 3)
"""Layers of the shallow models; what the second has more is what a layer costs. The first layer is not like the others:
its input has no gradient."""

BY_POSITION = ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters")
"""Settings of an adapter that may treat a layer otherwise than its neighbours."""


def make_shallow_configs(
    config: PretrainedConfig, meta_model: PreTrainedModel, lora_config: LoraConfig
) -> tuple[PretrainedConfig, ...] | None:
    """The configurations of two shallow models that stand for a deep one; None where its layers are not all alike.

    Args:
        config: of the deep model.
        skeleton: made of it, without memory.
        lora_config: of the adapter, which must be the same in every layer too.
    """
    layers = get_repeated_layers(meta_model)
    alike = len({_describe(layer) for layer in layers}) == 1
    if not alike or len(layers) <= DEPTHS[1] or getattr(config, "num_hidden_layers", None) != len(layers):
        return None
    names = [lora_config.target_modules or (), lora_config.exclude_modules or (), lora_config.modules_to_save or ()]
    patterns = [name for name in names if isinstance(name, str) and name != "all-linear"]
    numbered = any(character.isdigit() for name in names if not isinstance(name, str) for character in "".join(name))
    if patterns or numbered or any(getattr(lora_config, name, None) for name in BY_POSITION):
        return None
    return tuple(_with_depth(config, depth) for depth in DEPTHS)


def _describe(layer: torch.nn.Module) -> str:
    """All that a layer's modules are: their kinds, shapes and settings, but for its own number."""
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


def _with_depth(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = depth
    if isinstance(types := getattr(shallow, "layer_types", None), list):
        shallow.layer_types = types[:depth]
    return shallow


def extrapolate_layers(few: ModelCost, more: ModelCost, layers: int) -> ModelCost:
    """What a model of so many layers needs, from two of DEPTHS layers.

    Whatever is counted in total grows by the same for every layer; what is counted for one layer is a mean, in which
    the first layer has the weight that it has in the deep model.
    """
    first, second = DEPTHS

    def grown(a: float, b: float) -> Any:
        return a + (layers - first) * (b - a)

    inside = grown(first * few.token.layer, second * more.token.layer)
    token = more.token._replace(layer=inside / layers, flops=grown(few.token.flops, more.token.flops))
    weights = more.weights._replace(
        total=grown(few.weights.total, more.weights.total),
        constants=grown(few.weights.constants, more.weights.constants),
    )
    return more._replace(layers=layers, token=token, weights=weights, trained=grown(few.trained, more.trained))
