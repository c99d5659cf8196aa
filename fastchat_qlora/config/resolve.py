"""Flags that depend on the machine, the launcher or other flags, before the argument groups are built."""

import argparse
import os

import torch

from fastchat_qlora.config.validation.flags import is_launched, lacks_accelerator
from fastchat_qlora.config.validation.json_flags import JSON_FLAGS, json_text, parse_json
from fastchat_qlora.distributed.deepspeed_config import fill_auto_settings
from fastchat_qlora.distributed.environment import settle_variables
from fastchat_qlora.distributed.fsdp_config import complete_fsdp_config, parse_fsdp_flag

PATHS = ("model_name_or_path", "lora_weight_path", "cache_dir", "resume_from_checkpoint", "data_path", "eval_data_path")
"""Flags whose ~ is expanded; hub ids have none."""


def resolve_flags(values: argparse.Namespace) -> list[str]:
    """Resolve parsed flags without errors in place, and return warnings about what has changed."""
    warnings = [*_resolve_device(values), *_resolve_evaluation(values), *_resolve_strategy(values)]
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


def _resolve_device(values: argparse.Namespace) -> list[str]:
    if lacks_accelerator() and not values.use_cpu:
        values.use_cpu = True
        hidden = ", since CUDA_VISIBLE_DEVICES is empty" if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else ""
        return [f"No accelerator found{hidden}: training on the CPU."]
    count = torch.accelerator.device_count()
    if not values.use_cpu and count > 1 and "WORLD_SIZE" not in os.environ:
        return [f"One process trains on one of {count} accelerators; launch with torchrun or deepspeed to use all."]
    return []


def _resolve_evaluation(values: argparse.Namespace) -> list[str]:
    """Switch evaluation off where there is no data for it, as in FastChat's published commands."""
    warnings: list[str] = []
    if values.eval_data_path or values.eval_split:
        return warnings
    if values.eval_strategy != "no":
        warnings.append(
            f"--eval_strategy {values.eval_strategy}: ignored: there is nothing to evaluate on; give --eval_data_path "
            "or --eval_split."
        )
    if values.eval_on_start or values.do_eval:
        warnings.append("--eval_on_start, --do_eval: ignored: there is nothing to evaluate on.")
    values.eval_strategy, values.eval_on_start, values.do_eval = "no", False, False
    return warnings


def _resolve_strategy(values: argparse.Namespace) -> list[str]:
    """Drop what needs several processes where there is one, and complete the settings of FSDP."""
    warnings: list[str] = []
    values.fsdp = parse_fsdp_flag(values.fsdp)
    if values.fsdp and not is_launched(values):
        warnings.append("--fsdp: ignored: a single process has nothing to shard; launch with torchrun.")
        values.fsdp, values.fsdp_config = False, None
    if values.ddp_backend and "RANK" not in os.environ:
        warnings.append(f"--ddp_backend {values.ddp_backend}: ignored: there is only one process.")
        values.ddp_backend = None
    if values.fsdp:
        given = parse_json(values.fsdp_config or "{}")
        values.fsdp_config, checkpointing = complete_fsdp_config(given, quantized=values.q_lora)
        if checkpointing:
            values.gradient_checkpointing = values.activation_checkpointing = True
            warnings.append("--fsdp_config activation_checkpointing: applied as --gradient_checkpointing True instead.")
    return warnings
