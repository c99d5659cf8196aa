"""What a DeepSpeed configuration leaves out follows the command line; what contradicts it is an error naming both."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fastchat_qlora.arguments import RunArguments, parse_args
from fastchat_qlora.deepspeed_config import FOLLOWING, complete
from fastchat_qlora.errors import UserError

PLAYGROUND = Path(__file__).parent.parent / "playground"


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As under a launcher, of one process; no later test loads a model into a ZeRO-3 configuration of these."""
    monkeypatch.setenv("RANK", "0")
    yield
    unset_hf_deepspeed_config()


@pytest.fixture
def parse(model_folder: Path, data_file: Path, tmp_path: Path) -> Any:
    required = ["--model_name_or_path", str(model_folder), "--data_path", str(data_file)]
    required += ["--output_dir", str(tmp_path / "output"), "--use_cpu", "True"]

    def parse_with(config: dict[str, Any], *flags: str) -> RunArguments:
        config = {"zero_optimization": {"stage": 2}} | config
        return parse_args([*required, "--deepspeed", json.dumps(config), *flags])

    return parse_with


def value_of(config: dict[str, Any], name: str) -> Any:
    for key in name.split("."):
        config = config[key]
    return config


@pytest.mark.parametrize("name", FOLLOWING)
def test_what_is_left_out_follows(name: str) -> None:
    assert value_of(complete({}, "adamw_torch"), name) == "auto"


def test_what_is_said_stays_and_the_original_too() -> None:
    config = {"gradient_clipping": 0.5, "bf16": {"enabled": True, "x": 1}, "zero_optimization": {"stage": 3}}
    before = copy.deepcopy(config)
    completed = complete(config, "adamw_torch")
    assert config == before
    assert {name: completed[name] for name in config} == config


def test_the_flags_arrive(parse: Any) -> None:
    flags = "--max_grad_norm 0.3 --bf16 True --per_device_train_batch_size 3 --gradient_accumulation_steps 5"
    config = parse({"zero_optimization": {"stage": 2}}, *flags.split()).training.hf_deepspeed_config.config
    assert config["gradient_clipping"] == 0.3
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (True, False)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert (config["gradient_accumulation_steps"], config["train_batch_size"]) == (5, 15)


def test_an_optimizer_and_a_schedule_follow_too(parse: Any) -> None:
    config = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupDecayLR"}}
    found = parse(config, "--learning_rate", "3e-4", "--weight_decay", "0.1").training.hf_deepspeed_config.config
    parameters = found["optimizer"]["params"]
    assert parameters == {"lr": 3e-4, "weight_decay": 0.1, "betas": [0.9, 0.999], "eps": 1e-8}
    assert found["scheduler"]["params"]["warmup_max_lr"] == 3e-4
    assert found["scheduler"]["params"]["total_num_steps"] == "auto", "filled in when the data is known"


CONTRADICTIONS = {
    "clipping": (
        {"gradient_clipping": 1.0},
        "--max_grad_norm 0.3",
        ["gradient_clipping is 1.0", "max_grad_norm is 0.3"],
    ),
    "a default": ({"gradient_clipping": 0.5}, "", ["gradient_clipping is 0.5", "--max_grad_norm is 1.0"]),
    "precision": ({"bf16": {"enabled": True}}, "", ["bf16.enabled is True", "--bf16 is False"]),
    "half precision": ({"fp16": {"enabled": True}}, "--bf16 True", ["fp16.enabled is True", "--fp16 is False"]),
    "micro batch": (
        {"train_micro_batch_size_per_gpu": 2},
        "--per_device_train_batch_size 4",
        ["train_micro_batch_size_per_gpu is 2", "--per_device_train_batch_size is 4"],
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 2},
        "--gradient_accumulation_steps 4",
        ["gradient_accumulation_steps is 2", "--gradient_accumulation_steps is 4"],
    ),
    "batch": ({"train_batch_size": 64}, "--per_device_train_batch_size 4", ["train_batch_size is 64", "is 4"]),
    "rate": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        "--learning_rate 2e-3",
        ["optimizer.params.lr is 0.001", "--learning_rate is 0.002"],
    ),
    "optimizer": ({"optimizer": {"type": "Lamb"}}, "--optim adamw_torch", ["type is Lamb", "--optim is adamw_torch"]),
    "another optimizer": ({"optimizer": {"type": "AdamW"}}, "--optim sgd", ["type is AdamW", "--optim is sgd"]),
    "schedule": (
        {"scheduler": {"type": "WarmupLR"}},
        "--lr_scheduler_type cosine",
        ["scheduler.type is WarmupLR", "--lr_scheduler_type is cosine"],
    ),
    "forced Adam": (
        {
            "zero_force_ds_cpu_optimizer": True,
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        },
        "--optim sgd",
        ["zero_force_ds_cpu_optimizer is true", "--optim is sgd"],
    ),
}


