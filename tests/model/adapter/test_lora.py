import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.compatibility import check_sharding, check_targets
from fastchat_qlora.model.adapter.lora import attach_adapter, build_lora_config, get_trainable_parameters
from fastchat_qlora.model.loading.base_model import build_meta_model

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def model(model_folder: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)


def adapted(model: PreTrainedModel, **arguments: object) -> set[str]:
    """Last names of the modules that got an adapter."""
    peft_model = attach_adapter(model, build_lora_config(LoraArguments(**arguments)))
    return {
        name.split(".lora_A")[0].rpartition(".")[2] for name in get_trainable_parameters(peft_model) if "lora_A" in name
    }


def test_default_targets(model: PreTrainedModel) -> None:
    assert adapted(model) == {"q_proj", "v_proj"}


def test_all_linear_spares_the_head(model: PreTrainedModel) -> None:
    assert adapted(model, lora_target_modules=["all-linear"]) == LINEAR


def test_base_stays_as_it_was_loaded(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft_model = attach_adapter(model, build_lora_config(LoraArguments()))
    trained = get_trainable_parameters(peft_model)
    assert trained and all("lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    frozen = {name: p for name, p in peft_model.named_parameters() if name not in trained}
    assert {parameter.dtype for parameter in frozen.values()} == {torch.bfloat16}
    assert len(frozen) == len(before) - (1 if model.config.tie_word_embeddings else 0)
    for name, parameter in frozen.items():
        assert torch.equal(parameter, before[name.removeprefix("base_model.model.").replace(".base_layer", "")])


def test_lora_config_carries_every_argument() -> None:
    lora_args = LoraArguments(
        lora_r=4,
        lora_alpha=12,
        lora_dropout=0.25,
        lora_target_modules=["k_proj"],
        lora_bias="lora_only",
        use_rslora=True,
        use_dora=True,
        init_lora_weights="gaussian",
        modules_to_save=["lm_head"],
    )
    config = build_lora_config(lora_args)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.25)
    assert set(config.target_modules) == {"k_proj"} and config.bias == "lora_only"
    assert config.use_rslora and config.use_dora and config.init_lora_weights == "gaussian"
    assert config.modules_to_save == ["lm_head"] and config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("all", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("lora_only", {"q_proj", "v_proj"}),
    ],
)
def test_bias(model: PreTrainedModel, bias: str, expected: set[str]) -> None:
    peft_model = attach_adapter(model, build_lora_config(LoraArguments(lora_bias=bias)))
    biases = {name for name in get_trainable_parameters(peft_model) if name.endswith(".bias")}
    assert {name.split(".self_attn.")[1].partition(".")[0] for name in biases} == expected


