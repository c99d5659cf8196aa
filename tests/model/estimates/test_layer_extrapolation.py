"""Two shallow models give the exact cost of a deep one; models with different layers are not extrapolated."""

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, lora_config
from transformers import Qwen3Config

from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.estimates import memory
from fastchat_qlora.model.estimates.layer_extrapolation import make_shallow_configs
from fastchat_qlora.model.loading.base_model import build_meta_model
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization
from fastchat_qlora.training.callbacks.activation_checkpointing import estimate_model_cost

HOW = {"supervised_share": 0.6, "quantization": BaseQuantization("nf4", double_quant=True), "device_type": "cuda"}


def deep(family: str, layers: int = 7, **changes: Any) -> Any:
    config = copy.deepcopy(FAMILIES[family])
    for name, value in ({"num_hidden_layers": layers} | changes).items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
@pytest.mark.parametrize(
    "lora", [{"lora_dropout": 0.05}, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}]
)
def test_extrapolation_equals_the_deep_model(family: str, lora: dict[str, Any]) -> None:
    if family == "phi3" and "target_modules" in lora:
        lora = lora | {"target_modules": ["qkv_proj"]}
    config = deep(family)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * 7
    meta_model = build_meta_model(copy.deepcopy(config))
    assert meta_model is not None and make_shallow_configs(config, meta_model, lora_config(**lora)) is not None
    whole = memory.measure_model_cost(attach_adapter(meta_model.to(torch.bfloat16), lora_config(**lora)), **HOW)  # type: ignore[arg-type]
    found = estimate_model_cost(config, lora_config(**lora), torch.bfloat16, **HOW)
    assert not isinstance(found, str)
    for one, other in ((found, whole), (found.token, whole.token), (found.weights, whole.weights)):
        numbers = [value for value in one if isinstance(value, int | float)]
        assert numbers == pytest.approx([value for value in other if isinstance(value, int | float)], rel=1e-9)


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        (deep("gemma3", 7, layer_types=["sliding_attention", "full_attention"] * 3 + ["full_attention"]), {}),
        (deep("llama", 3), {}),
        (deep("llama"), {"layers_to_transform": [0, 1], "target_modules": ["q_proj"]}),
        (deep("llama"), {"rank_pattern": {"layers.0.self_attn.q_proj": 2}}),
        (deep("llama"), {"target_modules": ["0.self_attn.q_proj"]}),
        (deep("llama"), {"target_modules": r".*\.[03]\..*q_proj"}),
        (
            Qwen3Config(
                num_hidden_layers=6,
                hidden_size=64,
                layer_types=["full_attention"] * 5 + ["sliding_attention"],
                use_sliding_window=True,
                sliding_window=8,
                intermediate_size=96,
                num_attention_heads=4,
                vocab_size=89,
            ),
            {},
        ),
    ],
    ids=["kinds of attention", "not deep", "some layers", "another rank", "a layer's number", "a pattern", "one other"],
)
def test_models_with_unlike_layers_are_not_extrapolated(config: Any, lora: dict[str, Any]) -> None:
    meta_model = build_meta_model(copy.deepcopy(config))
    assert meta_model is not None
    assert make_shallow_configs(config, meta_model, lora_config(**lora)) is None
