"""A DeepSpeed configuration is completed from the flags, and its state layout is compared."""

import copy
from typing import Any

import pytest

from fastchat_qlora.distributed.deepspeed_config import (
    AUTO_KEYS,
    describe_state_layout,
    fill_auto_settings,
    get_setting,
)


@pytest.mark.parametrize("name", AUTO_KEYS)
def test_missing_setting_becomes_auto(name: str) -> None:
    assert get_setting(fill_auto_settings({}, "adamw_torch"), name) == "auto"


def test_given_settings_and_the_original_stay_unchanged() -> None:
    config = {"gradient_clipping": 0.5, "bf16": {"enabled": True, "x": 1}, "zero_optimization": {"stage": 3}}
    before = copy.deepcopy(config)
    completed = fill_auto_settings(config, "adamw_torch")
    assert config == before
    assert {name: completed[name] for name in config} == config


def test_other_settings_do_not_change_the_state_layout() -> None:
    assert describe_state_layout({"zero_optimization": {"stage": 2, "overlap_comm": True}}) == describe_state_layout({})
    assert describe_state_layout(
        {"zero_optimization": {"sub_group_size": 1e9, "round_robin_gradients": False}}
    ) == describe_state_layout({})
    assert describe_state_layout({"zero_optimization": {"sub_group_size": 10**8}}) == describe_state_layout(
        {"zero_optimization": {"sub_group_size": 1e8}}
    )


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"round_robin_gradients": True}},
        {"zero_optimization": {"sub_group_size": 500}},
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        {"data_types": {"grad_accum_dtype": "fp32"}},
    ],
)
def test_setting_changes_the_state_layout(config: dict[str, Any]) -> None:
    assert describe_state_layout(config) != describe_state_layout({"bf16": {"enabled": True}})


@pytest.mark.parametrize(("optim", "forced"), [("adamw_torch", True), ("adamw_torch_fused", True), ("sgd", False)])
def test_offloaded_optimizer_is_not_replaced_by_cpu_adam(optim: str, forced: bool) -> None:
    """accelerate would replace any."""
    assert fill_auto_settings({}, optim).get("zero_force_ds_cpu_optimizer", True) is forced
