"""The estimates of memory compared with what torch saves."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, SIZES, WINDOW, conversation, lora_config, make_base, make_quantized_base, our_peft
from mixtures import HY_V4, SPARSE_ATTENTION
from transformers import (
    AutoModelForCausalLM,
    DeepseekV32Config,
    Gemma3TextConfig,
    GptOssConfig,
    HYV4ForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    OpenAIGPTConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    Zamba2Config,
)

from fastchat_qlora.data.batching.collator import Collator
from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.attention.attention import PER_CONVERSATION
from fastchat_qlora.model.estimates import memory
from fastchat_qlora.model.estimates.flops import compute_flops_per_token
from fastchat_qlora.model.loading.base_model import build_meta_model, cast_meta_model
from fastchat_qlora.model.ops import cpu_products
from fastchat_qlora.model.ops.chunked_loss import install_loss_head
from fastchat_qlora.model.quantization.base_quantization import NOT_QUANTIZED, BaseQuantization
from fastchat_qlora.training.callbacks.effective_settings import get_base_bytes

LENGTHS = (500, 300, 200)
TOKENS = sum(LENGTHS)


def profile(
    config: PretrainedConfig,
    dtype: torch.dtype,
    quantization: BaseQuantization = NOT_QUANTIZED,
    longest: int = max(LENGTHS),
    **lora: Any,
) -> memory.ModelCost:
    meta_model = build_meta_model(copy.deepcopy(config))
    assert meta_model is not None
    model = attach_adapter(cast_meta_model(meta_model, dtype), lora_config(**lora))
    return memory.measure_model_cost(model, supervised_share=0.6, longest=longest, quantization=quantization)


def kept_bytes(model: Any, batch: dict[str, Any]) -> int:
    """Return the bytes that autograd saves in one forward pass, each storage once, without weights."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    alive, total = [], 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(tensor)
            total += storage.nbytes()
        return tensor

    targets = {name: batch.pop(name) for name in ("supervised", "labels")}
    head = install_loss_head(model)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), head.expecting(**targets):
        model(**batch, use_cache=False)
    return total


