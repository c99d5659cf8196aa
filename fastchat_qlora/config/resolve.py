"""Flags that depend on the machine, the launcher or other flags, before the argument groups are built."""

import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

import torch

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.config.flag_parsing import parse_share_prefixes, parse_token_count
from fastchat_qlora.config.validation.flags import Values, is_launched, lacks_accelerator, runs_on_cpu
from fastchat_qlora.config.validation.json_flags import JSON_FLAGS, json_text, parse_json
from fastchat_qlora.config.validation.optimizers import describe_ignored
from fastchat_qlora.distributed.deepspeed_config import fill_auto_settings
from fastchat_qlora.distributed.environment import settle_variables
from fastchat_qlora.distributed.fsdp_config import complete_fsdp_config, parse_fsdp_flag
from fastchat_qlora.utils.text import mask_secrets

PATHS = ("model_name_or_path", "lora_weight_path", "cache_dir", "resume_from_checkpoint", "data_path", "eval_data_path")
"""Flags whose ~ is expanded; hub ids have none."""


NAMED_RUNS = ("wandb", "trackio", "mlflow", "comet_ml", "swanlab", "all")  # values of --report_to that show --run_name


class Ignored(NamedTuple):
    """Flags of transformers without effect here, or without it beside other flags."""

    flags: tuple[str, ...]
    is_ignored: Callable[[Values], object]  # true or false
    why: str


def _has_no_part(*reporters: str) -> Callable[[Values], bool]:
    return lambda values: not {*values.report_to} & {*reporters}


