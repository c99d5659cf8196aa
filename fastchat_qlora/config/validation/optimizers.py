"""Optimizers by their names in transformers: what they need, take and do not work with, and checks of their flags.

docs/optimizers.md is written from the table, and tests compare it with the packages. No package is imported here.
"""

import argparse
import importlib.util
import math
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from fastchat_qlora.config.validation.json_flags import parse_object
from fastchat_qlora.distributed.deepspeed_config import STEPPED_BY_CPU_ADAM, get_offload_device
from fastchat_qlora.distributed.fsdp_config import FSDP_OPTIMIZERS
from fastchat_qlora.errors import UserError, raise_errors

OptimizerSetting = bool | int | float | str

ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
"""Flags that some optimizers have no use for, with transformers' defaults; all use the rate and the weight decay."""

ADAM, BETAS = tuple(ADAM_DEFAULTS), ("adam_beta1", "adam_beta2")

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

FLATTENED = "needs the shapes that ZeRO flattens"
NOT_AVERAGED = "averages weights, and ZeRO would evaluate and save those before the average"

PICKLED = (
    "its checkpoints hold objects that could run code, so that no run may resume from them, and it projects gradients "
    "to a low rank, which those of an adapter have already"
)
IN_BACKWARD = (
    "it steps within the backward pass, where gradients are neither accumulated, clipped nor checked, and its state is "
    "in no checkpoint"
)
NOT_LOADED = "it keeps its moments where a checkpoint cannot restore them, so that a resumed run is another run"


class OptimizerEntry(NamedTuple):
    """Needs, settings and limits of an optimizer."""

    flags: tuple[str, ...] = ADAM  # of ADAM_DEFAULTS that have an effect
    settings: Mapping[str, type[OptimizerSetting]] = MappingProxyType(
        {}
    )  # names in --optim_args and types of their values
    module: str = ""  # that has to be installed
    package: str = ""  # that has the module
    refusal: str = ""  # why no run may use it
    zero_refusal: str = ""  # why no run may use it with ZeRO
    is_schedule_free: bool = False
    counts_warmup: bool = False  # by --warmup_steps, whatever the schedule does


SIZE: dict[str, type[OptimizerSetting]] = {"min_8bit_size": int}
MIX: dict[str, type[OptimizerSetting]] = {
    **dict.fromkeys(("alpha", "beta1", "beta2", "beta3", "eps"), float),
    **dict.fromkeys(("t_alpha", "t_beta3"), int),
}
BNB_RMSPROP: dict[str, type[OptimizerSetting]] = dict.fromkeys(("alpha", "eps"), float)
AVERAGE: dict[str, type[OptimizerSetting]] = dict.fromkeys(("r", "weight_lr_power"), float)

ADAMW = OptimizerEntry(settings={"amsgrad": bool})
ADAMW_8BIT, ADAMW_32BIT = OptimizerEntry(settings=SIZE), OptimizerEntry()
LION_8BIT, LION_32BIT = OptimizerEntry(BETAS, SIZE), OptimizerEntry(BETAS)
ADEMAMIX_8BIT, ADEMAMIX_32BIT = OptimizerEntry(settings=MIX | SIZE), OptimizerEntry(settings=MIX)
TORCHAO = OptimizerEntry(settings={"block_size": int}, module="torchao", package="torchao")
SCHEDULE_FREE = OptimizerEntry(
    settings=AVERAGE,
    module="schedulefree",
    package="schedulefree",
    zero_refusal=NOT_AVERAGED,
    is_schedule_free=True,
)
GALORE = APOLLO = OptimizerEntry(refusal=PICKLED)
STEPS_IN_BACKWARD = OptimizerEntry(refusal=IN_BACKWARD)

