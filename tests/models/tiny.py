"""Tiny models with random weights of every causal architecture of transformers, made from its configuration class.

python -m tests.models.tiny TYPE FOLDER    # writes one as a published checkpoint, with a tokenizer and a chat template
python -m tests.models.tiny                # builds all, and prints those that cannot be built
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "playground" / "benchmark"))
from stand_in import make_tokenizer

WIDTH = 64
"""Input features of every linear layer are multiples of this, the block size of NF4."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 1024),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "embedding_dim"), WIDTH),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "input_embedding_size", "output_embedding_size"), WIDTH),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "text_hidden_size"), WIDTH),
    **dict.fromkeys(("lru_width", "router_hidden_size", "hidden_size_per_layer_input", "adapter_in_dim"), WIDTH),
    **dict.fromkeys(("adapter_out_dim", "shape_embed_dim", "pronunciation_embed_dim"), WIDTH),
    **dict.fromkeys(("adapter_input_size", "hidden_size_global", "projector_input_dim", "projector_output_dim"), WIDTH),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "time_step_rank"), WIDTH),
    **dict.fromkeys(("mamba_dt_rank", "laurel_rank", "adapter_rank", "gated_norm_rank", "hc_lowrank"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "dff"), 128),
    **dict.fromkeys(("dim_ff", "feed_forward_size", "ffn_hidden_size", "intermediate_size_mlp", "n_inner"), 128),
    **dict.fromkeys(
        ("dense_intermediate_size", "prefix_dense_intermediate_size", "mamba_d_ssm", "alignment_intermediate_size"), 128
    ),
    "alignment_intermediate_size": 128,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), WIDTH),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), WIDTH),
    **dict.fromkeys(("shared_intermediate_size", "expert_intermediate_size", "ffn_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_layers_per_stack"), 2),
    **dict.fromkeys(("depth", "n_layers_per_attn_res_block"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("linear_num_key_heads", "n_mamba_heads", "n_groups", "o_groups"), 2),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "attention_head_size", "kv_channels", "swa_head_dim"), 16),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "linear_head_dim", "linear_key_head_dim"), 16),
    **dict.fromkeys(("linear_value_head_dim", "mamba_d_head", "mamba_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("qk_head_dim", "query_pre_attn_scalar", "mamba_d_state", "ssm_state_size", "state_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "zero_expert_num"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "local_attention", "chunk_size"), 16),
    **dict.fromkeys(("attention_window_size", "attention_chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("block_size", "index_block_size", "block_multiple_of", "index_topk"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "position_bias_max_distance"), 512),
    "index_n_heads": 32,  # as published; of few heads all may be inactive, and keys of equal scores are chosen by place
    "index_topk_blocks": 2,
    "initializer_range": 0.15,
    "num_nextn_predict_layers": 0,
}
"""Fields of configurations, of nested ones too, and what they become where a class has them with a number."""

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
"""Tokens of the tokenizer; other tokens of a configuration lie behind those that the tokenizer knows."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")


EVEN_IF_NONE = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
"""Sizes that classes compute, or that published configurations always have."""


def _mrope(*sections: int, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}}


GLOBAL_AFTER_LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
LINEAR_AND_HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 1000},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0, "mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": GLOBAL_AFTER_LOCAL
    | {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 10000.0} for name in GLOBAL_AFTER_LOCAL["layer_types"]
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "doge": {"keep_window_size": 512},  # as many as positions, as published; equal tokens have keys of equal scores
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 64,
        "swa_kv_lora_rank": 64,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "head_dim": 24,
    },
    "emu3": {"vocabulary_map": {"<image>": 1000}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "codebook_size": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": 128,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_unified_vision": {"mm_embed_dim": 64, "mm_posemb_size": 64, "output_proj_dims": 64},
    "glm4v_moe_text": _mrope(1, 1, 2, partial_rotary_factor=0.5),
    "glm4v_text": _mrope(1, 1, 2, partial_rotary_factor=0.5),
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"H_cycles": 2, "num_hidden_layers": 16},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "laguna": GLOBAL_AFTER_LOCAL | {"mlp_layer_types": ["dense", "sparse"], "num_attention_heads_per_layer": [8, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_vision_model": {"vision_output_dim": 64},
    "mamba": {"time_step_rank": 8},  # an eighth of the width; published ones have a sixteenth
    "mamba2": {"num_heads": 8},
    "mellum": GLOBAL_AFTER_LOCAL,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mllama_vision_model": {"vision_output_dim": 384},
    "qwen2_5_vl_text": _mrope(2, 3, 3),
    "qwen2_vl_text": _mrope(2, 3, 3),
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    "rwkv": {"rescale_every": 1},  # so that two layers differ as those of published models do
    "voxtral_encoder": {"max_source_positions": 64},  # which stay in fp32: a thousandth of published weights
    "xlstm": {"chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": LINEAR_AND_HYBRID | {"mamba_d_state": 16},  # as published; by it, A_log is in fp32
    "zamba2": LINEAR_AND_HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}
"""Type of a configuration or of a nested one -> fields that the general rule does not get right."""

VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek_v2+lite": {"q_lora_rank": None},
    "falcon+alibi": {"alibi": True},
    "falcon+new": {"new_decoder_architecture": True},
    "gemma4_text+experts": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "gpt_neox+sequential": {"use_parallel_residual": False},
    "llama+bias": {"attention_bias": True, "mlp_bias": True},
    "llama+tied": {"tie_word_embeddings": True},
    "llama4_text+dense": {"interleave_moe_layer_step": 2},
    "opt+projected": {"word_embed_proj_dim": 128, "do_layer_norm_before": False},
    "phi+qk": {"qk_layernorm": True},
    "qwen2+window": {
        "use_sliding_window": True,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3_moe+dense": {"mlp_only_layers": [0]},
}
"""`type+name` -> fields of a configuration that is published too, beside the class's own."""

MULTIMODAL = [
    "aria",
    "aya_vision",
    "cohere2_vision",
    "deepseek_vl",
    "exaone4_5",
    "glm4v",
    "glm4v_moe",
    "idefics3",
    "inkling2",
    "internvl",
    "kimi_k25",
    "lfm2_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "minicpmv4_6",
    "minimax_m3_vl",
    "mistral3",
    "mistral4",
    "mistral_large4",
    "muse_glimmer",
    "ovis2",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "video_llama_3",
    "voxtral",
]
"""Types that AutoModelForCausalLM does not know, and that are much used."""

NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is its text part",
    "gemma4_assistant": "it drafts tokens from the hidden states of another model",
    "gemma4_unified_assistant": "it drafts tokens from the hidden states of another model",
    "musicgen": "AutoModelForCausalLM makes no model of its configuration, whose decoder writes music",
    "musicgen_melody": "AutoModelForCausalLM makes no model of its configuration, whose decoder writes music",
}
"""Causal types that no tiny model is made of, and why."""


