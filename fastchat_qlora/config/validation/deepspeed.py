"""Checks of a DeepSpeed configuration: unknown, unsupported and contradictory settings, and DeepSpeed's own checks.

DeepSpeed ignores most names that it does not know, and checks values only after the weights are loaded.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fastchat_qlora.config.validation.json_schema import BOOL, NUMBER, OBJECT, WORD, Kind, find_invalid
from fastchat_qlora.distributed.deepspeed_config import (
    ADAM_NAMES,
    DATA_DEPENDENT_KEYS,
    SCHEDULERS,
    STEPPED_BY_CPU_ADAM,
    get_offload_device,
    get_setting,
)
from fastchat_qlora.utils.text import did_you_mean, one_line

AUTO_NUMBER = Kind(NUMBER.text, lambda value: value == "auto" or NUMBER.accepts(value))
OPTIONAL_OBJECT = Kind(OBJECT.text, lambda value: value is None or OBJECT.accepts(value))

DEEPSPEED_SETTINGS = {
    **dict.fromkeys(("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "data_types", "aio"), OBJECT),
    **dict.fromkeys(("comms_logger", "csv_monitor", "comet", "flops_profiler", "tensorboard", "timers"), OBJECT),
    "wandb": OBJECT,
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), AUTO_NUMBER),
    **dict.fromkeys(("gradient_clipping", "steps_per_print"), AUTO_NUMBER),
    **dict.fromkeys(("disable_allgather", "disable_python_gc", "dump_state", "memory_breakdown"), BOOL),
    **dict.fromkeys(("wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), BOOL),
    **dict.fromkeys(("communication_data_type", "log_level"), WORD),
}
UNSUPPORTED_DEEPSPEED = {
    "activation_checkpointing": "give --gradient_checkpointing True",
    **dict.fromkeys(("amp", "torch_autocast"), "give --bf16 True or --fp16 True"),
    "autotuning": "run DeepSpeed's tuner separately",
    "bfloat16": "it is called bf16",
    "checkpoint": "a run resumes with the number of processes that it started with",
    "compile": "give --torch_compile True",
    "dataloader_drop_last": "give --dataloader_drop_last True",
    "elasticity": "the flags set the batch size",
    "gradient_allreduce_op": "gradients are averaged, or the step would depend on the number of processes",
    **dict.fromkeys(("gradient_predivide_factor", "prescale_gradients"), "gradients are averaged"),
    "tensor_parallel": "choose a ZeRO stage; the layers of a PEFT model are not split",
}
"""Settings that would be applied twice, or not at all, unless they are off -> what to do."""

ZERO_SETTINGS = dict.fromkeys(("offload_optimizer", "offload_param"), OPTIONAL_OBJECT)
UNSUPPORTED_ZERO = {
    "cpu_offload": 'give offload_optimizer {"device": "cpu"}',
    **dict.fromkeys(("cpu_offload_param", "cpu_offload_params"), 'give offload_param {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": 'give offload_optimizer {"device": "cpu", "pin_memory": true}',
}

OPTIMIZERS = {
    **dict.fromkeys(ADAM_NAMES, ("lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode")),
    "adagrad": ("lr", "eps", "weight_decay"),
    "lion": ("lr", "betas", "weight_decay"),
}
"""DeepSpeed's optimizers that ZeRO steps with -> their parameters."""