def make_batch(lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    rows = [conversation(length, seed) for seed, length in enumerate(lengths)]
    batch = Collator(type("Right", (), {"padding_side": "right"}), padding_free=True)(rows)
    keep = {"input_ids", "position_ids", "cu_seq_lens_q", "max_length_q", "conversation_lengths"}
    return {name: value for name, value in batch.items() if name in keep | {"supervised", "labels"}}


FP32, BF16 = torch.float32, torch.bfloat16
NF4 = BaseQuantization("nf4", double_quant=True)


@pytest.mark.parametrize("checkpointed", [0, 1, 2])
@pytest.mark.parametrize(
    ("family", "dtype", "lora"),
    [
        ("llama", BF16, {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05}),
        ("llama", BF16, {}),
        ("llama", FP32, {"lora_dropout": 0.05}),
        ("qwen2", FP32, {"target_modules": ["q_proj", "v_proj"]}),
        ("qwen3", BF16, {"lora_dropout": 0.05}),
        ("phi3", BF16, {}),
        ("gemma3", BF16, {}),
    ],
)
def test_activations_are_predicted_within_10_percent(
    family: str, dtype: torch.dtype, lora: dict[str, Any], checkpointed: int
) -> None:
    """Within 10 % for every share of checkpointed layers."""
    needed = memory.compute_peak_memory(profile(FAMILIES[family], dtype, **lora), TOKENS, checkpointed)
    model = our_peft(make_base(family, PER_CONVERSATION, dtype), **lora)
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    for index, layer in enumerate(base.model.layers):
        layer.gradient_checkpointing = index < checkpointed
    assert needed.activations == pytest.approx(kept_bytes(model, make_batch()), rel=0.1)


@pytest.mark.parametrize("checkpointed", [0, 2])
def test_activations_and_weights_of_4_bit_models_are_predicted(checkpointed: int, tmp_path: Path) -> None:
    model = our_peft(make_quantized_base(tmp_path, PER_CONVERSATION), lora_dropout=0.05)
    held, _ = get_base_bytes(model)
    needed = memory.compute_peak_memory(profile(FAMILIES["llama"], FP32, NF4, lora_dropout=0.05), TOKENS, checkpointed)
    if checkpointed:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert needed.activations == pytest.approx(kept_bytes(model, make_batch()), rel=0.1)
    assert needed.weights == pytest.approx(held, rel=0.02)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (needed.adapter, needed.gradients) == (4 * trained, 4 * trained), "fp32"
    assert needed.optimizer == 8 * trained, "Adam's two moments"


def test_bytes_per_token_of_a_llama_match_the_formula() -> None:
    """12 h + 4 k + 6 f bytes a token and layer in bf16 with adapters everywhere, and 24 for each rank of the seven."""
    h, k, f, r = 512, 128, 1408, 4
    sizes = {"hidden_size": h, "intermediate_size": f, "num_attention_heads": 8, "num_key_value_heads": 2}
    token = profile(LlamaConfig(**SIZES | sizes), BF16).token
    assert token.layer == pytest.approx(12 * h + 4 * k + 6 * f + 14 * r, rel=0.05)
    assert (token.checkpointed_layer, token.widest) == (2 * h, 2 * f)


def test_bytes_per_layer_do_not_depend_on_depth() -> None:
    few, many = (profile(LlamaConfig(**SIZES | {"num_hidden_layers": n}), BF16).token for n in (2, 5))
    # The first layer's input needs no gradient, which matters more in a mean over few layers.
    assert many.layer == pytest.approx(few.layer, rel=0.05)


def test_the_fewest_layers_that_fit_are_checkpointed() -> None:
    model = profile(LlamaConfig(**SIZES | {"num_hidden_layers": 6}), BF16)
    all_kept, all_checkpointed = (memory.compute_peak_memory(model, TOKENS, count).step_bytes for count in (0, 6))
    assert all_checkpointed < all_kept
    assert memory.count_layers_to_checkpoint(model, TOKENS, all_kept) == 0
    between = memory.count_layers_to_checkpoint(model, TOKENS, (all_kept + all_checkpointed) / 2)
    assert between is not None and 0 < between < 6
    assert memory.compute_peak_memory(model, TOKENS, between).step_bytes <= (all_kept + all_checkpointed) / 2
    assert memory.compute_peak_memory(model, TOKENS, between - 1).step_bytes > (all_kept + all_checkpointed) / 2
    least = min(memory.compute_peak_memory(model, TOKENS, count).step_bytes for count in range(7))
    assert memory.count_layers_to_checkpoint(model, TOKENS, least - 1) is None
    assert memory.count_layers_to_checkpoint(model, TOKENS, all_kept, scale=1.5) != 0, (
        "a step needed more than foreseen"
    )


@pytest.mark.parametrize(
    ("optimizer", "shards", "state"),
    [("adamw_torch", 1, 8), ("adamw_torch", 4, 2), ("sgd", 1, 0), ("adamw_8bit", 1, 2), ("paged_adamw_8bit", 1, 0)],
)
def test_optimizer_state_is_predicted_and_sharded(optimizer: str, shards: int, state: int) -> None:
    model = profile(FAMILIES["llama"], BF16)
    needed = memory.compute_peak_memory(model, TOKENS, 0, optimizer=optimizer, shards=shards)
    assert needed.gradients == model.trained * 4
    assert needed.optimizer == pytest.approx(model.trained * state, rel=0.02), "8-bit moments have scales"


def test_a_trained_head_has_all_its_logits() -> None:
    chunked, whole = (profile(FAMILIES["llama"], BF16, modules_to_save=saved) for saved in (None, ["lm_head"]))
    assert (chunked.chunk_length is None, whole.chunk_length is None) == (False, True)
    work = [memory.compute_peak_memory(model, 10**6, 0).temporary for model in (chunked, whole)]
    assert work[1] > work[0]


def test_capped_scores_grow_with_the_longest_conversation() -> None:
    """No kernel computes them in blocks, so that every pair of tokens is saved."""
    lengths = (400, 400, 400)
    cost = profile(FAMILIES["gemma2"], FP32, longest=400)
    model = our_peft(make_base("gemma2", PER_CONVERSATION, FP32))
    needed = memory.compute_peak_memory(cost, sum(lengths), 0)
    saved = kept_bytes(model, make_batch(lengths))
    assert needed.activations == pytest.approx(saved, rel=0.1)
    assert saved > 1.5 * 4 * 2 * sum(length**2 for length in lengths) * cost.layers


SPARSE: dict[str, Any] = SIZES | {"hidden_size": 128, "num_experts_per_tok": 2, "initializer_range": 0.02}
MIXTURES = {
    "qwen3_moe": Qwen3MoeConfig(**SPARSE, head_dim=32, num_experts=8, moe_intermediate_size=128),
    "mixtral": MixtralConfig(**SPARSE | {"intermediate_size": 192}, num_local_experts=8),
    "gpt_oss": GptOssConfig(**SPARSE | {"intermediate_size": 192}, head_dim=32, num_local_experts=8),
    "olmoe": OlmoeConfig(**SPARSE | {"intermediate_size": 128}, num_experts=8),
}


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_memory_of_mixtures_is_predicted_within_10_percent(family: str, dtype: torch.dtype) -> None:
    config = MIXTURES[family]
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    lora: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": experts}
    needed = memory.compute_peak_memory(profile(config, dtype, **lora), TOKENS, 0)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=PER_CONVERSATION).to(dtype)
    held = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    model = our_peft(base, **lora)
    assert needed.activations == pytest.approx(kept_bytes(model, make_batch()), rel=0.1)
    assert needed.weights == held


