"""A DeepSpeed configuration beside a command line: what it leaves out follows the flags, a contradiction is an error.

transformers fills in what a configuration calls "auto" and notes what differs from the flags, but tells of it only
after the weights are loaded, and leaves what the configuration does not mention to DeepSpeed's own defaults: a clipping
of 1.0 whatever `--max_grad_norm` says.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fastchat_qlora.text import did_you_mean

FOLLOWING = (
    "gradient_clipping",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "bf16.enabled",
    "fp16.enabled",
)
"""Settings that follow the command line unless the configuration names them."""

SECTIONS = (
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "bf16",
    "fp16",
    "optimizer",
    "optimizer.params",
    "scheduler",
    "scheduler.params",
)
"""Settings that hold others and that this program looks into."""

NUMBERS = ("gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

LEFT_TO_DEEPSPEED = (
    *("aio", "checkpoint", "comms_logger", "communication_data_type", "csv_monitor", "comet", "data_types"),
    *("disable_allgather", "dump_state", "flops_profiler", "gradient_predivide_factor", "log_level"),
    *("memory_breakdown", "prescale_gradients", "steps_per_print", "tensorboard", "timers", "wall_clock_breakdown"),
    *("wandb", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
)
"""Settings that change how DeepSpeed works and not what is trained."""

DONE_ELSEWHERE = {
    "activation_checkpointing": "give --gradient_checkpointing True",
    "amp": "give --bf16 True or --fp16 True",
    "autotuning": "run DeepSpeed's tuner on its own",
    "bfloat16": "it is called bf16",
    "compile": "give --torch_compile True",
    "dataloader_drop_last": "give --dataloader_drop_last True",
    "elasticity": "the batch follows the flags",
    "gradient_allreduce_op": "gradients are averaged, else the step depends on the number of processes",
    "tensor_parallel": "choose a ZeRO stage; the layers of a PEFT model are not split",
    "torch_autocast": "give --bf16 True or --fp16 True",
}
"""Settings that would be done twice, or not at all, and what to do about it."""

COUNTED = ("total_num_steps", "warmup_num_steps")
"""Parameters of a scheduler that follow from the data."""

STEPPED_BY_CPU_ADAM = ("adamw_torch", "adamw_torch_fused")
"""Optimizers whose mathematics DeepSpeed's CPU Adam has; accelerate puts it in their place when they are offloaded."""

ADAM = ("adam", "adamw")

