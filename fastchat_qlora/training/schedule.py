"""Optimizer steps of a run, before it begins, and the learning rate where it resumes."""

import math
from typing import Any, NamedTuple

from torch.optim.lr_scheduler import LambdaLR


class Schedule(NamedTuple):
    """The optimizer steps of a run."""

    steps_per_epoch: int
    steps: int
    epochs: float


def count_steps(args: Any, units: int, processes: int) -> Schedule:
    """Return the optimizer steps of a run.

    Args:
        units: conversations, or packed sequences.
    """
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    per_epoch = count_steps_per_epoch(units, per_step, drop_last=args.dataloader_drop_last)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Schedule(per_epoch, steps, steps / per_epoch if args.max_steps > 0 else float(args.num_train_epochs))


def count_steps_per_epoch(units: int, per_step: int, *, drop_last: bool) -> int:
    """Return the optimizer steps of an epoch; what is left after the last full one makes one more, or is dropped."""
    return max(1, units // per_step if drop_last else math.ceil(units / per_step))


def set_rate(schedule: Any) -> None:
    """Set the learning rate of the next step to that of the schedule; a checkpoint brings along that of its own.

    One that steps on evaluations has no length, and keeps the rate.
    """
    schedule = getattr(schedule, "scheduler", schedule)  # accelerate wraps DeepSpeed's
    if isinstance(schedule, LambdaLR):
        rates = [
            base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
    elif hasattr(schedule, "last_batch_iteration"):  # DeepSpeed's own
        schedule.step(schedule.last_batch_iteration)