def class_name(model_type: str) -> str:
    """Return the class of published checkpoints: for composite types that with all parts."""
    mappings = (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    return next(mapping[model_type] for mapping in mappings if model_type in mapping)


def tiny_config(config_class: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    """Return a configuration of a class with tiny sizes, and with one layer of every kind."""
    default = config_class()
    fields = default.to_dict()
    small = {name: SIZES[name] for name, value in fields.items() if name in SIZES and _has_size(name, value)}
    small |= {name: 0.0 for name, value in fields.items() if _is_dropout(name) and isinstance(value, float)}
    small |= _tokens(fields) | _layers(fields)
    for name, nested in config_class.sub_configs.items():
        own = getattr(default, name, None)
        nested_class = type(own) if own is not None else nested
        if issubclass(nested_class, PretrainedConfig):
            small[name] = tiny_config(nested_class)
    if fields.get("kv_lora_rank"):  # latent attention: each head has keys of its own, and rotates a part of them
        small |= {"num_key_value_heads": SIZES["num_attention_heads"], "head_dim": SIZES["qk_rope_head_dim"]}
    small |= EXCEPTIONS.get(default.model_type, {}) | changes
    return config_class(**small)


def _has_size(name: str, value: Any) -> bool:
    return name in EVEN_IF_NONE if value is None else isinstance(value, int | float) and not isinstance(value, bool)


def _is_dropout(name: str) -> bool:
    return "drop" in name or name.endswith("_jitter_noise")


def _tokens(fields: dict[str, Any]) -> dict[str, Any]:
    """Return ids within the vocabulary for every token of a configuration."""
    named = [name for name in fields if name.endswith(("_token_id", "_token_index")) and name not in TOKENS]
    tokens = {name: 1000 + index for index, name in enumerate(named) if fields[name] is not None}
    return tokens | {name: value for name, value in TOKENS.items() if name in fields}


def _layers(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the lists with an entry for each layer, cut to one layer of every kind and two at least."""
    count_name = next((name for name in LAYER_COUNTS if name in fields), "")
    count = fields.get(count_name)
    lists = {name: value for name, value in fields.items() if _is_per_layer(value, count)}
    if not lists or not count:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    kept = sorted({kinds.index(kind) for kind in kinds})
    kept = kept if len(kept) > 1 else [0, 1]
    return {name: [value[at] for at in kept] for name, value in lists.items()} | {count_name: len(kept)}


def _is_per_layer(value: Any, count: int | None) -> bool:
    """Return whether a field has an entry for each layer; rising numbers are a list of layers."""
    if not isinstance(value, list) or len(value) != count:
        return False
    return not all(isinstance(one, int) for one in value) or value != sorted(set(value))


def make_model(name: str) -> PreTrainedModel:
    """Build a model of a type, or of a variant, with random weights that matter."""
    model_type = name.partition("+")[0]
    config = tiny_config(CONFIG_MAPPING[model_type], **VARIANTS.get(name, {}))
    torch.manual_seed(0)
    model = getattr(transformers, class_name(model_type))(config)
    randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Give weights a spread at which they matter, and move what is constant, such as norms and biases."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not tensor.is_floating_point() or not (isinstance(tensor, torch.nn.Parameter) or "bias" in name):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        spread = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
        is_random = tensor.ndim > 1 and abs(float(tensor.float().mean())) <= 0.3 * spread
        if is_random:
            tensor.copy_(noise * min(0.5, 1.2 / tensor.shape[-1] ** 0.5))
        else:
            tensor.add_(0.1 * noise)


def write(name: str, folder: Path) -> None:
    """Write a model as its published checkpoints are, with a tokenizer and a chat template."""
    model = make_model(name)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    make_tokenizer(folder)


def names() -> list[str]:
    """Return all causal types of the installed transformers that can be built, variants, and multimodal types."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS, *MULTIMODAL} - {*NOT_BUILT})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of configurations that are not the published ones to themselves."""
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        write(sys.argv[1], Path(sys.argv[2]))
    else:
        for each in names():
            try:
                with quiet():
                    make_model(each)
            except Exception as error:
                sys.stdout.write(f"{each}: {type(error).__name__}: {str(error)[:300]}\n")