SCHEDULERS = {
    "WarmupLR": "constant_with_warmup",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
"""DeepSpeed's name -> transformers' for the same curve."""


def find_malformed(config: Mapping[str, Any]) -> list[str]:
    """What is no setting, or no value for one, as far as it can be told without DeepSpeed."""
    known = {name.partition(".")[0] for name in (*SECTIONS, *NUMBERS)} | {*LEFT_TO_DEEPSPEED}
    problems = [
        f"{name} is not for here: {DONE_ELSEWHERE[name]}; drop it"
        if name in DONE_ELSEWHERE
        else f"{name} is unknown; {did_you_mean(name, known)}"
        for name in config
        if name not in known
    ]
    problems += [
        f"{name} must be an object, not {value!r}"
        for name in SECTIONS
        for value in _values(config, name)
        if not isinstance(value, dict)
    ]
    problems += [
        f"{name} must be a number, not {value!r}; leave it out, and it follows the flags"
        for name in NUMBERS
        for value in _values(config, name)
        if value != "auto" and type(value) not in (int, float)
    ]
    if problems:
        return problems
    stage = config.get("zero_optimization", {}).get("stage")
    if type(stage) is not int or not 1 <= stage <= 3:
        # Stage 0 is no ZeRO: in bf16 its first step is a wrong one, and what is saved is rounded (DeepSpeed 0.19.8).
        found = f", not {stage!r}" if stage is not None else ""
        problems.append(f"zero_optimization.stage must be 1, 2 or 3{found}; without --deepspeed the strategy is DDP")
    elif stage < 3 and _offloads(config, "offload_param"):
        problems.append(f"zero_optimization.offload_param means something at stage 3 only, not at {stage}; drop it")
    for name in ("optimizer", "scheduler"):
        if name in config and not isinstance(config[name].get("type"), str):
            problems.append(f"{name}.type must be a name, not {config[name].get('type')!r}")
    scheduled = config.get("scheduler", {}).get("params", {})
    problems += [
        f"scheduler.params.{name} is {scheduled[name]!r}, which follows from the data; leave it out"
        for name in COUNTED
        if scheduled.get(name, "auto") != "auto"
    ]
    return problems


def _values(config: Mapping[str, Any], name: str) -> Iterator[Any]:
    """The value at a dotted name, if the configuration has one."""
    *sections, key = name.split(".")
    place: Any = config
    for section in sections:
        place = place.get(section) if isinstance(place, dict) else None
    if isinstance(place, dict) and key in place:
        yield place[key]


def find_refused(config: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed itself would not take; it would tell only after the weights are loaded.

    Args:
        config: completed, with what follows the flags filled in.
    """
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    filled = _without_auto(config)
    filled.pop("train_batch_size", None)  # multiplied by processes that DeepSpeed does not know of yet
    problems = []
    try:
        DeepSpeedConfig(filled)
    except ValidationError as error:
        zero = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
        for found in error.errors():
            name = ".".join(map(str, found["loc"]))
            unknown = found["type"] == "extra_forbidden"
            reason = f"is unknown; {did_you_mean(name, zero)}" if unknown else f"is {found['input']!r}: {found['msg']}"
            problems.append(f"{name} {reason}" if name else found["msg"])
    except Exception as error:  # it checks by assertions, conversions and look-ups
        problems.append(f"DeepSpeed does not take it: {' '.join(str(error).split()) or type(error).__name__}")
    optimizer = config.get("optimizer", {}).get("type", ADAM[0])
    if optimizer.lower() not in DEEPSPEED_OPTIMIZERS and not config.get("zero_allow_untested_optimizer"):
        problems.append(
            f"optimizer.type {optimizer} is none of {', '.join(DEEPSPEED_OPTIMIZERS)}; give --optim in its place, or "
            "add zero_allow_untested_optimizer"
        )
    return problems


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value != "auto"
    }


def complete(config: Mapping[str, Any], optim: str) -> dict[str, Any]:
    """The configuration with everything that should follow the command line marked "auto".

    Args:
        config: as read from the user's file, for which `find_malformed` finds nothing.
        optim: the optimizer of the command line, by its transformers name.
    """
    completed: dict[str, Any] = copy.deepcopy(dict(config))
    names = [*FOLLOWING]
    if "optimizer" in completed:
        is_adam = str(completed["optimizer"].get("type")).lower() in ADAM
        names += [f"optimizer.params.{key}" for key in ("lr", "weight_decay", *(("betas", "eps") if is_adam else ()))]
    scheduler = completed.get("scheduler", {}).get("type")
    if scheduler in SCHEDULERS:
        has_end = scheduler != "WarmupLR"
        names += [f"scheduler.params.{key}" for key in COUNTED if has_end or key != "total_num_steps"]
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


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer's state lies outside the device."""
    return _offloads(config, "offload_optimizer")


def _offloads(config: Mapping[str, Any], what: str) -> bool:
    return bool(config.get("zero_optimization", {}).get(what, {}).get("device", "none") != "none")


def find_contradictions(config: Mapping[str, Any], mismatches: Collection[str], flags: Mapping[str, Any]) -> list[str]:
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
        problems.append(f"its {key} is {theirs}, --{flag.split('|')[0]} is {ours}")
    optimizer = config.get("optimizer", {}).get("type")
    if optimizer and "optim" in flags and not (optimizer.lower() in ADAM and "adamw" in flags["optim"]):
        problems.append(f"its optimizer.type is {optimizer}, --optim is {flags['optim']}")
    if config.get("zero_force_ds_cpu_optimizer") and offloads_optimizer(config):
        optim = flags.get("optim", "adamw_torch")
        if not optimizer and optim not in STEPPED_BY_CPU_ADAM:
            problems.append(f"its zero_force_ds_cpu_optimizer is true, which means Adam, --optim is {optim}")
    scheduler = config.get("scheduler", {}).get("type")
    if scheduler and "lr_scheduler_type" in flags and SCHEDULERS.get(scheduler) != flags["lr_scheduler_type"]:
        problems.append(f"its scheduler.type is {scheduler}, --lr_scheduler_type is {flags['lr_scheduler_type']}")
    return problems
