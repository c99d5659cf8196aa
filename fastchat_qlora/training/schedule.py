"""Number of optimizer steps of a run, before it begins."""

import math
from typing import Any, NamedTuple


class Schedule(NamedTuple):
    """The optimizer steps of a run."""

    steps_per_epoch: int
    steps: int
    epochs: float


def count_steps(args: Any, sequences: int, processes: int) -> Schedule:
    """Return the steps that Trainer makes of the sequences.

    Every process gets as many micro-batches as the others (accelerate's `BatchSamplerShard` with even batches); those
    left after the last full step of an epoch make one more step.
    """
    rounded = math.floor if args.dataloader_drop_last else math.ceil
    micro_batches = rounded(rounded(sequences / args.per_device_train_batch_size) / processes)
    per_epoch = max(1, math.ceil(micro_batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Schedule(per_epoch, steps, steps / per_epoch if args.max_steps > 0 else float(args.num_train_epochs))
