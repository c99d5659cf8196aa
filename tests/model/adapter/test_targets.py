"""Names of modules and parameters -> the layers that PEFT adapts."""

from collections.abc import Collection

import pytest
from mixtures import CONFIGS, SIZES, make_mixture
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LagunaConfig, Lfm2Config, RwkvConfig

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.lora import attach_adapter, build_lora_config
from fastchat_qlora.model.adapter.targets import (
    attach_to_meta,
    condense,
    find_adapters,
    find_dropped,
    get_adapted,
    resolve_targets,
)
from fastchat_qlora.model.loading.base_model import build_meta_model
from fastchat_qlora.model.loading.text_part import find_text_part

USUAL_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def resolve(name: str, **flags: object) -> tuple[set[str], object]:
    """Return the adapted modules and parameters without the layer's number, and the configuration."""
    config = CONFIGS[name]
    model = build_meta_model(config)
    assert model is not None
    lora_config = build_lora_config(LoraArguments(**flags))
    resolved = resolve_targets(lora_config, model, find_text_part(model), lambda: build_meta_model(config))
    adapted = get_adapted(attach_to_meta(build_meta_model(config), resolved))
    return {name.partition("layers.")[2] for name in adapted}, resolved


def both(*ends: str, layers: Collection[int] = (0, 1)) -> set[str]:
    return {f"{layer}.{end}" for layer in layers for end in ends}


ATTENTION = both(*(f"self_attn.{name}_proj" for name in "qkvo"))
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHARED = tuple(f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj"))

ALL_LINEAR = {
    "qwen3_moe": ATTENTION | both(*FUSED),
    "qwen3_moe, one dense layer": ATTENTION | both(*FUSED, layers=[1]) | both(*MLP, layers=[0]),
    "qwen2_moe": ATTENTION | both(*FUSED, *SHARED),
    "mixtral": ATTENTION | both(*FUSED),
    "gpt_oss": ATTENTION | both(*FUSED),
}


@pytest.mark.parametrize("name", ALL_LINEAR)
def test_all_linear_means_attention_experts_shared_experts_and_dense_layers(name: str) -> None:
    adapted, config = resolve(name, lora_target_modules=["all-linear"], lora_r=4)
    assert adapted == ALL_LINEAR[name]
    assert (config.rank_pattern, config.alpha_pattern) == ({}, {})
    model = get_peft_model(make_mixture(name), config_without_dropout(config))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == len(adapted)
    assert {(layer.r["default"], layer.scaling["default"]) for layer in layers} == {(4, 4.0)}


def config_without_dropout(config: object) -> object:
    """As the adapter's file has it."""
    config.lora_dropout = 0.0
    return config


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "qwen3_moe, one dense layer"])
def test_the_usual_names_mean_the_experts_too(name: str) -> None:
    adapted, _ = resolve(name, lora_target_modules=USUAL_NAMES)
    assert adapted == ALL_LINEAR[name]


def test_names_of_mixtral_files_mean_its_experts() -> None:
    adapted, _ = resolve("mixtral", lora_target_modules=["q_proj", "w1", "w2", "w3"])
    assert adapted == both("self_attn.q_proj", *FUSED)


def test_half_of_a_fused_weight_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--lora_target_modules gate_proj: .* in one tensor with up_proj; name both"):
        resolve("qwen3_moe", lora_target_modules=["q_proj", "gate_proj"])


def test_modules_are_left_out_and_parameters_added() -> None:
    adapted, _ = resolve("qwen2_moe", lora_target_modules=["all-linear"], lora_exclude_modules=["experts", "o_proj"])
    assert adapted == {name for name in ATTENTION if not name.endswith("o_proj")} | both(*SHARED)
    adapted, _ = resolve("qwen3_moe", lora_target_parameters=["experts.down_proj"])
    assert adapted == both("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.down_proj")


@pytest.mark.parametrize(
    "flags",
    [
        {"lora_target_parameters": ["experts.middle_proj"]},
        {"lora_target_modules": ["all-linear"], "lora_exclude_modules": ["lm_haed"]},
    ],
    ids=str,
)
def test_names_that_match_nothing_are_errors(flags: dict[str, list[str]]) -> None:
    flag, (name, *_) = list(flags.items())[-1]
    with pytest.raises(UserError, match=f"--{flag} {name}: matches nothing to adapt; the model has .*down_proj"):
        resolve("qwen3_moe", **flags)