def test_dora_and_modules_to_save(model: PreTrainedModel) -> None:
    lora_args = LoraArguments(use_dora=True, modules_to_save=["lm_head"])
    trained = get_trainable_parameters(attach_adapter(model, build_lora_config(lora_args)))
    assert any("lora_magnitude_vector" in name for name in trained)
    assert any("lm_head.modules_to_save" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


def test_rslora_scales_by_the_root(model: PreTrainedModel) -> None:
    peft_model = attach_adapter(model, build_lora_config(LoraArguments(lora_r=16, lora_alpha=8, use_rslora=True)))
    layer = next(module for module in peft_model.modules() if isinstance(module, LoraLayer))
    assert layer.scaling["default"] == pytest.approx(8 / 4)


def test_start_from_an_adapter(model: PreTrainedModel, model_folder: Path, tmp_path: Path) -> None:
    first = attach_adapter(model, build_lora_config(LoraArguments(lora_r=4, init_lora_weights="gaussian")))
    with torch.no_grad():
        for parameter in get_trainable_parameters(first).values():
            parameter.normal_()
    first.save_pretrained(tmp_path)
    config = build_lora_config(LoraArguments(lora_r=8, lora_weight_path=str(tmp_path)))
    assert config.r == 4, "the shape is the adapter's own"
    base = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    second = get_trainable_parameters(attach_adapter(base, config, str(tmp_path)))
    assert second.keys() == get_trainable_parameters(first).keys()
    for name, parameter in get_trainable_parameters(first).items():
        assert torch.equal(second[name], parameter)


def test_targets_that_match_nothing_are_named(model_folder: Path) -> None:
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
    with pytest.raises(UserError, match="--modules_to_save head"):
        check_targets(meta_model, build_lora_config(LoraArguments(modules_to_save=["head"])))


class ElsewhereConfig(PretrainedConfig):
    """Of a model whose code comes with its weights."""

    model_type = "elsewhere"


ONE = Topology(local_rank=0, rank=0, world_size=2, accelerator=None, zero_stage=0, fsdp=False)
ZERO_3, FSDP = (dataclasses.replace(ONE, zero_stage=3), dataclasses.replace(ONE, fsdp=True))


@pytest.mark.parametrize(
    ("refused_under", "tied", "quantized", "flags", "said"),
    [
        ([ZERO_3], False, True, {"use_dora": True}, "--use_dora True with --q_lora True"),
        ([FSDP], False, True, {"lora_bias": "all"}, "--lora_bias all with --q_lora True"),
        (
            [FSDP],
            True,
            False,
            {"modules_to_save": ["lm_head"]},
            "--modules_to_save lm_head: the head and the embeddings",
        ),
        (
            [FSDP],
            True,
            False,
            {"lora_target_modules": ["q_proj", "embed_tokens"]},
            "--lora_target_modules embed_tokens q_proj: the head",
        ),
        ([], False, False, {"modules_to_save": ["lm_head"], "use_dora": True, "lora_bias": "all"}, ""),
        ([], True, True, {}, ""),
        ([], True, True, {"lora_target_modules": ["all-linear"]}, ""),
    ],
)
def test_what_cannot_be_trained_on_shards_is_refused(
    refused_under: list[Topology], tied: bool, quantized: bool, flags: dict, said: str, model_folder: Path
) -> None:
    config = AutoConfig.from_pretrained(model_folder, tie_word_embeddings=tied, attention_bias="lora_bias" in flags)
    lora_config = build_lora_config(LoraArguments(**flags))
    for topology in (ONE, ZERO_3, FSDP):
        if topology in refused_under:
            with pytest.raises(UserError, match=f"^{said}.*; choose "):
                check_sharding(config, build_meta_model(config), lora_config, topology, quantized=quantized)
        else:
            check_sharding(config, build_meta_model(config), lora_config, topology, quantized=quantized)


GPT2 = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50)
LLAMA = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8)
QWEN2 = Qwen2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=50)


@pytest.mark.parametrize(
    ("config", "bias", "targets", "refused"),
    [
        (LLAMA, "all", ["q_proj"], False),
        (GPT2, "all", ["c_attn"], True),
        (QWEN2, "lora_only", ["q_proj"], True),
        (QWEN2, "lora_only", ["o_proj"], False),
        (QWEN2, "lora_only", "all-linear", True),
        (ElsewhereConfig(), "all", ["q_proj"], True),
    ],
)
def test_there_must_be_biases_to_be_refused(
    config: PretrainedConfig, bias: str, targets: list[str] | str, refused: bool
) -> None:
    lora_config = LoraConfig(target_modules=targets, bias=bias)
    if refused:
        with pytest.raises(UserError, match=f"--lora_bias {bias} with --q_lora True"):
            check_sharding(config, build_meta_model(config), lora_config, FSDP, quantized=True)
    else:
        check_sharding(config, build_meta_model(config), lora_config, FSDP, quantized=True)


def test_a_square_layer_is_no_head() -> None:
    """Here the vocabulary is as large as the model is wide."""
    tied = LlamaConfig(**LLAMA.to_dict() | {"tie_word_embeddings": True})
    check_sharding(tied, build_meta_model(tied), LoraConfig(target_modules=["q_proj"]), FSDP)
    with pytest.raises(UserError, match="--lora_target_modules lm_head"):
        check_sharding(tied, build_meta_model(tied), LoraConfig(target_modules=["lm_head"]), FSDP)


def test_tied_ends_of_a_model_whose_code_lies_elsewhere() -> None:
    config = ElsewhereConfig(tie_word_embeddings=True)
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
def test_tied_embeddings_go_by_many_names(
    targets: list[str] | str, modules_to_save: list[str] | None, refused: bool
) -> None:
    """GPT-2's are called wte; an adapter to start from may name its targets by a regular expression."""
    lora_config = LoraConfig(target_modules=targets, modules_to_save=modules_to_save)
    if refused:
        with pytest.raises(UserError, match="the head and the embeddings of this model share one"):
            check_sharding(GPT2, build_meta_model(GPT2), lora_config, FSDP)
    else:
        check_sharding(GPT2, build_meta_model(GPT2), lora_config, FSDP)
