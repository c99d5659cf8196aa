"""How many optimizer steps a run takes, before it begins."""

import math
from typing import Any, NamedTuple


class Schedule(NamedTuple):
    """The steps of a run.

    Attributes:
        steps_per_epoch: optimizer steps in which every row is seen once.
        steps: of the whole run.
        epochs: how often a row is seen; the last time perhaps not all of them.
    """

    steps_per_epoch: int
    steps: int
    epochs: float


def count_steps(args: Any, rows: int, processes: int) -> Schedule:
    """The steps that Trainer makes of the rows.

    Micro-batches are dealt out to the processes, each of which gets as many as the others (accelerate's
    `BatchSamplerShard` with even batches); what is left of an epoch after the last full step makes one more.

    Args:
        args: the training arguments.
        rows: conversations, or packed rows.
        processes: that train.
    """
    drop = args.dataloader_drop_last
    rounded = math.floor if drop else math.ceil
    micro_batches = rounded(rounded(rows / args.per_device_train_batch_size) / processes)
    per_epoch = max(1, math.ceil(micro_batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Schedule(per_epoch, steps, steps / per_epoch if args.max_steps > 0 else float(args.num_train_epochs))
