"""A DeepSpeed configuration by itself: what is no setting, no value for one, or has no effect here, is an error.

DeepSpeed passes over most names that it does not know, and looks at values when the weights have been loaded.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from fastchat_qlora.distributed.deepspeed_config import ADAM_NAMES, DATA_DEPENDENT_KEYS, get_offload_device
from fastchat_qlora.utils.text import did_you_mean, one_line

OPTIONAL = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
"""Sections that may be null."""

OBJECTS = (
    *("zero_optimization", "bf16", "fp16", "optimizer", "optimizer.params", "scheduler", "scheduler.params"),
    *("aio", "comms_logger", "csv_monitor", "comet", "data_types", "flops_profiler", "tensorboard", "timers", "wandb"),
    *OPTIONAL,
)

NUMBERS = (
    *("gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    "steps_per_print",
)

SWITCHES = (
    *("disable_allgather", "disable_python_gc", "dump_state", "memory_breakdown", "wall_clock_breakdown"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
)

WORDS = ("communication_data_type", "log_level")

KNOWN = {name for name in (*OBJECTS, *NUMBERS, *SWITCHES, *WORDS) if "." not in name}

ELSEWHERE = {
    "activation_checkpointing": "give --gradient_checkpointing True",
    "amp": "give --bf16 True or --fp16 True",
    "autotuning": "run DeepSpeed's tuner on its own",
    "bfloat16": "it is called bf16",
    "checkpoint": "a run goes on with the number of processes that it began with",
    "compile": "give --torch_compile True",
    "dataloader_drop_last": "give --dataloader_drop_last True",
    "elasticity": "the batch follows the flags",
    "gradient_allreduce_op": "gradients are averaged, or the step would depend on the number of processes",
    "gradient_predivide_factor": "gradients are averaged",
    "prescale_gradients": "gradients are averaged",
    "tensor_parallel": "choose a ZeRO stage; the layers of a PEFT model are not split",
    "torch_autocast": "give --bf16 True or --fp16 True",
    "zero_optimization.cpu_offload": 'give offload_optimizer {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'give offload_param {"device": "cpu"}',
    "zero_optimization.cpu_offload_params": 'give offload_param {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'give offload_optimizer {"device": "cpu", "pin_memory": true}',
}
"""Settings that would be done twice, or not at all, unless they are switched off; and what to do about it."""

OPTIMIZERS = {
    **dict.fromkeys(ADAM_NAMES, ("lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode")),
    "adagrad": ("lr", "eps", "weight_decay"),
    "lion": ("lr", "betas", "weight_decay"),
}
"""DeepSpeed's optimizers that its ZeRO steps with, and their parameters."""

FILLED_LATER = (
    *("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),  # from the width
    "stage3_gather_16bit_weights_on_model_save",
    *DATA_DEPENDENT_KEYS,
)


def find_malformed(config: Mapping[str, Any]) -> list[str]:
    """What is no setting, or no value for one, as far as it can be told without DeepSpeed."""
    known = KNOWN | {name for name in ELSEWHERE if "." not in name}
    problems = [f"{name} is unknown; {did_you_mean(name, KNOWN)}" for name in config if name not in known]
    problems += [
        f"{name} has no place here ({why}); drop it"
        for name, why in ELSEWHERE.items()
        for value in _values(config, name)
        if value is not False and value != {"enabled": False}
    ]
    mistyped = []
    for names, kinds, kind in (
        (OBJECTS, dict, "an object"),
        (NUMBERS, (int, float), "a number"),
        (SWITCHES, bool, "true or false"),
        (WORDS, str, "a word"),
    ):
        mistyped += [
            f"{name} must be {kind}, not {value!r}; mend it or leave it out"
            for name in names
            for value in _values(config, name)
            if not (_is(value, kinds) or (value == "auto" and name in NUMBERS) or (value is None and name in OPTIONAL))
        ]
    return problems + (mistyped or [*_check_zero(config), *_check_named(config), *_check_data_types(config)])


def _values(config: Mapping[str, Any], name: str) -> Iterator[Any]:
    """The value at a dotted name, if the configuration has one."""
    *sections, key = name.split(".")
    place: Any = config
    for section in sections:
        place = place.get(section) if isinstance(place, dict) else None
    if isinstance(place, dict) and key in place:
        yield place[key]


def _is(value: Any, kinds: Any) -> bool:
    """Whether a value is of a kind; True is no number."""
    return isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))