def test_flops_of_a_mixture_are_those_of_the_chosen_experts() -> None:
    """Two FLOPs for each weight of attention, router and two of eight experts; the head has no logits here."""
    config = MIXTURES["mixtral"]
    lora = {"target_modules": ["q_proj"]}
    h, f, r = 128, 192, 4
    attention, experts, adapter = 2 * h * h + 2 * h * h // 2, 2 * 3 * h * f, 2 * h * r
    expected = 2 * config.num_hidden_layers * (attention + h * 8 + experts + adapter)
    cost = profile(config, BF16, **lora).token
    head = 2 * 2 * 0.6 * h * config.vocab_size  # forward and the gradient that is computed with it
    assert cost.flops == pytest.approx(expected + head, rel=0.01)
    assert cost.attention == pytest.approx({0: 2 * config.num_hidden_layers * 2 * h}, rel=0.01)


def test_flops_of_shared_beginnings_are_counted_once() -> None:
    """A computed token attends to the keys of its depth; the beginning of the second sequence is not computed."""
    cost = profile(FAMILIES["mistral"], BF16)
    (window,) = (window for window in cost.token.attention if window)
    lengths, saved = np.array([800, 600]), np.array([512])
    depths = np.concatenate([np.arange(800), np.arange(512, 600)]) + 0.5
    keys = {0: depths.mean(), window: np.minimum(depths, window).mean()}
    attention = sum(flops * keys[window] for window, flops in cost.token.attention.items())
    expected = 2 * cost.token.flops + 3 * attention
    assert compute_flops_per_token(cost, lengths, 0, saved) == pytest.approx(expected, rel=1e-3)


def test_only_two_layers_of_a_kind_compute() -> None:
    """What they save and compute counts for all of their kind."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    sizes = SIZES | {"num_hidden_layers": 9}
    config = Gemma3TextConfig(**sizes, head_dim=16, sliding_window=WINDOW, layer_types=kinds)
    cost = profile(config, BF16)
    config.layer_types = kinds[:6]
    config.num_hidden_layers = 6
    fewer = profile(config, BF16)
    assert cost.token.flops - fewer.token.flops == pytest.approx(fewer.token.flops / 2, rel=0.05)
    expected = {window: 1.5 * flops for window, flops in fewer.token.attention.items()}
    assert cost.token.attention == pytest.approx(expected, rel=0.01)
    assert cost.token.layer == pytest.approx(fewer.token.layer, rel=0.02)


def test_sparse_attention_that_needs_a_mask_is_traced() -> None:
    config = DeepseekV32Config(**SIZES | SPARSE_ATTENTION)
    token = profile(config, BF16, target_modules=["o_proj"]).token
    assert token.layer > 0 and token.attention[0] >= 2 * 2 * 4 * (32 + 16), "two layers of four heads"


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_parts_kept_in_fp32_are_counted_as_they_are_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    HYV4ForCausalLM(copy.deepcopy(HY_V4)).save_pretrained(tmp_path)
    model = our_peft(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), target_modules=["o_proj"])
    held, _ = get_base_bytes(model)
    assert profile(HY_V4, dtype, target_modules=["o_proj"]).weights.total == held
    assert {p.dtype for p in model.get_base_model().lm_head.parameters()} == {FP32}


def test_rows_are_no_longer_than_a_model_has_positions() -> None:
    """A GPT has a mask of 512 tokens; FLOPs are those of two layers of 12 h^2 weights, adapters and head."""
    h, vocabulary, r = 64, 320, 4
    config = OpenAIGPTConfig(vocab_size=vocabulary, n_embd=h, n_layer=2, n_head=4)
    token = profile(config, FP32, target_modules=["c_attn"]).token
    assert config.n_positions == 512 < 3 * memory.TRACED_TOKENS
    assert token.flops == 2 * 2 * (12 * h * h + r * (h + 3 * h)) + 2 * 2 * 0.6 * h * vocabulary


def test_shared_blocks_are_counted_once() -> None:
    config = Zamba2Config(
        **SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 4},
        layers_block_type=["mamba", "hybrid"] * 2,
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=8,
        mamba_ngroups=1,
        num_mem_blocks=1,
    )
    meta_model = build_meta_model(config)
    assert meta_model is not None
    total = sum(parameter.numel() for parameter in meta_model.parameters())
    weights = profile(config, FP32, target_modules=["q_proj"]).weights
    assert weights.total == 4 * total and weights.outside > 0


QWEN3_30B_A3B = Qwen3MoeConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    decoder_sparse_step=1,
    tie_word_embeddings=False,
)
"""As published: 30.5 billion parameters."""


@pytest.mark.parametrize(("fast", "unpacked"), [(True, 2), (False, 3)], ids=["products in bf16", "products in fp32"])
def test_experts_of_a_published_mixture_are_in_4_bits(
    fast: bool, unpacked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "multiplies_fast_in_bf16", lambda: fast)
    gib = 2**30
    lora = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    plain, packed = (profile(QWEN3_30B_A3B, BF16, kind, **lora) for kind in (NOT_QUANTIZED, NF4))
    assert 56 < plain.weights.total / gib < 58
    assert 15 < packed.weights.total / gib < 18
    assert packed.dequantized == unpacked * 4096 * 2048, "q_proj: a CPU unpacks one expert at a time"
