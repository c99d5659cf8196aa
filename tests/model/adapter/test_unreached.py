"""Modules that text training never reaches are found on the meta device, before weights are loaded."""

import re
from typing import Any

import pytest
import torch
from mixtures import SPARSE_ATTENTION
from peft import LoraConfig, get_peft_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CLASSES
from transformers import (
    BartConfig,
    DeepseekV4Config,
    DeepseekV32Config,
    Gemma3Config,
    JambaConfig,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Zamba2Config,
)

from fastchat_qlora.model.adapter.unreached import find_unreached
from fastchat_qlora.model.loading.base_model import build_meta_model

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
JAMBA = JambaConfig(
    **SIZES,
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=2,
    expert_layer_offset=1,
    num_experts=4,
    mamba_d_state=8,
    mamba_dt_rank=8,
    use_mamba_kernels=False,
)
DEEPSEEK = DeepseekV32Config(**SIZES | SPARSE_ATTENTION)


def find_linear(model: torch.nn.Module) -> set[str]:
    return {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "head" not in name
    }


def find_kinds(config: PretrainedConfig) -> set[str]:
    """Return the unreached linear layers, with the index of the layer left out."""
    model = build_meta_model(config)
    assert model is not None
    return {re.sub(r"\d+", "N", name) for name in find_unreached(model, find_linear(model))}


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (LlamaConfig(**SIZES), set()),
        (JAMBA, {"model.layers.N.mamba.dt_proj"}),
        (DEEPSEEK, {f"model.layers.N.self_attn.indexer.{name}" for name in ("wk", "wq_b", "weights_proj")}),
        (JetMoeConfig(num_hidden_layers=1), set()),
        (
            BartConfig(decoder_layers=1),
            {f"model.decoder.layers.N.encoder_attn.{name}_proj" for name in ("q", "k", "v", "out")},
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_unreached_modules_are_found(config: PretrainedConfig, kinds: set[str]) -> None:
    assert find_kinds(config) == kinds


def test_towers_and_blocks_of_other_layers_are_unreached() -> None:
    gemma = Gemma3Config(text_config=SIZES, vision_config={"num_hidden_layers": 1})
    assert {name.split(".")[1] for name in find_kinds(gemma)} == {"vision_tower"}
    zamba = find_kinds(Zamba2Config(num_hidden_layers=12, layers_block_type=["mamba", "hybrid"] * 6))
    assert zamba == {"model.layers.N.shared_transformer.feed_forward.gate_up_proj_adapter_list.N.N"}


def test_what_only_long_rows_reach_is_no_exception() -> None:
    """DeepSeek-V4 compresses 128 tokens in some layers; a shorter conversation does not use the compressor."""
    found = find_kinds(DeepseekV4Config(num_hidden_layers=4))
    assert found and all(".compressor.indexer." in name for name in found)


def test_weights_of_experts_are_named_as_parameters() -> None:
    model = build_meta_model(MixtralConfig(**SIZES))
    assert model is not None
    names = {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.self_attn.q_proj"}
    assert find_unreached(model, names) == frozenset()
    assert not any(parameter.requires_grad for parameter in model.parameters()), "all are frozen"
    assert not any(module._forward_hooks for module in model.modules()), "no hook is left"


@pytest.mark.parametrize("config", [JAMBA, DEEPSEEK], ids=["jamba", "deepseek_v32"])
def test_unreached_modules_are_those_without_a_gradient(config: PretrainedConfig) -> None:
    """A real step of plain transformers and PEFT leaves the same adapters without a gradient."""
    torch.manual_seed(0)
    meta_model = build_meta_model(config)
    assert meta_model is not None
    names = {name for name in find_linear(meta_model) if ".mlp." not in name and ".feed_forward." not in name}
    lora = LoraConfig(r=2, target_modules=sorted(names), init_lora_weights=False)
    model = get_peft_model(CLASSES[type(config)](config), lora)
    ids = torch.randint(3, 64, (1, 32))
    model(input_ids=ids, position_ids=torch.arange(32)[None], use_cache=False).logits.sum().backward()
    adapted = {
        name.removeprefix("base_model.model.").partition(".lora_B")[0]: parameter.grad is not None
        for name, parameter in model.named_parameters()
        if ".lora_B." in name
    }
    assert find_unreached(meta_model, names) == {name for name, has_gradient in adapted.items() if not has_gradient}
    assert set(adapted) == names
