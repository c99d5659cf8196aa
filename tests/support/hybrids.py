"""Tiny models with recurrent layers, short convolutions or attention sinks, with one layer of every kind."""

from typing import Any

import torch
from families import SIZES
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    GptOssConfig,
    GraniteMoeHybridConfig,
    KimiLinearConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    MiMoV2FlashConfig,
    MiniMaxConfig,
    NemotronHConfig,
    OlmoHybridConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION_AND_FULL = {"layer_types": ["conv", "full_attention"]}
SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
HYBRIDS: dict[str, PretrainedConfig] = {
    "qwen3_next": Qwen3NextConfig(**SIZES | EXPERTS | DELTA | LINEAR_AND_FULL, num_experts=4, head_dim=16),
    "qwen3_5_text": Qwen3_5TextConfig(**SIZES | DELTA | LINEAR_AND_FULL, head_dim=16),
    "kimi_linear": KimiLinearConfig(
        **SIZES | EXPERTS | LINEAR_AND_FULL | {"num_key_value_heads": 4},
        num_local_experts=4,
        linear_num_heads=4,
        linear_head_dim=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "lfm2": Lfm2Config(**SIZES | CONVOLUTION_AND_FULL),
    "lfm2_moe": Lfm2MoeConfig(**SIZES | EXPERTS | CONVOLUTION_AND_FULL, num_experts=4, num_dense_layers=1),
    "bamba": BambaConfig(**SIZES | MAMBA, attn_layer_indices=[1]),
    "granitemoehybrid": GraniteMoeHybridConfig(
        **SIZES | MAMBA | LINEAR_AND_FULL, num_local_experts=4, num_experts_per_tok=2, logits_scaling=3.0
    ),
    "falcon_h1": FalconH1Config(**SIZES | MAMBA, mamba_d_ssm=128, lm_head_multiplier=0.5),
    "olmo_hybrid": OlmoHybridConfig(**SIZES | DELTA | LINEAR_AND_FULL | {"linear_num_key_heads": 4}),
    "minimax": MiniMaxConfig(**SIZES | LINEAR_AND_FULL, num_local_experts=4, num_experts_per_tok=2, block_size=8),
    "nemotron_h": NemotronHConfig(
        **{name: value for name, value in SIZES.items() if name != "num_hidden_layers"},
        hybrid_override_pattern="M*-",
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        head_dim=16,
        chunk_size=16,
    ),
}
SINKS: dict[str, PretrainedConfig] = {
    "gpt_oss": GptOssConfig(**SIZES | SLIDING_AND_FULL, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "mimo_v2_flash": MiMoV2FlashConfig(**SIZES | EXPERTS | SLIDING_AND_FULL, n_routed_experts=4, head_dim=16),
}


def make_hybrid(name: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a model with the same weights every time, in which convolutions and sinks matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((HYBRIDS | SINKS)[name], attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in sorted(model.named_parameters()):
        if "conv" in parameter_name or "sinks" in parameter_name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)
