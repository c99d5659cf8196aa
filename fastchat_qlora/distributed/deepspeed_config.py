"""DeepSpeed configuration of a run: settings that follow the flags, and how its state is laid out.

transformers fills in what a configuration calls "auto". What it leaves out keeps DeepSpeed's own defaults, such as a
clipping of 1.0 whatever `--max_grad_norm` says.
"""

import copy
from collections.abc import Mapping
from typing import Any

AUTO_KEYS = (
    *("gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("bf16.enabled", "fp16.enabled"),
)
"""Settings that follow the flags unless the configuration has them."""

DATA_DEPENDENT_KEYS = ("total_num_steps", "warmup_num_steps")  # parameters of a scheduler

STEPPED_BY_CPU_ADAM = ("adamw_torch", "adamw_torch_fused")
"""Optimizers whose mathematics DeepSpeed's CPU Adam has; accelerate replaces them by it when they are offloaded."""

ADAM_NAMES = ("adam", "adamw")

LAYOUT: dict[str, dict[str, Any]] = {
    "zero_optimization": {
        "parameter_alignment": False,
        "round_robin_gradients": False,
        "sub_group_size": 1_000_000_000,
        "zero_hpz_partition_size": 1,
    },
    "bf16": {"bf16_master_weights_and_grads": False, "bf16_optimizer_states": False},
    "fp16": {"fp16_master_weights_and_grads": False},
    "data_types": {"grad_accum_dtype": None},
}
"""Settings by which DeepSpeed orders what it flattens -> defaults; read with others, values reach other parameters."""

SCHEDULERS = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's name -> transformers' for the same curve."""

SCHEDULER_PARAMS = {
    "WarmupLR": ("warmup_num_steps", "warmup_max_lr"),
    "WarmupDecayLR": (*DATA_DEPENDENT_KEYS, "warmup_max_lr"),
    "WarmupCosineLR": DATA_DEPENDENT_KEYS,
}


def fill_auto_settings(config: Mapping[str, Any], optim: str) -> dict[str, Any]:
    """Return a configuration without errors, in which everything that should follow the flags is "auto"."""
    completed: dict[str, Any] = copy.deepcopy(dict(config))
    for name in (*AUTO_KEYS, *_list_params(completed)):
        *sections, key = name.split(".")
        place = completed
        for section in sections:
            place = place.setdefault(section, {})
        place.setdefault(key, "auto")
    if "optimizer" not in completed and optim not in STEPPED_BY_CPU_ADAM:
        # accelerate would replace any optimizer by DeepSpeed's CPU Adam.
        completed.setdefault("zero_force_ds_cpu_optimizer", False)
    return completed


def _list_params(config: Mapping[str, Any]) -> list[str]:
    """Return the parameters of the optimizer and the scheduler that follow the flags."""
    optimizer, scheduler = (str(get_setting(config, f"{section}.type")) for section in ("optimizer", "scheduler"))
    names = ("lr", "weight_decay", "betas", "eps") if optimizer.lower() in ADAM_NAMES else ("lr", "weight_decay")
    keys = [f"optimizer.params.{name}" for name in names if "optimizer" in config]
    return keys + [f"scheduler.params.{name}" for name in SCHEDULER_PARAMS.get(scheduler, ())]


def get_setting(config: Mapping[str, Any], name: str) -> Any:
    """Return the value at a dotted name; None if there is none."""
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def get_offload_device(config: Mapping[str, Any], section: str) -> str:
    """Return the place of optimizer state (`offload_optimizer`) or parameters (`offload_param`): cpu, nvme or none."""
    return str(get_setting(config, f"zero_optimization.{section}.device") or "none")


def get_optimizer_name(config: Mapping[str, Any], optim: str) -> str:
    """Return the configuration's own optimizer, or else that of the flags, by the name that each has for it."""
    return str(get_setting(config, "optimizer.type") or optim)


def describe_state_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide how the optimizer's state is laid out in a checkpoint, but for defaults."""
    return {
        name: value
        for section, defaults in LAYOUT.items()
        for name, value in config.get(section, {}).items()
        if name in defaults and value != defaults[name]
    }
