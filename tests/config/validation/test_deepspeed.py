"""A DeepSpeed configuration follows the flags; contradictions, unknown and unsupported settings are errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.errors import UserError

PLAYGROUND = Path(__file__).resolve().parents[3] / "playground"


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As under a launcher, of one process; no later test loads a model into a ZeRO-3 configuration of these."""
    monkeypatch.setenv("RANK", "0")
    yield
    unset_hf_deepspeed_config()


@pytest.fixture
def required(required: list[str]) -> list[str]:
    return [*required, "--use_cpu", "True"]


@pytest.fixture
def parse(required: list[str]) -> Any:
    def parse_with(config: dict[str, Any], *more: str) -> RunArguments:
        config = {"zero_optimization": {"stage": 2}} | config
        return parse_args([*required, "--deepspeed", json.dumps(config), *more])

    return parse_with


def test_flags_arrive_in_the_configuration(parse: Any) -> None:
    flags = "--max_grad_norm 0.3 --bf16 True --per_device_train_batch_size 3 --gradient_accumulation_steps 5"
    config = parse({"zero_optimization": {"stage": 2}}, *flags.split()).training.hf_deepspeed_config.config
    assert config["gradient_clipping"] == 0.3
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (True, False)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert (config["gradient_accumulation_steps"], config["train_batch_size"]) == (5, 15)


def test_optimizer_and_schedule_follow_the_flags(parse: Any) -> None:
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
    "optimizer": ({"optimizer": {"type": "Lion"}}, "--optim adamw_torch", ["type is Lion", "--optim is adamw_torch"]),
    "another optimizer": ({"optimizer": {"type": "AdamW"}}, "--optim sgd", ["type is AdamW", "--optim is sgd"]),
    "bits": ({"optimizer": {"type": "AdamW"}}, "--optim adamw_8bit", ["type is AdamW", "--optim is adamw_8bit"]),
    "decay": (
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        "--optim adamw_torch",
        ["type is Adam", "--optim is adamw_torch"],
    ),
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
def test_contradiction_names_setting_and_flag(parse: Any, config: dict[str, Any], flags: str, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(config, *flags.split())
    message = str(error.value)
    assert "--deepspeed" in message and all(text in message for text in said), message


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ({"gradient_clipping": 0.3}, "--max_grad_norm 0.3"),
        ({"bf16": {"enabled": True}}, "--bf16 True"),
        ({"optimizer": {"type": "AdamW"}}, "--optim adamw_torch_fused"),
        ({"optimizer": {"type": "Lion"}}, ""),
        ({"scheduler": {"type": "WarmupLR"}}, "--lr_scheduler_type constant_with_warmup"),
        ({"scheduler": {"type": "WarmupLR"}}, ""),
    ],
)
def test_equal_settings_are_accepted(parse: Any, config: dict[str, Any], flags: str) -> None:
    assert parse(config, *flags.split()).training.hf_deepspeed_config.mismatches == []


MALFORMED = [
    ({"bf16": True}, "bf16 must be an object, not True"),
    ({"bf16": None}, "bf16 must be an object, not None"),
    ({"flops_profiler": True}, "flops_profiler must be an object, not True"),
    ({"zero_optimization": []}, "zero_optimization must be an object"),
    ({"zero_optimization": {}}, "zero_optimization.stage must be 1, 2 or 3; without --deepspeed the strategy is DDP"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage must be 1, 2 or 3, not 0"),
    ({"zero_optimization": {"stage": 4}}, "must be 1, 2 or 3, not 4"),
    ({"zero_optimization": {"stage": True}}, "must be 1, 2 or 3, not True"),
    ({"zero_optimization": {"stage": "2"}}, "must be 1, 2 or 3, not '2'"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, '(give offload_optimizer {"device": "cpu"}); drop it'),
    ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "zero_optimization.offload_param must be an object"),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "offload_param is supported at stage 3 only",
    ),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpuu"}}}, "must be cpu, nvme or none, not cpuu"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}},
        "must be cpu, nvme or none, not auto",
    ),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "add its nvme_path"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "depends on the data; leave it out"),
    ({"scheduler": {"type": "WarmupLR", "params": None}}, "scheduler.params must be an object, not None"),
    ({"scheduler": {"type": "WarmupLR", "warmup_min_lr": 0}}, "it may belong in scheduler.params"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, "needs stage 3"),
    ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "clipping and the log need the norm"),
    ({"zero_optimization.cpu_offload": True}, "zero_optimization.cpu_offload is unknown"),
    ({"optimizer": {}}, "optimizer.type must be a name, not None"),
    ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params must be an object, not [1]"),
    ({"optimizer": {"type": "AdamW", "lr": 0.5}}, "optimizer.lr is unknown; it may belong in optimizer.params"),
    (
        {"optimizer": {"type": "AdamW", "params": {"beta": 0.5}}},
        "optimizer.params.beta is unknown; did you mean betas?",
    ),
    ({"optimizer": {"type": "SGD"}}, "optimizer.type SGD must be one of adam, adamw, adagrad, lion"),
    ({"data_types": {"grad_accum_dtype": "foo"}}, "data_types.grad_accum_dtype is 'foo'"),
    ({"gradient_clipping": None}, "gradient_clipping must be a number, not None"),
    ({"train_batch_size": "8"}, "train_batch_size must be a number, not '8'"),
    ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown must be true or false, not 'yes'"),
    ({"gradient_cliping": 1.0}, "gradient_cliping is unknown; did you mean gradient_clipping?"),
    ({"bfloat16": {"enabled": True}}, "bfloat16 is not supported here (it is called bf16); drop it"),
    ({"torch_autocast": {"enabled": True}}, "give --bf16 True or --fp16 True"),
    ({"activation_checkpointing": {}}, "give --gradient_checkpointing True"),
    ({"gradient_allreduce_op": "sum"}, "gradients are averaged"),
    ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is not supported here (gradients are averaged)"),
]
"""Configurations that DeepSpeed would accept, or that can be refused without it."""