def test_names_that_leave_nothing_to_adapt_are_an_error() -> None:
    excluded = ["experts", "k_proj", "o_proj", "q_proj", "v_proj"]
    with pytest.raises(UserError, match=f"--lora_exclude_modules {' '.join(excluded)}: leaves no module to adapt"):
        resolve("qwen3_moe", lora_target_modules=["all-linear"], lora_exclude_modules=excluded)


@pytest.mark.parametrize(
    ("pattern", "adapted", "kept"),
    [
        (r".*\.(q|v)_proj", both("self_attn.q_proj", "self_attn.v_proj"), True),
        # PEFT (0.21.2) makes ends of names of it for mixtures, without the layer's number
        (r".*\.1\.self_attn\..*_proj", both(*(f"self_attn.{name}_proj" for name in "qkvo"), layers=[1]), False),
        (r".*self_attn.*", ATTENTION, False),  # matches norms, and what holds the layers
        (r".*experts.*_proj|.*o_proj", both("self_attn.o_proj", *FUSED), False),
    ],
)
def test_a_regular_expression_chooses_the_layers_that_it_matches(pattern: str, adapted: set[str], kept: bool) -> None:
    """It stands in the adapter's configuration if PEFT selects the same modules by it."""
    found, config = resolve("qwen3_moe", lora_target_modules=[pattern])
    assert found == adapted
    assert (config.target_modules == pattern) == kept


def test_a_regular_expression_excludes_modules() -> None:
    adapted, _ = resolve("qwen3_moe", lora_target_modules=["all-linear"], lora_exclude_modules=[r".*\.0\..*|.*experts"])
    assert adapted == {name for name in ATTENTION if name.startswith("1.")}


@pytest.mark.parametrize("flag", ["lora_target_modules", "lora_exclude_modules"])
def test_a_regular_expression_that_matches_nothing_is_an_error(flag: str) -> None:
    advice = r"a whole name, such as model.layers.0.*; write '\.\*\(q_proj\|v_proj\)'$"
    with pytest.raises(UserError, match=rf"--{flag} q_proj\|v_proj: .* {advice}"):
        resolve("qwen3_moe", **{"lora_target_modules": ["q_proj"], flag: ["q_proj|v_proj"]})


def test_a_parameter_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(UserError) as caught:
        resolve("qwen3_moe", lora_target_parameters=["fc1.weight"])
    assert str(caught.value) == (
        "--lora_target_parameters fc1.weight: matches nothing to adapt; the model has down_proj, embed_tokens.weight, "
        "gate.weight, gate_up_proj, k_proj.weight, lm_head.weight, o_proj.weight, q_proj.weight, v_proj.weight"
    )


def test_a_weight_of_a_linear_layer_is_adapted_as_its_module(caplog: pytest.LogCaptureFixture) -> None:
    flags = {"lora_target_modules": ["q_proj"], "lora_target_parameters": ["o_proj.weight", "lm_head.weight"]}
    adapted, config = resolve("qwen3_moe", **flags)
    assert adapted == both("self_attn.q_proj", "self_attn.o_proj") | {""}  # the head is in no layer
    assert not config.target_parameters
    assert "--lora_dropout" not in caplog.text


def test_a_weight_that_text_does_not_reach_is_left_out_though_it_is_named() -> None:
    config = Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    model = build_meta_model(config)
    asked = LoraArguments(lora_target_modules=["q_proj"], lora_target_parameters=["conv.conv.weight"])
    resolved = resolve_targets(build_lora_config(asked), model, find_text_part(model), lambda: build_meta_model(config))
    assert get_adapted(attach_to_meta(build_meta_model(config), resolved)) == {"model.layers.1.self_attn.q_proj"}


def test_dropout_stays_on_layers_beside_a_router_that_is_named(caplog: pytest.LogCaptureFixture) -> None:
    flags = {"lora_target_modules": ["q_proj"], "lora_target_parameters": ["mlp.gate.weight"]}
    adapted, config = resolve("qwen3_moe", **flags)
    assert adapted == both("self_attn.q_proj", "mlp.gate.weight")
    assert "--lora_dropout 0.05: not applied to 2 parameters" in caplog.text
    layers = find_adapters(attach_adapter(make_mixture("qwen3_moe"), config))
    rates = {getattr(layer.lora_dropout["default"], "p", 0) for name, layer in layers if name.endswith("q_proj")}
    assert (len(layers), rates) == (4, {0.05})


