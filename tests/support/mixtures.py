"""Tiny mixtures of experts: configurations, and models of them whose weights matter."""

from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    HYV4Config,
    Llama4TextConfig,
    MixtralConfig,
    NemotronHConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from fastchat_qlora.model.loading.auto_class import get_model_class

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}

SPARSE_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 8,
}
"""Sizes of a DeepSeek-V3.2 of four heads, whose indexer keeps eight keys."""

HY_V4 = HYV4Config(
    **SIZES | SPARSE_ATTENTION | {"q_lora_rank": 64, "kv_lora_rank": 64, "index_n_heads": 8}, pad_token_id=0
)
"""Its class keeps the head in fp32, and lacks the mark of other indexers for layers whose dtype it reads."""

CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=32),
    "qwen3_moe, one dense layer": Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=32, mlp_only_layers=[0]),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=32, shared_expert_intermediate_size=64),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, layer_types=["full_attention"] * 2),
    "deepseek_v3": DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        n_routed_experts=4,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    ),
    "nemotron_h": NemotronHConfig(
        **SIZES, n_routed_experts=4, moe_intermediate_size=32, layers_block_type=["moe", "attention"]
    ),
    "llama4_text": Llama4TextConfig(
        **SIZES, num_local_experts=4, intermediate_size_mlp=128, interleave_moe_layer_step=1, attention_chunk_size=64
    ),
}


def make_mixture(name: str) -> PreTrainedModel:
    """Make a model of `CONFIGS` with random weights, routers and biases among them."""
    config = CONFIGS[name]
    model_class = get_model_class(config)
    assert model_class is not None
    torch.manual_seed(0)
    model = model_class(type(config)(**config.to_dict())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model
