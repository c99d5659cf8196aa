"""Adapters on a base model: targets, dtypes, and starting from an adapter."""

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
)

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.model.adapter.lora import attach_adapter, build_lora_config, get_trainable_parameters

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def model(model_folder: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)


def adapted(model: PreTrainedModel, **arguments: object) -> set[str]:
    """Return the last names of the modules with an adapter."""
    peft_model = attach_adapter(model, build_lora_config(LoraArguments(**arguments)))
    return {
        name.split(".lora_A")[0].rpartition(".")[2] for name in get_trainable_parameters(peft_model) if "lora_A" in name
    }


def test_default_targets(model: PreTrainedModel) -> None:
    assert adapted(model) == {"q_proj", "v_proj"}


def test_all_linear_excludes_the_head(model: PreTrainedModel) -> None:
    assert adapted(model, lora_target_modules=["all-linear"]) == LINEAR


def test_base_model_stays_unchanged(model: PreTrainedModel) -> None:
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
def test_biases_are_trained_as_asked(model: PreTrainedModel, bias: str, expected: set[str]) -> None:
    peft_model = attach_adapter(model, build_lora_config(LoraArguments(lora_bias=bias)))
    biases = {name for name in get_trainable_parameters(peft_model) if name.endswith(".bias")}
    assert {name.split(".self_attn.")[1].partition(".")[0] for name in biases} == expected


def test_dora_and_saved_modules_are_trained_in_fp32(model: PreTrainedModel) -> None:
    lora_args = LoraArguments(use_dora=True, modules_to_save=["lm_head"])
    trained = get_trainable_parameters(attach_adapter(model, build_lora_config(lora_args)))
    assert any("lora_magnitude_vector" in name for name in trained)
    assert any("lm_head.modules_to_save" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


def test_rslora_scales_by_the_root(model: PreTrainedModel) -> None:
    peft_model = attach_adapter(model, build_lora_config(LoraArguments(lora_r=16, lora_alpha=8, use_rslora=True)))
    layer = next(module for module in peft_model.modules() if isinstance(module, LoraLayer))
    assert layer.scaling["default"] == pytest.approx(8 / 4)


def test_training_starts_from_an_adapter(model: PreTrainedModel, model_folder: Path, tmp_path: Path) -> None:
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
