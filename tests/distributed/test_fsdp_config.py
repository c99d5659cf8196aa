"""FSDP2's settings are checked before anything is loaded, and none is ignored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastchat_qlora.config.arguments import RunArguments, TrainingArguments
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.errors import UserError


@pytest.fixture
def parse(required: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parse as the first of two processes, without waiting for the other."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))

    def parse_with(*flags: str) -> RunArguments:
        return parse_args([*required, "--use_cpu", "True", *flags])

    return parse_with


@pytest.mark.parametrize(
    "flags", [["--fsdp"], ["--fsdp", "True"], ["--fsdp", "true"], ["--fsdp", "full_shard auto_wrap"]]
)
def test_fsdp_is_on(parse: Any, flags: list[str]) -> None:
    training = parse(*flags).training
    assert training.fsdp is True and training.fsdp_plugin_args["fsdp_version"] == 2


@pytest.mark.parametrize("flags", [[], ["--fsdp", "False"]])
def test_fsdp_is_off(parse: Any, flags: list[str]) -> None:
    training = parse(*flags).training
    assert not training.fsdp and training.fsdp_plugin_args is None


def test_fsdp_without_a_launcher_is_ignored_with_a_warning(
    parse: Any, monkeypatch: pytest.MonkeyPatch, notices: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not parse("--fsdp", "True").training.fsdp
    assert "--fsdp: ignored" in notices.text


@pytest.mark.parametrize(("quantized", "one_reads"), [("False", True), ("True", False)])
def test_one_process_of_a_machine_reads_plain_weights(parse: Any, quantized: str, one_reads: bool) -> None:
    assert parse("--fsdp", "--q_lora", quantized).training.fsdp_config["cpu_ram_efficient_loading"] is one_reads
    chosen = parse("--fsdp", "--fsdp_config", '{"cpu_ram_efficient_loading": false}').training
    assert chosen.fsdp_config["cpu_ram_efficient_loading"] is False


@pytest.mark.parametrize("name", ["activation_checkpointing", "fsdp_activation_checkpointing"])
def test_activation_checkpointing_of_fsdp_becomes_the_models(
    parse: Any, name: str, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    """accelerate's wrappers would change the names of the adapter's tensors."""
    config = tmp_path / "fsdp.json"
    config.write_text(json.dumps({name: True, "reshard_after_forward": False}))
    training = parse("--fsdp", "--fsdp_config", str(config)).training
    assert training.gradient_checkpointing
    assert "activation_checkpointing" not in training.fsdp_plugin_args
    assert training.fsdp_plugin_args["reshard_after_forward"] is False
    assert "applied as --gradient_checkpointing True" in notices.text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"reshard_after_forwards": True}, "did you mean reshard_after_forward?"),
        ({"zzz": 1}, "zzz is unknown; drop it"),
        ({"fsdp_use_orig_params": True}, "use_orig_params is not supported here (FSDP1 only)"),
        ({"version": 1}, "version must be 2"),
        ({"fsdp_version": "1"}, "version must be 2"),
        ({"cpu_offload": True}, "drop offload"),
        ({"cpu_offload": "True"}, "drop offload"),
        ({"cpu_offload": 1}, "cpu_offload must be true or false, not 1"),
        ({"activation_checkpointing": "x"}, "activation_checkpointing must be true or false, not 'x'"),
        ({"min_num_params": 1000}, "min_num_params is not supported here (SIZE_BASED_WRAP only)"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, "auto_wrap_policy must be TRANSFORMER_BASED_WRAP, not"),
        ({"state_dict_type": "LOCAL_STATE_DICT"}, "must be FULL_STATE_DICT or SHARDED_STATE_DICT"),
        ({"fsdp_offload_params": True}, "drop offload"),
        ({"reshard_after_forward": True, "fsdp_reshard_after_forward": False}, "is given in two spellings; drop one"),
        ({"fsdp_sharding_strategy": "FULL_SHARD"}, "(FSDP1 only, FSDP2 has reshard_after_forward); drop it"),
        ({"transformer_layer_cls_to_wrap": "LlamaMLP,"}, "must be a name or a list of names, not 'LlamaMLP,'"),
        ({"transformer_layer_cls_to_wrap": 7}, "must be a name or a list of names, not 7"),
    ],
)
def test_unsupported_setting_is_refused(parse: Any, config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        parse("--fsdp", "--fsdp_config", json.dumps(config))
    assert "--fsdp" in str(error.value) and said in str(error.value)


def test_offload_on_the_cpu_is_refused(parse: Any) -> None:
    with pytest.raises(UserError, match="drop offload"):
        parse("--fsdp", "full_shard offload")


@pytest.mark.parametrize("word", ["hybrid_shard", "no_shard", "full-shard"])
def test_option_of_fsdp1_is_refused(parse: Any, word: str) -> None:
    with pytest.raises(UserError, match=f"--fsdp {word}: not supported by FSDP2"):
        parse("--fsdp", word)


def test_switch_may_be_a_word(parse: Any) -> None:
    training = parse("--fsdp", "--fsdp_config", '{"cpu_offload": "false", "reshard_after_forward": "false"}').training
    assert training.fsdp_config["cpu_offload"] is False and "cpu_offload" not in training.fsdp_plugin_args
    assert training.fsdp_plugin_args["reshard_after_forward"] is False


def test_layers_may_be_one_string(parse: Any) -> None:
    config = '{"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer, LlamaMLP"}'
    training = parse("--fsdp", "--fsdp_config", config).training
    assert training.fsdp_config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer", "LlamaMLP"]


@pytest.mark.parametrize("optim", ["adafactor", "adamw_8bit", "paged_adamw_8bit"])
def test_optimizer_that_cannot_step_on_shards_is_refused(parse: Any, optim: str) -> None:
    with pytest.raises(UserError, match=f"--optim {optim}: is not supported with --fsdp"):
        parse("--fsdp", "--optim", optim)


def test_best_checkpoint_must_be_complete(parse: Any) -> None:
    flags = "--save_only_model True --load_best_model_at_end True --eval_split 2 --eval_strategy steps --save_steps 500"
    with pytest.raises(UserError, match="only complete checkpoints can be loaded"):
        parse("--fsdp", *flags.split())


@pytest.mark.parametrize(
    ("words", "config", "said"),
    [
        ("full_shard shard_grad_op", {}, "--fsdp full_shard and shard_grad_op contradict each other; drop one"),
        ("shard_grad_op", {"reshard_after_forward": True}, "shard_grad_op and --fsdp_config reshard_after_forward"),
        ("full_shard", {"fsdp_reshard_after_forward": "false"}, "full_shard and --fsdp_config reshard_after_forward"),
        ("offload", {"cpu_offload": False}, "offload and --fsdp_config cpu_offload"),
    ],
)
def test_contradictory_options_are_refused(parse: Any, words: str, config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        parse("--fsdp", words, "--fsdp_config", json.dumps(config))
    assert said in str(error.value)


@pytest.mark.parametrize("flags", [["True"], ["shard_grad_op"], ["full_shard auto_wrap"]])
def test_consistent_options_are_accepted(parse: Any, flags: list[str]) -> None:
    keeps = flags == ["shard_grad_op"]
    config = {"reshard_after_forward": not keeps, "state_dict_type": "full_state_dict"}
    config = json.dumps(config | {"auto_wrap_policy": "transformer_based_wrap"})
    training = parse("--fsdp", *flags, "--fsdp_config", config).training
    assert training.fsdp_plugin_args["reshard_after_forward"] is not keeps
    assert training.fsdp_config["state_dict_type"] == "FULL_STATE_DICT"