def test_a_dense_layer_named_as_a_parameter_keeps_its_dropout_and_the_file_is_said_to_have_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    resolve(
        "qwen3_moe, one dense layer", lora_target_modules=["gate_proj", "up_proj"], lora_exclude_modules=["experts"]
    )
    assert "--lora_dropout 0.05: the saved adapter has lora_dropout 0, because" in caplog.text
    assert "not applied" not in caplog.text


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("qwen3_moe", {"use_dora": True}, "--use_dora True: .* of 2 modules, such as .*_modules experts$"),
        (
            "qwen3_moe, one dense layer",
            {"use_dora": True, "lora_exclude_modules": ["experts"]},
            "--use_dora True: .* of 3 modules, such as .*_modules down_proj gate_proj up_proj$",
        ),
        ("qwen3_moe", {"init_lora_weights": "orthogonal"}, "--init_lora_weights orthogonal: .*_modules experts$"),
    ],
)
def test_what_peft_lacks_for_parameters_is_refused_by_its_flag(
    name: str, flags: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve(name, lora_target_modules=["all-linear"], **flags)


def test_a_router_that_is_no_plain_linear_layer_is_refused_by_its_class() -> None:
    with pytest.raises(
        UserError, match=r"feed_forward.router is a Llama4Router, which computes more than .* name other"
    ):
        resolve("llama4_text", lora_target_modules=["router"])


def test_a_dense_model_keeps_the_names_that_were_given() -> None:
    _, config = resolve("qwen3_moe", lora_target_modules=["q_proj", "v_proj"])
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.target_parameters is None


def test_adapters_that_peft_would_drop_are_left_out_of_all_linear() -> None:
    config = LagunaConfig(
        **SIZES,
        num_experts=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        layer_types=["full_attention"] * 2,
        mlp_layer_types=["dense", "sparse"],
    )
    model = build_meta_model(config)
    text = find_text_part(model)
    asked = build_lora_config(LoraArguments(lora_target_modules=["all-linear"]))
    resolved = resolve_targets(asked, model, text, lambda: build_meta_model(config))
    adapted = get_adapted(attach_to_meta(build_meta_model(config), resolved))
    left_out = {name for name in text.linear if "shared_experts" in name}
    assert len(left_out) == 3
    assert text.linear.keys() - adapted == left_out
    assert find_dropped(resolved, build_meta_model(config)) == frozenset()
    named = build_lora_config(LoraArguments(lora_target_modules=["shared_experts.up_proj"]))
    with pytest.raises(UserError, match=r"PEFT loses the adapters of 1 modules, such as .*shared_experts.up_proj"):
        resolve_targets(named, model, text, lambda: build_meta_model(config))


def test_weights_that_rwkv_changes_in_evaluation_get_no_adapter() -> None:
    config = RwkvConfig(vocab_size=320, hidden_size=16, num_hidden_layers=2)
    model = build_meta_model(config)
    text = find_text_part(model)
    asked = build_lora_config(LoraArguments(lora_target_modules=["all-linear"]))
    resolved = resolve_targets(asked, model, text, lambda: build_meta_model(config))
    adapted = get_adapted(attach_to_meta(build_meta_model(config), resolved))
    changed = {f"rwkv.blocks.{layer}.{name}" for layer in (0, 1) for name in ("attention.output", "feed_forward.value")}
    assert text.linear.keys() - adapted == changed
    named = build_lora_config(LoraArguments(lora_target_modules=["value"]))
    with pytest.raises(UserError, match=r"rwkv uses or changes .*leave it out by --lora_exclude_modules feed_forward."):
        resolve_targets(named, model, text, lambda: build_meta_model(config))


def test_names_are_shortened_as_far_as_they_stay_unique() -> None:
    everything = ["a.0.mlp.experts.up", "a.1.mlp.experts.up", "a.0.mlp.shared.up", "b.experts.down"]
    assert condense(frozenset(everything[:2]), everything) == ["experts.up"]
    assert condense(frozenset(everything[:1]), everything) == ["0.mlp.experts.up"]