@pytest.mark.parametrize(("config", "flags", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradiction_names_both(parse: Any, config: dict[str, Any], flags: str, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(config, *flags.split())
    message = str(error.value)
    assert message.startswith("--deepspeed") and all(text in message for text in said), message


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ({"gradient_clipping": 0.3}, "--max_grad_norm 0.3"),
        ({"bf16": {"enabled": True}}, "--bf16 True"),
        ({"optimizer": {"type": "AdamW"}}, "--optim adamw_torch_fused"),
        ({"optimizer": {"type": "Lamb"}}, ""),
        ({"scheduler": {"type": "WarmupLR"}}, "--lr_scheduler_type constant_with_warmup"),
        ({"scheduler": {"type": "WarmupLR"}}, ""),
    ],
)
def test_agreement_is_no_contradiction(parse: Any, config: dict[str, Any], flags: str) -> None:
    assert parse(config, *flags.split()).training.hf_deepspeed_config.mismatches == []


MALFORMED = [
    ({"bf16": True}, "bf16 must be an object, not True"),
    ({"bf16": None}, "bf16 must be an object, not None"),
    ({"zero_optimization": []}, "zero_optimization must be an object"),
    ({"zero_optimization": {}}, "zero_optimization.stage must be 1, 2 or 3; without --deepspeed the strategy is DDP"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage must be 1, 2 or 3, not 0"),
    ({"zero_optimization": {"stage": 4}}, "must be 1, 2 or 3, not 4"),
    ({"zero_optimization": {"stage": True}}, "must be 1, 2 or 3, not True"),
    ({"zero_optimization": {"stage": "2"}}, "must be 1, 2 or 3, not '2'"),
    ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "zero_optimization.offload_param must be an object"),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param means something at stage"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "follows from the data; leave it out"),
    ({"scheduler": {"type": "WarmupLR", "params": None}}, "scheduler.params must be an object, not None"),
    ({"optimizer": {}}, "optimizer.type must be a name, not None"),
    ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params must be an object, not [1]"),
    ({"gradient_clipping": None}, "gradient_clipping must be a number, not None"),
    ({"train_batch_size": "8"}, "train_batch_size must be a number, not '8'"),
    ({"gradient_cliping": 1.0}, "gradient_cliping is unknown; did you mean gradient_clipping?"),
    ({"bfloat16": {"enabled": True}}, "bfloat16 is not for here: it is called bf16; drop it"),
    ({"torch_autocast": {"enabled": True}}, "give --bf16 True or --fp16 True"),
    ({"activation_checkpointing": {}}, "give --gradient_checkpointing True"),
    ({"gradient_allreduce_op": "sum"}, "gradients are averaged"),
]


@pytest.mark.parametrize(("config", "said"), MALFORMED)
def test_what_is_malformed_is_an_error(config: dict[str, Any], said: str, parse: Any) -> None:
    with pytest.raises(UserError, match="--deepspeed") as error:
        parse(config)
    assert said in str(error.value)


REFUSED = [
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com is unknown; did you mean overlap_comm?"),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "perhaps"}}, "overlap_comm is 'perhaps': "),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpuu"}}}, "offload_param.device is 'cpuu': "),
    ({"optimizer": {"type": "SGD"}}, "optimizer.type SGD is none of "),
    ({"communication_data_type": "int3"}, "DeepSpeed does not take it: "),
]


@pytest.mark.parametrize(("config", "said"), REFUSED)
def test_what_deepspeed_would_refuse_is_an_error(config: dict[str, Any], said: str, parse: Any) -> None:
    """At the door, and not after the weights are loaded."""
    with pytest.raises(UserError, match="--deepspeed") as error:
        parse(config)
    assert said in str(error.value)


def test_an_untested_optimizer_may_be_allowed(parse: Any) -> None:
    parse({"optimizer": {"type": "SGD"}, "zero_allow_untested_optimizer": True})


@pytest.mark.parametrize("name", ["s2", "s2_offload", "s3", "s3_offload"])
def test_our_own_configurations_pass(parse: Any, name: str) -> None:
    config = json.loads((PLAYGROUND / f"deepspeed_config_{name}.json").read_text())
    assert parse(config, "--bf16", "True").training.deepspeed


@pytest.mark.parametrize(("optim", "forced"), [("adamw_torch", True), ("adamw_torch_fused", True), ("sgd", False)])
def test_an_offloaded_optimizer_is_the_one_asked_for(optim: str, forced: bool) -> None:
    """accelerate puts DeepSpeed's CPU Adam in place of any, unless told otherwise."""
    assert complete({}, optim).get("zero_force_ds_cpu_optimizer", True) is forced
