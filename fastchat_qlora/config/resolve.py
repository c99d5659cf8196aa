"""What follows for a command line from the machine and the data given, before its groups are built."""

import argparse
import os

import torch

from fastchat_qlora.config.validation.flags import is_launched, lacks_accelerator
from fastchat_qlora.config.validation.json_flags import FLAGS, json_text, read_json
from fastchat_qlora.distributed import fsdp_config
from fastchat_qlora.distributed.deepspeed_config import fill_auto_settings


def adapt_to_machine(values: argparse.Namespace) -> list[str]:
    """Change in place what follows from the machine and the data.

    Args:
        values: as parsed, for which `find_problems` finds nothing.

    Returns:
        Sentences on what was changed.
    """
    notices = []
    if lacks_accelerator() and not values.use_cpu:
        values.use_cpu = True
        notices.append("No accelerator found: training on the CPU.")
    if not values.use_cpu and torch.accelerator.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        count = torch.accelerator.device_count()
        notices.append(
            f"One process trains on one of {count} accelerators; launch with torchrun or deepspeed to use all."
        )
    nothing_to_evaluate = not values.eval_data_path and not values.eval_split
    if values.eval_strategy != "no" and nothing_to_evaluate:
        # FastChat's published commands ask for evaluation without giving data for it.
        notices.append(
            f"--eval_strategy {values.eval_strategy}: ignored, there is nothing to evaluate on; "
            "give --eval_data_path or --eval_split."
        )
        values.eval_strategy = "no"
    if (values.eval_on_start or values.do_eval) and nothing_to_evaluate:
        notices.append("--eval_on_start, --do_eval: ignored, there is nothing to evaluate on.")
        values.eval_on_start = values.do_eval = False
    values.fsdp = fsdp_config.parse_fsdp_flag(values.fsdp)
    if values.fsdp and not is_launched(values):
        notices.append("--fsdp: ignored, a single process has nothing to shard; launch with torchrun.")
        values.fsdp, values.fsdp_config = False, None
    if values.ddp_backend and "RANK" not in os.environ:
        notices.append(f"--ddp_backend {values.ddp_backend}: ignored, a single process has nobody to talk to.")
        values.ddp_backend = None
    if values.fsdp:
        notices += _adapt_fsdp(values)
    values.model_name_or_path = os.path.expanduser(values.model_name_or_path)  # hub ids have no ~
    values.lora_weight_path = os.path.expanduser(values.lora_weight_path)
    if values.deepspeed:
        values.deepspeed = fill_auto_settings(read_json(values.deepspeed), values.optim)
    for name in FLAGS:
        if isinstance(given := getattr(values, name, None), str) and given:  # transformers reads files for some only
            setattr(values, name, json_text(given))
    for name in ("cache_dir", "resume_from_checkpoint"):
        given = getattr(values, name)
        setattr(values, name, os.path.expanduser(given) if isinstance(given, str) else given)
    values.data_path = [os.path.expanduser(path) for path in values.data_path]
    values.eval_data_path = values.eval_data_path and [os.path.expanduser(path) for path in values.eval_data_path]
    return notices


def _adapt_fsdp(values: argparse.Namespace) -> list[str]:
    config, checkpointing = fsdp_config.complete_fsdp_config(
        read_json(values.fsdp_config or "{}"), quantized=values.q_lora
    )
    values.fsdp_config = config
    if not checkpointing:
        return []
    values.gradient_checkpointing = True
    if hasattr(values, "activation_checkpointing"):  # what newer versions of transformers call it
        values.activation_checkpointing = True
    return ["--fsdp_config activation_checkpointing: done as --gradient_checkpointing True, to the same effect."]
