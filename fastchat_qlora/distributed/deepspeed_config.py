"""A DeepSpeed configuration beside a command line: what it leaves out follows the flags, a contradiction is an error.

transformers fills in what a configuration calls "auto" and notes what differs from the flags, but tells of it only
after the weights are loaded, and leaves what the configuration does not mention to DeepSpeed's own defaults: a clipping
of 1.0 whatever `--max_grad_norm` says.
"""

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

AUTO_KEYS = (
    "gradient_clipping",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "bf16.enabled",
    "fp16.enabled",
)
"""Settings that follow the command line unless the configuration names them."""

DATA_DEPENDENT_KEYS = ("total_num_steps", "warmup_num_steps")
"""Parameters of a scheduler that follow from the data."""

STEPPED_BY_CPU_ADAM = ("adamw_torch", "adamw_torch_fused")
"""Optimizers whose mathematics DeepSpeed's CPU Adam has; accelerate puts it in their place when they are offloaded."""

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
"""Settings by which DeepSpeed orders and keeps what it flattens, and their defaults.

Read with others, values would go to other parameters.
"""

SCHEDULERS = {
    "WarmupLR": "constant_with_warmup",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
"""DeepSpeed's name -> transformers' for the same curve."""


def fill_auto_settings(config: Mapping[str, Any], optim: str) -> dict[str, Any]:
    """The configuration with everything that should follow the command line marked "auto".

    Args:
        config: as read from the user's file, for which `deepspeed_checks.find_malformed` finds nothing.
        optim: the optimizer of the command line, by its transformers name.
    """
    completed: dict[str, Any] = copy.deepcopy(dict(config))
    names = [*AUTO_KEYS]
    if "optimizer" in completed:
        is_adam = str(completed["optimizer"].get("type")).lower() in ADAM_NAMES
        names += [f"optimizer.params.{key}" for key in ("lr", "weight_decay", *(("betas", "eps") if is_adam else ()))]
    scheduler = completed.get("scheduler", {}).get("type")
    if scheduler in SCHEDULERS:
        has_end = scheduler != "WarmupLR"
        names += [f"scheduler.params.{key}" for key in DATA_DEPENDENT_KEYS if has_end or key != "total_num_steps"]
        names += ["scheduler.params.warmup_max_lr"] * (scheduler != "WarmupCosineLR")
    for name in names:
        *sections, key = name.split(".")
        place = completed
        for section in sections:
            place = place.setdefault(section, {})
        place.setdefault(key, "auto")
    if "optimizer" not in completed and optim not in STEPPED_BY_CPU_ADAM:
        # accelerate would put DeepSpeed's CPU Adam in place of whatever optimizer was asked for.
        completed.setdefault("zero_force_ds_cpu_optimizer", False)
    return completed


def get_offload_device(config: Mapping[str, Any], what: str) -> str:
    """Where the optimizer's state (`offload_optimizer`) or the parameters (`offload_param`) lie: cpu, nvme or none."""
    return str((config.get("zero_optimization", {}).get(what) or {}).get("device", "none"))


def get_optimizer_name(config: Mapping[str, Any], optim: str) -> str:
    """The configuration's own optimizer, or else that of the command line, by the name that each has for it."""
    return str(config.get("optimizer", {}).get("type") or optim)


def describe_state_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide how the optimizer's state is laid out in a checkpoint, but for defaults."""
    return {
        name: value
        for section, defaults in LAYOUT.items()
        for name, value in config.get(section, {}).items()
        if name in defaults and value != defaults[name]
    }


def find_deepspeed_contradictions(
    config: Mapping[str, Any], mismatches: Collection[str], flags: Mapping[str, Any]
) -> list[str]:
    """What the configuration says against the command line, each naming both sides.

    Args:
        config: as read from the user's file, or completed.
        mismatches: what transformers has noted (`HfTrainerDeepSpeedConfig.mismatches`), as "- ds KEY=VALUE vs hf
            FLAG=VALUE".
        flags: `optim` and `lr_scheduler_type`, of those that the user has given.
    """
    problems = []
    for mismatch in mismatches:
        found = re.fullmatch(r"- ds (\S+?)=(.*) vs hf (.+?)=(.*)", mismatch)
        if found is None:
            problems.append(mismatch)
            continue
        key, theirs, flag, ours = found.groups()
        problems.append(f"its {key} is {theirs}, --{flag.split('|')[0].replace('+', ', --')} is {ours}")
    optimizer = config.get("optimizer", {}).get("type")
    is_adamw = str(optimizer).lower() in ADAM_NAMES and config["optimizer"].get("params", {}).get("adam_w_mode", True)
    if optimizer and "optim" in flags and not (is_adamw and flags["optim"] in STEPPED_BY_CPU_ADAM):
        problems.append(f"its optimizer.type is {optimizer}, --optim is {flags['optim']}")
    if config.get("zero_force_ds_cpu_optimizer") and get_offload_device(config, "offload_optimizer") != "none":
        optim = flags.get("optim", "adamw_torch")
        if not optimizer and optim not in STEPPED_BY_CPU_ADAM:
            problems.append(f"its zero_force_ds_cpu_optimizer is true, which means Adam, --optim is {optim}")
    scheduler = config.get("scheduler", {}).get("type")
    if scheduler and "lr_scheduler_type" in flags and SCHEDULERS.get(scheduler) != flags["lr_scheduler_type"]:
        problems.append(f"its scheduler.type is {scheduler}, --lr_scheduler_type is {flags['lr_scheduler_type']}")
    return problems
