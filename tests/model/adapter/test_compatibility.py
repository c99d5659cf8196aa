"""Adapters that do not fit a model or a strategy are refused before weights are loaded."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mixtures import make_mixture
from peft import LoraConfig
from transformers import AutoConfig, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.compatibility import check_sharding, check_targets
from fastchat_qlora.model.adapter.lora import build_lora_config
from fastchat_qlora.model.loading.base_model import build_meta_model

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_unmatched_names_are_refused(model_folder: Path) -> None:
    meta_model = build_meta_model(AutoConfig.from_pretrained(model_folder))
    check_targets(meta_model, build_lora_config(LoraArguments(lora_target_modules=["q_proj", "down_proj"])))
    check_targets(meta_model, build_lora_config(LoraArguments(lora_target_modules=["all-linear"])))
    with pytest.raises(UserError) as caught:
        check_targets(meta_model, build_lora_config(LoraArguments(lora_target_modules=["q_proj", "query", "W_pack"])))
    message = str(caught.value)
    assert "--lora_target_modules W_pack query" in message
    assert all(name in message for name in LINEAR)
    for around in ("self_attn", "layers.1", "layers", "model"):
        with pytest.raises(UserError, match=f"--modules_to_save {around}"):
            check_targets(meta_model, build_lora_config(LoraArguments(modules_to_save=[around])))
    check_targets(meta_model, build_lora_config(LoraArguments(modules_to_save=["mlp", "norm"])))
    for name in ("head", "act_fn", "rotary_emb"):  # the last two have no parameters
        with pytest.raises(
            UserError, match=f"--modules_to_save {name}: matches no module to train; the model has .*mlp"
        ):
            check_targets(meta_model, build_lora_config(LoraArguments(modules_to_save=[name])))


@pytest.mark.parametrize("name", ["mlp.experts", "mlp"])
def test_experts_are_not_trained_as_a_whole(name: str) -> None:
    arguments = LoraArguments(modules_to_save=[name])
    with pytest.raises(UserError, match=f"--modules_to_save {name}: attention, experts and what holds"):
        check_targets(make_mixture("qwen3_moe"), build_lora_config(arguments))


class RemoteCodeConfig(PretrainedConfig):
    """The configuration of a model whose code comes with its weights."""

    model_type = "elsewhere"


DDP = Topology(local_rank=0, rank=0, world_size=2, accelerator=None, zero_stage=0, fsdp=False)
ZERO_3, FSDP = (dataclasses.replace(DDP, zero_stage=3), dataclasses.replace(DDP, fsdp=True))


class ShardingCase(NamedTuple):
    """Flags for a model, and the strategy that refuses them with an error that begins so; None if all accept them."""

    refused_by: Topology | None
    error: str
    flags: dict[str, Any]
    tied: bool = False
    quantized: bool = False


EVERYTHING = {"modules_to_save": ["lm_head"], "use_dora": True, "lora_bias": "all"}
SHARDING_CASES = [
    ShardingCase(ZERO_3, "--use_dora True with --q_lora True", {"use_dora": True}, quantized=True),
    ShardingCase(FSDP, "--lora_bias all with --q_lora True", {"lora_bias": "all"}, quantized=True),
    ShardingCase(
        FSDP, "--modules_to_save lm_head: the head and the embeddings", {"modules_to_save": ["lm_head"]}, tied=True
    ),
    ShardingCase(
        FSDP,
        "--lora_target_modules embed_tokens q_proj: the head",
        {"lora_target_modules": ["q_proj", "embed_tokens"]},
        tied=True,
    ),
    ShardingCase(None, "", EVERYTHING),
    ShardingCase(None, "", {}, tied=True, quantized=True),
    ShardingCase(None, "", {"lora_target_modules": ["all-linear"]}, tied=True, quantized=True),
]


@pytest.mark.parametrize("case", SHARDING_CASES)
def test_unsupported_sharding_is_refused(case: ShardingCase, model_folder: Path) -> None:
    has_biases = "lora_bias" in case.flags
    config = AutoConfig.from_pretrained(model_folder, tie_word_embeddings=case.tied, attention_bias=has_biases)
    lora_config = build_lora_config(LoraArguments(**case.flags))
    for topology in (DDP, ZERO_3, FSDP):
        if topology == case.refused_by:
            with pytest.raises(UserError, match=f"^{case.error}.*; choose "):
                check_sharding(config, build_meta_model(config), lora_config, topology, quantized=case.quantized)
        else:
            check_sharding(config, build_meta_model(config), lora_config, topology, quantized=case.quantized)


GPT2 = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50)
LLAMA = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8)
QWEN2 = Qwen2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=50)


class BiasCase(NamedTuple):
    """A model, the biases to train, and whether the model has any of these."""

    config: PretrainedConfig
    bias: str
    targets: list[str] | str
    is_refused: bool


BIAS_CASES = [
    BiasCase(LLAMA, "all", ["q_proj"], False),
    BiasCase(GPT2, "all", ["c_attn"], True),
    BiasCase(QWEN2, "lora_only", ["q_proj"], True),
    BiasCase(QWEN2, "lora_only", ["o_proj"], False),
    BiasCase(QWEN2, "lora_only", "all-linear", True),
    BiasCase(RemoteCodeConfig(), "all", ["q_proj"], True),
]


@pytest.mark.parametrize("case", BIAS_CASES)
def test_biases_are_refused_only_where_there_are_some(case: BiasCase) -> None:
    lora_config = LoraConfig(target_modules=case.targets, bias=case.bias)
    if case.is_refused:
        with pytest.raises(UserError, match=f"--lora_bias {case.bias} with --q_lora True"):
            check_sharding(case.config, build_meta_model(case.config), lora_config, FSDP, quantized=True)
    else:
        check_sharding(case.config, build_meta_model(case.config), lora_config, FSDP, quantized=True)


def test_square_layers_are_not_taken_for_the_head() -> None:
    """The vocabulary is as large as the hidden size."""
    tied = LlamaConfig(**LLAMA.to_dict() | {"tie_word_embeddings": True})
    check_sharding(tied, build_meta_model(tied), LoraConfig(target_modules=["q_proj"]), FSDP)
    with pytest.raises(UserError, match="--lora_target_modules lm_head"):
        check_sharding(tied, build_meta_model(tied), LoraConfig(target_modules=["lm_head"]), FSDP)


def test_tied_weights_of_remote_code_are_found_by_name() -> None:
    config = RemoteCodeConfig(tie_word_embeddings=True)
    assert build_meta_model(config) is None
    check_sharding(config, None, LoraConfig(target_modules=["q_proj"]), FSDP)
    with pytest.raises(UserError, match="--modules_to_save embed_tokens"):
        check_sharding(
            config,
            build_meta_model(config),
            LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
            FSDP,
        )


@pytest.mark.parametrize(
    ("targets", "modules_to_save", "refused"),
    [
        (["c_attn"], ["wte"], True),
        (["c_attn", "wte"], None, True),
        (r".*(c_attn|wte)", None, True),
        (["c_attn"], ["wpe"], False),
        (r".*(c_attn|mlp)", None, False),
    ],
)
def test_tied_embeddings_are_found_under_any_name(
    targets: list[str] | str, modules_to_save: list[str] | None, refused: bool
) -> None:
    """GPT-2's are called wte; an adapter to start from may name its targets by a regular expression."""
    lora_config = LoraConfig(target_modules=targets, modules_to_save=modules_to_save)
    if refused:
        with pytest.raises(UserError, match="the head and the embeddings of this model share one"):
            check_sharding(GPT2, build_meta_model(GPT2), lora_config, FSDP)
    else:
        check_sharding(GPT2, build_meta_model(GPT2), lora_config, FSDP)