OPTIMIZER_TABLE = {
    "adamw_torch": ADAMW,
    "adamw_torch_fused": ADAMW,
    "adamw_torch_xla": OptimizerEntry(module="torch_xla", package="torch_xla, on a TPU"),
    "adamw_torch_npu_fused": OptimizerEntry(module="torch_npu", package="torch_npu, on an Ascend NPU"),
    "adafactor": OptimizerEntry(
        (),
        {**dict.fromkeys(("beta1", "clip_threshold", "decay_rate"), float), "scale_parameter": bool},
        zero_refusal=FLATTENED,
    ),
    "adamw_anyprecision": OptimizerEntry(
        settings={"use_kahan_summation": bool},
        module="torchdistx",
        package="torchdistx, from its sources on GitHub",
    ),
    "adamw_torch_4bit": TORCHAO,
    "adamw_torch_8bit": TORCHAO,
    "ademamix": ADEMAMIX_32BIT,
    "sgd": OptimizerEntry((), {"momentum": float, "dampening": float, "nesterov": bool}),
    "adagrad": OptimizerEntry((), dict.fromkeys(("lr_decay", "eps", "initial_accumulator_value"), float)),
    "adamw_bnb_8bit": ADAMW_8BIT,
    "adamw_8bit": ADAMW_8BIT,
    "ademamix_8bit": ADEMAMIX_8BIT,
    "lion_8bit": LION_8BIT,
    "lion_32bit": LION_32BIT,
    "paged_adamw_32bit": ADAMW_32BIT,
    "paged_adamw_8bit": ADAMW_8BIT,
    "paged_ademamix_32bit": ADEMAMIX_32BIT,
    "paged_ademamix_8bit": ADEMAMIX_8BIT,
    "paged_lion_32bit": LION_32BIT,
    "paged_lion_8bit": LION_8BIT,
    "rmsprop": OptimizerEntry((), {**dict.fromkeys(("alpha", "eps", "momentum"), float), "centered": bool}),
    "rmsprop_bnb": OptimizerEntry((), BNB_RMSPROP),
    "rmsprop_bnb_8bit": OptimizerEntry((), BNB_RMSPROP | SIZE),
    "rmsprop_bnb_32bit": OptimizerEntry((), BNB_RMSPROP),
    "galore_adamw": GALORE,
    "galore_adamw_8bit": GALORE,
    "galore_adafactor": GALORE,
    "galore_adamw_layerwise": STEPS_IN_BACKWARD,
    "galore_adamw_8bit_layerwise": STEPS_IN_BACKWARD,
    "galore_adafactor_layerwise": STEPS_IN_BACKWARD,
    "lomo": STEPS_IN_BACKWARD,
    "adalomo": STEPS_IN_BACKWARD,
    "grokadamw": OptimizerEntry(refusal=NOT_LOADED),
    "schedule_free_radam": SCHEDULE_FREE._replace(settings=AVERAGE | {"silent_sgd_phase": bool}),
    "schedule_free_adamw": SCHEDULE_FREE._replace(counts_warmup=True),
    "schedule_free_sgd": SCHEDULE_FREE._replace(flags=(), settings=AVERAGE | {"momentum": float}, counts_warmup=True),
    "apollo_adamw": APOLLO,
    "apollo_adamw_layerwise": STEPS_IN_BACKWARD,
    "stable_adamw": OptimizerEntry(
        settings={"decouple_lr": bool, "max_lr": float},
        module="optimi",
        package="torch-optimi",
        zero_refusal=FLATTENED,
    ),
}
"""transformers' names, in its order."""


def check_optimizer(values: argparse.Namespace) -> Iterator[str]:
    """Yield errors about the optimizer's flags, but for those of strategies."""
    optim, deepspeed = values.optim, parse_object(values.deepspeed)
    if values.optim_target_modules is not None:
        names = " ".join(values.optim_target_modules)
        yield f"--optim_target_modules {names}: has an effect on GaLore and APOLLO only, which no run may use; drop it"
    if (entry := OPTIMIZER_TABLE.get(optim)) is None:
        yield f"--optim {optim}: must be one of {', '.join(list_usable())}"
        return
    if entry.refusal:
        yield f"--optim {optim}: is not supported: {entry.refusal}; choose another, such as adamw_torch"
        return
    if entry.module and importlib.util.find_spec(entry.module) is None:
        install = f"install {entry.package}" if " " in entry.package else f"pip install {entry.package}"
        yield f"--optim {optim}: the package {entry.module} is not installed; {install}, or choose adamw_torch"
    if entry.counts_warmup and 0 < values.warmup_steps < 1:
        # transformers 5.23 passes the share on as a number of steps, so that the first rate is multiplied.
        yield f"--warmup_steps {values.warmup_steps}: must be a number of steps with --optim {optim}, not a share"
    if not values.optim_args:
        return
    is_replaced = optim in STEPPED_BY_CPU_ADAM and get_offload_device(deepspeed, "offload_optimizer") != "none"
    if deepspeed.get("optimizer") or (is_replaced and deepspeed.get("zero_force_ds_cpu_optimizer") is not False):
        yield f"--optim_args {values.optim_args}: has no effect on DeepSpeed's own optimizer; drop it"
        return
    try:
        parse_optim_args(optim, values.optim_args)
    except UserError as error:
        yield str(error)


