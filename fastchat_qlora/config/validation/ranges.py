"""What numbers a flag may have."""

import argparse
import math
import os
from collections.abc import Callable
from typing import NamedTuple

BEYOND = 2**31
"""No count of anything here is as large, and the libraries keep some of them in 32 bits."""

MOST_PROCESSES = max(64, 4 * (os.cpu_count() or 1))
"""A mistyped number of processes stops the machine rather than the run."""


class Range(NamedTuple):
    """Values that are allowed, and how that is said."""

    holds: Callable[[float], bool]
    said: str


COUNT = Range(lambda value: 1 <= value < BEYOND, "must be at least 1 and below 2**31")
NOT_NEGATIVE = Range(lambda value: value >= 0, "must be at least 0")
POSITIVE = Range(lambda value: value > 0, "must be above 0")
SMALL = Range(lambda value: value >= 1e-37, "must be at least 1e-37, which keeps 0 / 0 out of the first step")
SHARE = Range(lambda value: 0 <= value <= 1, "must be a share between 0 and 1")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
SEED = Range(lambda value: 0 <= value < 2**32, "must be at least 0 and below 2**32")
WHOLE = Range(lambda value: -BEYOND <= value < BEYOND, "must be below 2**31")
OR_PART = Range(
    lambda value: 0 <= value < 1 or (value >= 1 and value == int(value)),
    "must be a share below 1 or a whole number of conversations",
)
STEPS = Range(
    lambda value: 0 < value <= 1 or (1 < value < BEYOND and value == int(value)),
    "must be a whole number of steps, or a share of the run below 1",
)

TOKENS_PER_SECOND = Range(lambda value: value == 0 or value >= 1e-3, "must be at least 0.001, or 0 if it is not known")

RANGES: dict[str, Range] = {
    **dict.fromkeys(("lora_r", "lora_alpha", "model_max_length", "gradient_accumulation_steps"), COUNT),
    "device_memory_gib": NOT_NEGATIVE,
    "devices": COUNT,
    "tokens_per_second": TOKENS_PER_SECOND,
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    **dict.fromkeys(("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor"), COUNT),
    **dict.fromkeys(("ddp_bucket_cap_mb", "ddp_timeout"), COUNT),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2"), BELOW_ONE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "neftune_noise_alpha"), NOT_NEGATIVE),
    "learning_rate": POSITIVE,
    "adam_epsilon": SMALL,
    **dict.fromkeys(("max_rejected", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "eval_split": OR_PART,
    "dataloader_num_workers": Range(
        lambda value: 0 <= value <= MOST_PROCESSES, f"must be at least 0 and at most {MOST_PROCESSES}"
    ),
    "preprocessing_num_workers": Range(
        lambda value: 1 <= value <= MOST_PROCESSES, f"must be at least 1 and at most {MOST_PROCESSES}"
    ),
}
"""Flag -> the numbers it may have, where they do not depend on other flags."""


def check_numbers(values: argparse.Namespace) -> list[str]:
    """What is wrong with numbers, by themselves and beside each other."""
    numbers = {
        name: value
        for name, value in vars(values).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    problems = []
    for name, value in numbers.items():
        allowed = RANGES.get(name) or (WHOLE if isinstance(value, int) else None)
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"--{name} {value}: must be a finite number")
        elif allowed and not allowed.holds(value):
            problems.append(f"--{name} {value}: {allowed.said}")
    if problems:  # would pass or break the comparisons below
        return problems
    if values.num_train_epochs <= 0 and values.max_steps <= 0:
        problems.append(f"--num_train_epochs {values.num_train_epochs}: must be above 0, or give --max_steps")
    elif values.max_steps == 0:
        problems.append("--max_steps 0: must be at least 1, or -1 to go by --num_train_epochs")
    for what in ("logging", "save", "eval"):
        steps = getattr(values, f"{what}_steps")
        falls_back = what == "eval" and not steps  # to logging_steps
        if getattr(values, f"{what}_strategy") == "steps" and not falls_back and not STEPS.holds(steps):
            problems.append(f"--{what}_steps {steps}: {STEPS.said}")
    return problems
