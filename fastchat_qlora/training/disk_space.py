"""Whether what a run will write fits on the disk."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import IntervalStrategy

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.estimates.optimizer_state import state_bytes
from fastchat_qlora.training.schedule import count_steps

FP32_BYTES = 4
BESIDES = 32 * 2**20
"""Bytes for a tokenizer, random states and logs; the tokenizers of large vocabularies are of some 20 MiB."""


def checkpoint_bytes(parameters: int, optimizer: str, *, has_masters: bool, only_model: bool = False) -> int:
    """How large a checkpoint is: the adapter in fp32 and the optimizer's state.

    Args:
        parameters: what is trained.
        optimizer: its name.
        has_masters: whether fp32 copies of the parameters, and the parameters beside them, are in it: DeepSpeed's.
        only_model: whether it is the adapter alone (--save_only_model).
    """
    if only_model:
        return parameters * FP32_BYTES
    return round(parameters * (FP32_BYTES * (1 + 2 * has_masters) + state_bytes(optimizer)))


def count_checkpoints(args: Any, rows: int, processes: int) -> int:
    """How many checkpoints lie in output_dir at the end of a run at the most.

    Args:
        args: the training arguments.
        rows: of the training data, over all processes.
        processes: that train.
    """
    if args.save_strategy == "no":
        return 0
    in_an_epoch, steps, _ = count_steps(args, rows, processes)
    if args.save_strategy == IntervalStrategy.STEPS:
        every = args.save_steps
    elif args.save_strategy == "best" and args.eval_strategy == IntervalStrategy.STEPS:
        every = args.eval_steps
    else:
        every = in_an_epoch
    if every < 1:  # a share of the run
        every = max(1, math.ceil(steps * every))
    planned = math.ceil(steps / every)
    limit = args.save_total_limit if args.save_total_limit and args.save_total_limit > 0 else planned
    return int(min(planned, limit))


def check_room(
    output_dir: Path,
    shapes: Mapping[str, torch.Size] | None,
    checkpoints: int,
    optimizer: str,
    *,
    has_masters: bool,
    only_model: bool,
    goes_on: bool,
) -> None:
    """Require that the adapter and the checkpoints of a run fit on the disk, before it begins.

    Args:
        output_dir: the folder of the run.
        shapes: name -> shape of the adapter's tensors; nothing is checked where they are not known.
        checkpoints: how many are kept at the most, from `count_checkpoints`.
        optimizer: its name.
        has_masters: see `checkpoint_bytes`.
        only_model: see `checkpoint_bytes`.
        goes_on: whether the checkpoints that are there are this run's, so that they count as room.

    Raises:
        UserError: saying what is needed, for what, and what is free.
    """
    if shapes is None:
        return
    parameters = sum(shape.numel() for shape in shapes.values())
    adapter = parameters * FP32_BYTES
    one = checkpoint_bytes(parameters, optimizer, has_masters=has_masters, only_model=only_model)
    # one more of each: what is being written is there beside what it will take the place of
    need = 2 * adapter + (checkpoints + 1) * one + BESIDES
    files = output_dir.glob("checkpoint-*/**/*") if goes_on else ()
    there = sum(path.stat().st_size for path in files if path.is_file())
    free = shutil.disk_usage(output_dir).free
    if free + there < need:
        raise UserError(
            f"--output_dir {output_dir}: {_mib(free)} are free and this run needs {_mib(need - there)}: adapters of "
            f"{_mib(adapter)} and {checkpoints} checkpoints of {_mib(one)}; make room, or give another folder, or a "
            "lower --save_total_limit"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