IGNORED = (
    Ignored(
        (
            *("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "label_names"),
            *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
        ),
        lambda values: True,
        "evaluation computes the loss alone, conversation by conversation",
    ),
    Ignored(("use_cache",), lambda values: True, "training uses no cache"),
    Ignored(("remove_unused_columns",), lambda values: True, "no column is unused: losses and order need them"),
    Ignored(("length_column_name",), lambda values: True, "the lengths of the sequences are known"),
    Ignored(("enable_jit_checkpoint",), lambda values: True, "SIGTERM and SIGINT always save a checkpoint"),
    Ignored(
        ("restore_callback_states_from_checkpoint",),
        lambda values: True,
        "a resumed run always restores what it needs",
    ),
    Ignored(("run_name",), _has_no_part(*NAMED_RUNS), "no --report_to shows it"),
    Ignored(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        _has_no_part("trackio", "all"),
        "needs --report_to trackio",
    ),
    Ignored(
        ("hub_model_id", "hub_token", "hub_strategy", "hub_always_push", "hub_revision"),
        lambda values: not values.push_to_hub,
        "needs --push_to_hub True",
    ),
    Ignored(
        ("hub_private_repo",),
        lambda values: not values.push_to_hub and _has_no_part("trackio", "all")(values),
        "needs --push_to_hub True",
    ),
    Ignored(
        ("eval_strategy", "eval_on_start", "do_eval", "eval_steps", "eval_delay", "per_device_eval_batch_size"),
        lambda values: not (values.eval_data_path or values.eval_split),
        "there is nothing to evaluate on; give --eval_data_path or --eval_split",
    ),
    Ignored(
        ("eval_steps", "eval_delay"),
        lambda values: values.eval_strategy == "no",
        "needs --eval_strategy steps or epoch",
    ),
    Ignored(("eval_steps",), lambda values: values.eval_strategy == "epoch", "needs --eval_strategy steps"),
    Ignored(("save_steps",), lambda values: values.save_strategy != "steps", "needs --save_strategy steps"),
    Ignored(
        ("save_total_limit", "save_only_model"),
        lambda values: values.save_strategy == "no",
        "--save_strategy no saves no checkpoints",
    ),
    Ignored(("save_total_limit",), lambda values: values.save_total_limit < 1, "below 1 there is no limit"),
    Ignored(
        ("logging_steps",),
        lambda values: values.logging_strategy != "steps" and (values.eval_strategy != "steps" or values.eval_steps),
        "needs --logging_strategy steps",  # evaluations that have no steps of their own take those of the log
    ),
    Ignored(
        ("metric_for_best_model", "greater_is_better"),
        lambda values: (
            not (values.load_best_model_at_end or values.save_strategy == "best")
            and values.lr_scheduler_type not in ("reduce_lr_on_plateau", "greedy")
        ),
        "needs --load_best_model_at_end True or --save_strategy best",
    ),
    Ignored(
        ("ddp_backend", "ddp_timeout", "average_tokens_across_devices", "log_level_replica"),
        lambda values: not is_launched(values),
        "there is only one process",
    ),
    Ignored(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        lambda values: not is_launched(values) or values.fsdp or values.deepspeed,
        "needs DDP: several processes without --fsdp and --deepspeed",
    ),
    Ignored(
        ("save_on_each_node", "log_on_each_node"),
        lambda values: os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1"),
        "there is only one machine",
    ),
    Ignored(("torch_empty_cache_steps",), lambda values: values.use_cpu, "there is no device to empty a cache of"),
    Ignored(
        ("torch_compile_mode",),
        lambda values: values.torch_compile_backend not in (None, "inductor"),
        "needs --torch_compile_backend inductor",
    ),
    Ignored(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        lambda values: False in (values.activation_checkpointing, values.gradient_checkpointing),
        "nothing is checkpointed",
    ),
    Ignored(
        ("local_rank",), lambda values: "LOCAL_RANK" not in os.environ, "launchers give the rank in the environment"
    ),
)
"""Flags that are ignored with a warning; where two entries hold, the first is logged."""

RESET = (
    *("eval_strategy", "eval_on_start", "do_eval", "eval_use_gather_object", "eval_do_concat_batches"),
    *("eval_accumulation_steps", "use_cache", "length_column_name", "enable_jit_checkpoint", "ddp_backend"),
    *("restore_callback_states_from_checkpoint", "remove_unused_columns"),
)
"""Ignored flags that the libraries would act on nevertheless, so that they get their defaults."""


def resolve_flags(values: Values) -> list[str]:
    """Resolve parsed flags without errors in place, and return warnings about what has changed."""
    warnings = [*_resolve_device(values), *_find_ignored(values), *_resolve_strategy(values)]
    warnings += describe_ignored(values, on_cpu=runs_on_cpu(values))
    if values.greater_is_better and values.eval_strategy != "no":
        warnings.append("--greater_is_better True: the metric is the loss, so that the largest counts as the best.")
    values.include_num_input_tokens_seen = parse_token_count(values.include_num_input_tokens_seen)
    values.share_prefixes = parse_share_prefixes(values.share_prefixes)
    warnings += settle_variables(values)
    if values.deepspeed:
        values.deepspeed = fill_auto_settings(parse_json(values.deepspeed), values.optim)
    for name in JSON_FLAGS:
        if isinstance(given := getattr(values, name, None), str) and given:  # transformers reads files for some only
            setattr(values, name, json_text(given))
    for name in PATHS:
        given = getattr(values, name)
        expanded = [*map(os.path.expanduser, given)] if isinstance(given, list) else given and os.path.expanduser(given)
        setattr(values, name, expanded)
    return warnings


def _resolve_device(values: Values) -> list[str]:
    if lacks_accelerator() and not values.use_cpu:
        values.use_cpu = True
        hidden = ", since CUDA_VISIBLE_DEVICES is empty" if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else ""
        return [f"No accelerator found{hidden}: training on the CPU."]
    count = torch.accelerator.device_count()
    if not values.use_cpu and count > 1 and "WORLD_SIZE" not in os.environ:
        return [f"One process trains on one of {count} accelerators; launch with torchrun or deepspeed to use all."]
    return []


def _find_ignored(values: Values) -> Iterator[str]:
    """Yield a warning for each reason to ignore flags, and set those to their defaults that would do something."""
    defaults, logged = _get_defaults(), set[str]()
    for ignored in IGNORED:
        given = [name for name in ignored.flags if getattr(values, name, defaults.get(name)) != defaults.get(name)]
        new = [name for name in given if name not in logged]
        if new and ignored.is_ignored(values):
            shown = ", ".join(f"--{name} {_show(mask_secrets(getattr(values, name), name))}" for name in new)
            yield f"{shown}: ignored: {ignored.why}."
            logged.update(new)
            for name in {*new} & {*RESET}:
                setattr(values, name, defaults[name])


def _show(value: Any) -> str:
    """Return a value as it is typed."""
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else f"{value}"
    )


def _get_defaults() -> dict[str, Any]:
    """Return the defaults of the flags of TrainingArguments that have one."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(TrainingArguments)
    }


def _resolve_strategy(values: Values) -> list[str]:
    """Drop what needs several processes where there is one, and complete the settings of FSDP."""
    warnings: list[str] = []
    values.fsdp = parse_fsdp_flag(values.fsdp)
    if values.fsdp and not is_launched(values):
        warnings.append("--fsdp: ignored: a single process has nothing to shard; launch with torchrun.")
        values.fsdp, values.fsdp_config = False, None
    if values.fsdp:
        given = parse_json(values.fsdp_config or "{}")
        values.fsdp_config, checkpointing = complete_fsdp_config(given, quantized=values.q_lora)
        if checkpointing:
            values.gradient_checkpointing = values.activation_checkpointing = True
            warnings.append("--fsdp_config activation_checkpointing: applied as --gradient_checkpointing True instead.")
    return warnings
