"""Optimizer and schedule tried out on one small parameter, for they are built long after the weights are loaded."""

import inspect
import math

import torch
from transformers import Trainer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from fastchat_qlora.arguments import TrainingArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.text import one_line

STEPS = 100
"""Of a rehearsed schedule, where the number of steps follows from the data."""

GIVEN_BY_THE_RUN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""Parameters of a schedule that are no setting of it."""

WITH_A_MODEL = ("params", "model", "optimizer_dict")
"""What optimizers get of a whole model; those that do cannot be rehearsed on one parameter."""


def rehearse(args: TrainingArguments, model: torch.nn.Module | None) -> None:
    """Require that the optimizer and the schedule asked for can be built, and that the schedule gives rates.

    Not under DeepSpeed, whose configuration may name others.

    Args:
        args: as parsed.
        model: without weights, for optimizers that look at its layers' names.

    Raises:
        UserError: naming the flags, and what the libraries say.
    """
    if args.deepspeed:
        return
    optimizer = _build_optimizer(args, model)
    allowed = _check_schedule_settings(args)
    kind, settings = SchedulerType(args.lr_scheduler_type).value, args.lr_scheduler_kwargs or {}
    steps = args.max_steps if args.max_steps > 0 else STEPS
    warmup = args.get_warmup_steps(steps)
    try:
        schedule = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=dict(settings))
        for rate_of in getattr(schedule, "lr_lambdas", ()):
            if not all(math.isfinite(rate_of(step)) for step in {0, warmup, warmup + 1, steps // 2, steps - 1, steps}):
                raise ValueError("it gives learning rates that are not finite")
    except Exception as error:  # settings go through to torch and to closures that look at them late
        given = f" with --lr_scheduler_kwargs {settings}" if settings else ""
        takes = f"; --lr_scheduler_kwargs may set {', '.join(allowed)}" if allowed else ""
        raise UserError(f"--lr_scheduler_type {kind}{given}: cannot be used: {one_line(error, 200)}{takes}") from error


def _check_schedule_settings(args: TrainingArguments) -> list[str]:
    """The settings that the schedule has, after requiring that no others are given."""
    kind = SchedulerType(args.lr_scheduler_type)
    names = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    allowed = [name for name in names if name not in GIVEN_BY_THE_RUN and name != "kwargs"]
    if kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        allowed = []  # transformers gives them nothing
    unknown = [name for name in args.lr_scheduler_kwargs or {} if name not in allowed]
    if unknown and (not takes_any or {*unknown} & {*GIVEN_BY_THE_RUN}):
        hint = f"it has {', '.join(allowed)}" if allowed else "it has none, drop the flag"
        raise UserError(
            f"--lr_scheduler_kwargs {', '.join(unknown)}: no setting of --lr_scheduler_type {kind.value}; {hint}"
        )
    return allowed


def _build_optimizer(args: TrainingArguments, model: torch.nn.Module | None) -> torch.optim.Optimizer:
    """The optimizer asked for, over one parameter; torch's SGD in place of one that needs the model."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    name = OptimizerNames(args.optim).value
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not any(key in settings for key in WITH_A_MODEL):
            built: torch.optim.Optimizer = kind([parameter], **settings)
            return built
    except Exception as error:  # --optim_args goes through to whatever package has the optimizer
        given = f" with --optim_args {args.optim_args}" if args.optim_args else ""
        raise UserError(
            f"--optim {name}{given}: cannot be used: {one_line(error, 200)}; choose another, such as adamw_torch"
        ) from error
    return torch.optim.SGD([parameter], lr=args.learning_rate)