FILLED_LATER = (
    *("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),  # from the width
    *("stage3_gather_16bit_weights_on_model_save", *DATA_DEPENDENT_KEYS),
)
"""Settings that may be "auto" until the model and the data are known."""


def find_malformed_config(config: Mapping[str, Any]) -> list[str]:
    """Return errors that can be found without DeepSpeed."""
    active = {name: value for name, value in config.items() if not _is_off(name, value)}
    if errors := [*find_invalid(active, DEEPSPEED_SETTINGS, UNSUPPORTED_DEEPSPEED)]:
        return errors
    data_types = [
        f"data_types.{key} is {value!r}; only grad_accum_dtype is supported: fp32, fp16 or bf16"
        for key, value in config.get("data_types", {}).items()
        if key != "grad_accum_dtype" or value not in ("fp32", "fp16", "bf16")
    ]
    return [*_check_zero(config), *_check_named_sections(config), *data_types]


def _is_off(name: str, value: Any) -> bool:
    """Return whether a setting that this program does not support is switched off."""
    return name in UNSUPPORTED_DEEPSPEED | UNSUPPORTED_ZERO and (value is False or value == {"enabled": False})


def _check_zero(config: Mapping[str, Any]) -> Iterator[str]:
    zero = config.get("zero_optimization", {})
    names = [name for name in (*ZERO_SETTINGS, *UNSUPPORTED_ZERO) if name in zero and not _is_off(name, zero[name])]
    errors = [*find_invalid({name: zero[name] for name in names}, ZERO_SETTINGS, UNSUPPORTED_ZERO)]
    yield from (f"zero_optimization.{error}" for error in errors or _check_stage(config, zero))


def _check_stage(config: Mapping[str, Any], zero: Mapping[str, Any]) -> Iterator[str]:
    """Yield errors about the stage and what is offloaded."""
    stage, devices = zero.get("stage"), {name: get_offload_device(config, name) for name in ZERO_SETTINGS}
    if type(stage) is not int or not 1 <= stage <= 3:
        # Stage 0 is no ZeRO: in bf16 its first step is wrong, and what is saved is rounded (DeepSpeed 0.19.8).
        found = f", not {stage!r}" if stage is not None else ""
        yield f"stage must be 1, 2 or 3{found}; without --deepspeed the strategy is DDP"
    elif stage < 3 and devices["offload_param"] != "none":
        yield f"offload_param is supported at stage 3 only, not at {stage}; drop it"
    elif stage < 3 and devices["offload_optimizer"] == "nvme":
        yield f"offload_optimizer.device nvme needs stage 3, not {stage}; choose cpu"
    if zero.get("compute_grad_norm") is False:
        yield "compute_grad_norm is false, but clipping and the log need the norm; drop it"
    for name, device in devices.items():
        if device not in ("cpu", "nvme", "none"):
            yield f"{name}.device must be cpu, nvme or none, not {device}"
        elif device == "nvme" and not zero[name].get("nvme_path"):
            yield f"{name}.device is nvme; add its nvme_path"


def _check_named_sections(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield errors about the optimizer and the scheduler, each of which has a type and may have params."""
    for section in ("optimizer", "scheduler"):
        settings = config.get(section, {"type": "", "params": {}})
        name, params = settings.get("type"), settings.get("params", {})
        for key in settings.keys() - {"type", "params"}:
            yield f"{section}.{key} is unknown; it may belong in {section}.params"
        if not isinstance(name, str):
            yield f"{section}.type must be a name, not {name!r}"
        elif not isinstance(params, dict):
            yield f"{section}.params must be an object, not {params!r}; change it or leave it out"
        elif section in config:
            errors = _check_optimizer(name, params) if section == "optimizer" else _check_schedule(params)
            yield from (f"{section}.{error}" for error in errors)


def _check_optimizer(name: str, params: Mapping[str, Any]) -> Iterator[str]:
    known = OPTIMIZERS.get(name.lower())
    if known is None:
        yield f"type {name} must be one of {', '.join(OPTIMIZERS)}; or drop it and give --optim"
    for key in params:
        if known and key not in known:
            yield f"params.{key} is unknown; {did_you_mean(key, known)}"


def _check_schedule(params: Mapping[str, Any]) -> Iterator[str]:
    for key in DATA_DEPENDENT_KEYS:
        if params.get(key, "auto") != "auto":
            yield f"params.{key} is {params[key]!r}, but depends on the data; leave it out"


def find_deepspeed_errors(args: Any, given: Collection[str], *, has_processes: bool) -> list[str]:
    """Return contradictions between a configuration and the flags, and errors found by DeepSpeed.

    transformers and DeepSpeed would report them after loading the weights.

    Args:
        args: TrainingArguments, which have filled in what is "auto".
        given: names of the flags on the command line.
        has_processes: the processes of the run are there, so that the total batch size is known.
    """
    config, found = args.hf_deepspeed_config.config, []
    for mismatch in args.hf_deepspeed_config.mismatches:  # the flag is a name, a|b or a+b
        key, theirs, flag, ours = re.findall(r"- ds (\S+?)=(.*) vs hf (.+?)=(.*)|$", mismatch)[0]
        if key != "train_batch_size" or has_processes:
            text = f"its {key} is {theirs}, --{flag.split('|')[0].replace('+', ', --')} is {ours}"
            found.append(text if key else mismatch)
    found += _find_other_optimizer(config, args, given)
    return [f"{text}; make them the same, or leave one out" for text in found] + _find_refused(config)


def _find_other_optimizer(config: Mapping[str, Any], args: Any, given: Collection[str]) -> Iterator[str]:
    """Yield an optimizer and a schedule of the configuration that are not those of the flags given."""
    optim, schedule = (getattr(value, "value", value) for value in (args.optim, args.lr_scheduler_type))
    optimizer, scheduler = get_setting(config, "optimizer.type"), get_setting(config, "scheduler.type")
    is_adam = str(optimizer).lower() in ADAM_NAMES and get_setting(config, "optimizer.params.adam_w_mode") is not False
    if optimizer and "optim" in given and not (is_adam and optim in STEPPED_BY_CPU_ADAM):
        yield f"its optimizer.type is {optimizer}, --optim is {optim}"
    is_forced = config.get("zero_force_ds_cpu_optimizer") and get_offload_device(config, "offload_optimizer") != "none"
    if is_forced and not optimizer and optim not in STEPPED_BY_CPU_ADAM:
        yield f"its zero_force_ds_cpu_optimizer is true, which means Adam, --optim is {optim}"
    if scheduler and "lr_scheduler_type" in given and SCHEDULERS.get(scheduler) != schedule:
        yield f"its scheduler.type is {scheduler}, --lr_scheduler_type is {schedule}"


def _find_refused(config: Mapping[str, Any]) -> list[str]:
    """Return the errors that DeepSpeed's own models find once all is filled in; they take "auto" as missing."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    errors = [f"{name} is auto, which nothing fills in; give a value" for name in _list_auto(config)]
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for section, model in models.items():
        errors += _validate(section, model, config.get(section, {}))
    errors += _validate_scheduler(config.get("scheduler", {}))
    # The batch is that of all processes, which DeepSpeed does not know of yet.
    one_process = {name: value for name, value in config.items() if name != "train_batch_size"}
    return errors or [*_validate("DeepSpeed refuses it", lambda **values: DeepSpeedConfig(values), one_process)]


def _list_auto(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _list_auto(value, f"{path}{name}.")
        elif value == "auto" and name not in FILLED_LATER:
            yield f"{path}{name}"


def _validate(section: str, model: Any, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield errors of a model of DeepSpeed, by the names in the configuration."""
    from pydantic import ValidationError

    try:
        model(**values)
    except ValidationError as error:
        names = [field.alias or name for name, field in getattr(model, "model_fields", {}).items()]
        for found in error.errors():
            *_, name = path = [section, *map(str, found["loc"])]
            is_unknown = found["type"] == "extra_forbidden"
            shown = f" is {found['input']!r}" if len(path) > 1 else ""
            problem = f" is unknown; {did_you_mean(name, names)}" if is_unknown else f"{shown}: {found['msg']}"
            yield f"{'.'.join(path)}{problem}"
    except Exception as error:  # it checks by assertions, conversions and look-ups too
        yield f"{section}: {one_line(error) or type(error).__name__}"


def _validate_scheduler(scheduler: Mapping[str, Any]) -> Iterator[str]:
    from inspect import signature

    from deepspeed.runtime import lr_schedules

    known = lr_schedules.VALID_LR_SCHEDULES
    if scheduler and scheduler["type"] not in known:
        yield f"scheduler.type {scheduler['type']} must be one of {', '.join(known)}; or give --lr_scheduler_type"
    elif scheduler:
        names = signature(getattr(lr_schedules, scheduler["type"])).parameters.keys() - {"optimizer"}
        unknown = [name for name in scheduler.get("params", {}) if name not in names]
        yield from (f"scheduler.params.{name} is unknown; {did_you_mean(name, names)}" for name in unknown)