def find_strategy_errors(optim: str, *, zero: bool, fsdp: bool) -> Iterator[str]:
    """Yield an error for each strategy of a run with which the optimizer does not work."""
    entry = OPTIMIZER_TABLE.get(optim, ADAMW)
    if entry.refusal:
        return  # reported by itself
    if zero and entry.zero_refusal:
        yield f"--optim {optim}: {entry.zero_refusal}; choose adamw_torch, or no ZeRO"
    if fsdp and optim not in FSDP_OPTIMIZERS:
        yield f"--optim {optim}: is not supported with --fsdp; choose one of {', '.join(FSDP_OPTIMIZERS)}"


def list_usable() -> list[str]:
    """Return the names that are not refused whatever the machine has."""
    return [name for name, entry in OPTIMIZER_TABLE.items() if not entry.refusal]


def parse_optim_args(optim: str, text: str | None) -> dict[str, OptimizerSetting]:
    """Return the settings of `--optim_args`, as in momentum=0.9,nesterov=True.

    Raises:
        UserError: a setting that the optimizer does not have, or a value of another type.
    """
    known = OPTIMIZER_TABLE[optim].settings
    takes = f"it takes {', '.join(known)}" if known else "it takes none, drop them"
    pairs = [pair.partition("=") for pair in (text or "").replace(" ", "").split(",") if text]
    errors, settings = [], {}
    for name, equals, value in pairs:
        if not name or not equals:
            errors.append(f"--optim_args {text}: must be settings as in name=value,name=value")
        elif name not in known:
            problem = f"--optim_args {name}={value}: --optim {optim} has no such setting"
            errors.append(f"{problem}; {takes}{_find_flag(name, OPTIMIZER_TABLE[optim].flags)}")
        elif name in settings:
            errors.append(f"--optim_args {name}: is there twice; drop one")
        elif (found := _convert(value, known[name])) is None:
            kind = {bool: "True or False", int: "a whole number", float: "a number"}[known[name]]
            errors.append(f"--optim_args {name}={value}: must be {kind}; correct it")
        else:
            settings[name] = found
    raise_errors(errors)
    return settings


def _find_flag(name: str, used: Collection[str]) -> str:
    """Return the advice to give the flag that a setting has of its own; empty without one, or if it has no effect."""
    flag = {"lr": "learning_rate", "eps": "adam_epsilon", "beta1": "adam_beta1", "beta2": "adam_beta2"}.get(name, name)
    flags = ("adam_beta1", "adam_beta2") if name == "betas" else (flag,)
    if not {*flags} <= {"learning_rate", "weight_decay", *used}:
        return ""
    return f"; {' and '.join(f'--{flag}' for flag in flags)} may be meant"


def _convert(value: str, kind: type[OptimizerSetting]) -> OptimizerSetting | None:
    """Return a value in its type; None if it is of another one."""
    if kind is bool:
        return BOOLEANS.get(value.lower())
    try:
        number = kind(value)
        return number if math.isfinite(float(number)) else None
    except (ValueError, OverflowError):
        return None


def describe_ignored(values: argparse.Namespace, *, on_cpu: bool) -> list[str]:
    """Return warnings about flags of the optimizer without effect, and about a schedule that it does not go with."""
    optim, entry = values.optim, OPTIMIZER_TABLE[values.optim]
    unused = [name for name, default in ADAM_DEFAULTS.items() if getattr(values, name) != default]
    warnings = [
        f"--{name} {getattr(values, name)}: ignored: --optim {optim} has no such setting."
        for name in unused
        if name not in entry.flags
    ]
    if on_cpu and optim.startswith("paged_"):
        warnings.append(f"--optim {optim}: nothing is paged on a CPU, where the state is in main memory anyway.")
    schedule = getattr(values.lr_scheduler_type, "value", values.lr_scheduler_type)
    if entry.is_schedule_free and schedule != "constant":
        warnings.append(
            f"--lr_scheduler_type {schedule}: --optim {optim} takes the place of a schedule, and expects "
            "--lr_scheduler_type constant."
        )
    return warnings


def count_silent_steps(optim: str, optim_args: str | None, beta2: float) -> float:
    """Return the number of first steps that have a rate of 0: those before RAdam trusts its second moment.

    Its variance is defined from where the length of the average, `rho`, exceeds 4; it does in no step up to a beta2 of
    0.6.
    """
    if optim != "schedule_free_radam" or parse_optim_args(optim, optim_args).get("silent_sgd_phase") is False:
        return 0
    longest = 2 / (1 - beta2) - 1
    if longest <= 4:
        return math.inf
    step = 1
    while longest - 2 * step * beta2**step / (1 - beta2**step) <= 4:
        step += 1
    return step - 1