REFUSED = [
    (
        {"zero_optimization": {"stage": 2, "overlap_com": True}},
        "zero_optimization.overlap_com is unknown; did you mean ov",
    ),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "perhaps"}}, "zero_optimization.overlap_comm is 'perhaps': "),
    (
        {"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}},
        "allgather_bucket_size is auto, which nothing",
    ),
    ({"zero_optimization": {"stage": 3, "offload_param": {"devic": "cpu"}}}, "offload_param.devic is unknown; drop it"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "zero_optimization: Assertion failed, Partial",
    ),
    ({"fp16": {"loss_scal": 0}}, "fp16.loss_scal is unknown; did you mean loss_scale?"),
    ({"scheduler": {"type": "Linear"}}, "scheduler.type Linear must be one of LRRangeTest, OneCycle, WarmupLR"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_typ": "linear"}}}, "did you mean warmup_type?"),
    ({"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": "auto"}}}, "params.total_num_steps is unknown"),
    ({"communication_data_type": "int3"}, "DeepSpeed refuses it: "),
]
"""Configurations that DeepSpeed's own models refuse."""


@pytest.mark.parametrize(("config", "said"), [*MALFORMED, *REFUSED])
def test_setting_that_deepspeed_would_ignore_or_refuse_is_an_error(
    config: dict[str, Any], said: str, parse: Any
) -> None:
    """Not only after the weights are loaded."""
    with pytest.raises(UserError, match="--deepspeed") as error:
        parse(config)
    assert said in str(error.value)


def test_contradiction_and_refusal_are_reported_together(parse: Any) -> None:
    with pytest.raises(UserError) as error:
        parse({"gradient_clipping": 7, "zero_optimization": {"stage": 2, "overlap_com": True}})
    assert "gradient_clipping is 7" in str(error.value) and "overlap_com is unknown" in str(error.value)


PUBLISHED = {
    "LLaMA-Factory's ZeRO-3": {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    },
    "transformers' documentation": {
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": "auto",
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
            },
        },
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "allgather_partitions": True,
            "allgather_bucket_size": 5e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 5e8,
            "contiguous_gradients": True,
            "round_robin_gradients": True,
        },
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    "nothing offloaded": {"zero_optimization": {"stage": 3, "offload_optimizer": None, "offload_param": None}},
    "switched off": {
        "zero_optimization": {"stage": 2, "cpu_offload": False},
        "prescale_gradients": False,
    },
    "sums in fp32": {"data_types": {"grad_accum_dtype": "fp32"}},
}


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configuration_is_accepted(parse: Any, config: dict[str, Any]) -> None:
    parse(config)


def test_duplicate_name_is_refused(required: list[str]) -> None:
    text = '{"zero_optimization": {"stage": 2, "stage": 3}}'
    with pytest.raises(UserError, match="stage is there twice"):
        parse_args([*required, "--deepspeed", text])


@pytest.mark.parametrize("depth", [51, 900, 100_000])
def test_deep_nesting_is_refused(depth: int, required: list[str]) -> None:
    text = '{"timers":' * depth + "1" + "}" * depth
    with pytest.raises(UserError, match="objects in more than 50 others"):
        parse_args([*required, "--deepspeed", text])


@pytest.mark.parametrize("optim", ["adafactor", "stable_adamw"])
def test_optimizer_that_needs_shapes_is_refused(parse: Any, optim: str) -> None:
    """ZeRO gives it flattened parameters."""
    with pytest.raises(UserError, match=f"--optim {optim}: needs the shapes that ZeRO flattens"):
        parse({}, "--optim", optim)


@pytest.mark.parametrize("name", ["s2", "s2_offload", "s3", "s3_offload"])
def test_own_configuration_is_accepted(parse: Any, name: str) -> None:
    config = json.loads((PLAYGROUND / f"deepspeed_config_{name}.json").read_text())
    assert parse(config, "--bf16", "True").training.deepspeed
