"""The cost of a deep model from two shallow ones, where all layers are alike."""

import copy

from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel

from fastchat_qlora.model.estimates.memory import ModelCost
from fastchat_qlora.model.estimates.repeated_layers import describe_layer
from fastchat_qlora.model.loading.base_model import get_repeated_layers

SHALLOW_DEPTHS = (2, 3)  # not 1, since the first layer is not like the others: its input needs no gradient

LAYER_SPECIFIC_FIELDS = ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters")
"""Fields of a LoraConfig that may make a layer differ from its neighbors."""


def make_shallow_configs(
    config: PretrainedConfig, meta_model: PreTrainedModel, lora_config: LoraConfig
) -> tuple[PretrainedConfig, ...] | None:
    """Return the configurations of two shallow models that represent a deep one.

    None where its layers or the adapter's modules in them differ.
    """
    layers = get_repeated_layers(meta_model)
    alike = len({describe_layer(layer) for layer in layers}) == 1
    if not alike or len(layers) <= SHALLOW_DEPTHS[1] or getattr(config, "num_hidden_layers", None) != len(layers):
        return None
    names = [lora_config.target_modules or (), lora_config.exclude_modules or (), lora_config.modules_to_save or ()]
    patterns = [name for name in names if isinstance(name, str) and name != "all-linear"]
    numbered = any(character.isdigit() for name in names if not isinstance(name, str) for character in "".join(name))
    if patterns or numbered or any(getattr(lora_config, name, None) for name in LAYER_SPECIFIC_FIELDS):
        return None
    return tuple(_copy_with_depth(config, depth) for depth in SHALLOW_DEPTHS)


def _copy_with_depth(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = depth
    if isinstance(types := getattr(shallow, "layer_types", None), list):
        shallow.layer_types = types[:depth]
    return shallow


def extrapolate_layers(first: ModelCost, second: ModelCost, layers: int) -> ModelCost:
    """Return the cost of a model with so many layers, from the costs of two models of SHALLOW_DEPTHS layers.

    Totals grow by the same amount with every layer; means over layers are turned into totals for that.
    """
    depth, next_depth = SHALLOW_DEPTHS

    def extrapolate(a: float, b: float) -> float:
        return a + (layers - depth) * (b - a)

    inside = extrapolate(depth * first.token.layer, next_depth * second.token.layer)
    windows = {*first.token.attention, *second.token.attention}
    pairs = {
        window: (first.token.attention.get(window, 0), second.token.attention.get(window, 0)) for window in windows
    }
    token = second.token._replace(
        layer=inside / layers,
        flops=extrapolate(first.token.flops, second.token.flops),
        attention={window: extrapolate(*pair) for window, pair in pairs.items()},
    )
    weights = second.weights._replace(
        total=extrapolate(first.weights.total, second.weights.total),
        scales=extrapolate(first.weights.scales, second.weights.scales),
    )
    trained = int(extrapolate(first.trained, second.trained))
    return second._replace(layers=layers, token=token, weights=weights, trained=trained)
