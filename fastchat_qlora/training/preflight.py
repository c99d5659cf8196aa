"""Trial of optimizer, schedule, compiler and hub before the weights are loaded."""

import inspect
import logging
import math

import torch
from accelerate.utils import DynamoBackend
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.config.validation.optimizers import OPTIMIZER_TABLE
from fastchat_qlora.distributed.deepspeed_config import get_offload_device, get_setting
from fastchat_qlora.errors import UserError
from fastchat_qlora.training.optimizers import build_trial_optimizer
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

TRIAL_STEPS = 100  # steps of a schedule that is tried out, if their number follows from the data
RUN_PARAMETERS = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # of a schedule, set by the run
NO_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def run_preflight(args: TrainingArguments) -> None:
    """Build the optimizer, the schedule and the compiler on one parameter, and ask the hub who the user is.

    Under DeepSpeed the schedule is not built, nor the optimizer if the configuration has one of its own.
    """
    if args.push_to_hub and args.process_index == 0:
        _check_hub(args)
    if args.torch_compile:
        _check_compilation(args)
    if args.deepspeed and "optimizer" in args.deepspeed:
        return
    offloads = get_offload_device(args.deepspeed or {}, "offload_optimizer") != "none"
    optimizer = build_trial_optimizer(args, torch.device("cpu") if offloads else args.device)
    if args.deepspeed:
        return
    allowed = _check_schedule_settings(args)
    kind, settings = SchedulerType(args.lr_scheduler_type).value, args.lr_scheduler_kwargs or {}
    steps = args.max_steps if args.max_steps > 0 else TRIAL_STEPS
    warmup = args.get_warmup_steps(steps)
    try:
        schedule = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=dict(settings))
        for rate_of in getattr(schedule, "lr_lambdas", ()):
            if not all(math.isfinite(rate_of(step)) for step in {0, warmup, warmup + 1, steps // 2, steps - 1, steps}):
                raise ValueError("it gives learning rates that are not finite")
    except Exception as error:  # torch and closures take the settings unchecked, and look at them late
        given = f" with --lr_scheduler_kwargs {settings}" if settings else ""
        takes = f"; --lr_scheduler_kwargs may set {', '.join(allowed)}" if allowed else ""
        raise UserError(f"--lr_scheduler_type {kind}{given}: cannot be used: {one_line(error, 200)}{takes}") from error
    lowest = max(getattr(schedule, "min_lrs", [0.0]))
    if lowest > args.learning_rate:  # transformers' greedy has one of 1e-3 by itself, which a reduction would raise to
        raise UserError(
            f"--lr_scheduler_type {kind}: its min_lr of {lowest:g} is above --learning_rate {args.learning_rate:g}; "
            "give --lr_scheduler_kwargs '{\"min_lr\": 0}'"
        )


def warn_of_schedule(args: TrainingArguments, steps: int) -> None:
    """Log settings of the schedule that do not fit a run of so many steps."""
    kind, warmup = SchedulerType(args.lr_scheduler_type), args.get_warmup_steps(steps)
    settings, deepspeeds = args.lr_scheduler_kwargs or {}, get_setting(args.deepspeed or {}, "scheduler.type")
    stages = warmup + settings.get("num_stable_steps", 0) + settings.get("num_decay_steps", 0)
    counts_warmup = OPTIMIZER_TABLE[OptimizerNames(args.optim).value].counts_warmup
    if warmup and kind in NO_WARMUP and not deepspeeds and not counts_warmup:
        logger.warning(
            f"--warmup_steps {args.warmup_steps:g}: ignored: --lr_scheduler_type {kind.value} has no warm-up; choose "
            "constant_with_warmup, or drop the flag."
        )
    elif warmup >= steps > 0:
        logger.warning(
            f"--warmup_steps {args.warmup_steps:g}: the run has {steps} steps, so that the learning rate only rises; "
            "lower it."
        )
    elif kind is SchedulerType.WARMUP_STABLE_DECAY and stages > steps:
        logger.warning(
            f"--lr_scheduler_kwargs {settings}: with the warm-up its stages have {stages} steps, and the run has "
            f"{steps}, so that it does not pass through all of them; lower them."
        )


def _check_hub(args: TrainingArguments) -> None:
    """Check the repository's name and the login; Trainer creates the repository after the weights are loaded."""
    from huggingface_hub import whoami
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented as public

    if args.hub_model_id is not None:
        try:
            validate_repo_id(args.hub_model_id)
        except ValueError as error:
            raise UserError(f"--hub_model_id {args.hub_model_id}: {one_line(error, 200)}") from error
    try:
        whoami(args.hub_token)
    except Exception as error:  # of the network, of the hub, of an invalid token
        raise UserError(
            f"--push_to_hub True: the hub does not know you: {one_line(error, 200)}; log in with `hf auth login` or "
            "drop the flag"
        ) from error


def _check_compilation(args: TrainingArguments) -> None:
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    known = [name.lower() for name in DynamoBackend.__members__ if name != "NO"]
    if str(backend).lower() not in known:
        raise UserError(f"--torch_compile_backend {backend}: must be one of {', '.join(known)}")
    try:
        torch.compile(torch.nn.Identity(), backend=str(backend).lower(), mode=mode)  # nothing is compiled yet
    except Exception as error:  # backends are packages of their own
        given = f" with --torch_compile_mode {mode}" if mode is not None else ""
        raise UserError(
            f"--torch_compile_backend {backend}{given}: cannot be used: {one_line(error, 200)}; correct or drop it"
        ) from error


def _check_schedule_settings(args: TrainingArguments) -> list[str]:
    """Return the settings that the schedule has, and check that no others are given."""
    kind = SchedulerType(args.lr_scheduler_type)
    names = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    allowed = [name for name in names if name not in RUN_PARAMETERS and name != "kwargs"]
    if kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        allowed = []  # transformers passes them nothing
    unknown = [name for name in args.lr_scheduler_kwargs or {} if name not in allowed]
    if unknown and (not takes_any or {*unknown} & {*RUN_PARAMETERS}):
        hint = f"use {', '.join(allowed)}" if allowed else "it has none, drop the flag"
        raise UserError(
            f"--lr_scheduler_kwargs {', '.join(unknown)}: not a setting of --lr_scheduler_type {kind.value}; {hint}"
        )
    return allowed