def _check_zero(config: Mapping[str, Any]) -> Iterator[str]:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage")
    if not _is(stage, int) or not 1 <= stage <= 3:
        # Stage 0 is no ZeRO: in bf16 its first step is a wrong one, and what is saved is rounded (DeepSpeed 0.19.8).
        found = f", not {stage!r}" if stage is not None else ""
        yield f"zero_optimization.stage must be 1, 2 or 3{found}; without --deepspeed the strategy is DDP"
    elif stage < 3 and get_offload_device(config, "offload_param") != "none":
        yield f"zero_optimization.offload_param means something at stage 3 only, not at {stage}; drop it"
    elif stage < 3 and get_offload_device(config, "offload_optimizer") == "nvme":
        yield f"zero_optimization.offload_optimizer.device nvme needs stage 3, not {stage}; choose cpu"
    if zero.get("compute_grad_norm") is False:
        yield "zero_optimization.compute_grad_norm is false, and the norm is what clipping and the log need; drop it"
    for name in ("offload_optimizer", "offload_param"):
        device = get_offload_device(config, name)
        if device not in ("cpu", "nvme", "none"):
            yield f"zero_optimization.{name}.device must be cpu, nvme or none, not {device}"
        elif device == "nvme" and not zero[name].get("nvme_path"):
            yield f"zero_optimization.{name}.device is nvme; add its nvme_path"


def _check_named(config: Mapping[str, Any]) -> Iterator[str]:
    """The optimizer and the scheduler: a type and its parameters, nothing else."""
    for section in ("optimizer", "scheduler"):
        if section not in config:
            continue
        for name in config[section]:
            if name not in ("type", "params"):
                yield f"{section}.{name} is unknown; it may belong into {section}.params"
        if not isinstance(config[section].get("type"), str):
            yield f"{section}.type must be a name, not {config[section].get('type')!r}"
    optimizer = config.get("optimizer", {})
    name = str(optimizer.get("type", ADAM_NAMES[0])).lower()
    if name not in OPTIMIZERS and isinstance(optimizer["type"], str):
        yield f"optimizer.type {optimizer['type']} must be one of {', '.join(OPTIMIZERS)}; or drop it and give --optim"
    for key in optimizer.get("params", {}):
        if key not in OPTIMIZERS.get(name, (key,)):
            yield f"optimizer.params.{key} is unknown; {did_you_mean(key, OPTIMIZERS[name])}"
    for key in DATA_DEPENDENT_KEYS:
        value = config.get("scheduler", {}).get("params", {}).get(key, "auto")
        if value != "auto":
            yield f"scheduler.params.{key} is {value!r}, which follows from the data; leave it out"


def _check_data_types(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.get("data_types", {}).items():
        if key != "grad_accum_dtype" or value not in ("fp32", "fp16", "bf16"):
            yield f"data_types.{key} is {value!r}; all there is is grad_accum_dtype: fp32, fp16 or bf16"


def find_refused(config: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed itself would not take.

    Args:
        config: for which `find_malformed` finds nothing, completed, with what follows the flags filled in.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    problems = [f"{name} is auto, which nothing fills in; give a value" for name in _left_open(config)]
    filled = _without_auto(config)
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for section, model in models.items():
        problems += _validate(section, model, filled.get(section, {}))
    problems += _check_scheduler(config.get("scheduler", {}))
    if problems:
        return problems
    filled.pop("train_batch_size", None)  # multiplied by processes that DeepSpeed does not know of yet
    try:
        DeepSpeedConfig(filled)
    except Exception as error:  # it checks by assertions, conversions and look-ups
        problems.append(f"DeepSpeed does not take it: {one_line(error) or type(error).__name__}")
    return problems


def _left_open(config: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _left_open(value, f"{within}{name}.")
        elif value == "auto" and name not in FILLED_LATER:
            yield f"{within}{name}"


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value != "auto"
    }


def _validate(section: str, model: Any, values: Mapping[str, Any]) -> Iterator[str]:
    """What the pydantic model of a section says of its values, by their names in the configuration."""
    from pydantic import ValidationError

    try:
        model(**values)
    except ValidationError as error:
        names = [field.alias or name for name, field in model.model_fields.items()]
        for found in error.errors():
            path = ".".join([section, *map(str, found["loc"])])
            if not found["loc"]:
                yield f"{section}: {found['msg']}"
            elif found["type"] != "extra_forbidden":
                yield f"{path} is {found['input']!r}: {found['msg']}"
            else:
                nested = len(found["loc"]) > 1
                yield f"{path} is unknown; {'drop it' if nested else did_you_mean(str(found['loc'][0]), names)}"
    except (AssertionError, TypeError, ValueError) as error:
        yield f"{section}: {error}"


def _check_scheduler(scheduler: Mapping[str, Any]) -> Iterator[str]:
    from deepspeed.runtime import lr_schedules

    if not scheduler:
        return
    known = lr_schedules.VALID_LR_SCHEDULES
    if scheduler["type"] not in known:
        yield f"scheduler.type {scheduler['type']} must be one of {', '.join(known)}; or give --lr_scheduler_type"
        return
    names = inspect.signature(getattr(lr_schedules, scheduler["type"])).parameters.keys() - {"optimizer"}
    for name in scheduler.get("params", {}):
        if name not in names:
            yield f"scheduler.params.{name} is unknown; {did_you_mean(name, names)}"
