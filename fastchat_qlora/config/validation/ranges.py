"""Checks of numbers: the range of each flag, and numbers that depend on each other."""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

INT_LIMIT = 2**31
"""No count of anything here is as large, and the libraries keep some of them in 32 bits."""

MAX_PROCESSES = max(64, 4 * (os.cpu_count() or 1))
"""A mistyped number of processes would stop the machine rather than the run."""


class Range(NamedTuple):
    """Numbers that are allowed, and their description."""

    holds: Callable[[float], bool]
    text: str


COUNT = Range(lambda value: 1 <= value < INT_LIMIT, "must be at least 1 and below 2**31")
NOT_NEGATIVE = Range(lambda value: value >= 0, "must be at least 0")
POSITIVE = Range(lambda value: value > 0, "must be above 0")
EPSILON = Range(lambda value: value >= 1e-37, "must be at least 1e-37, which keeps 0 / 0 out of the first step")
SHARE = Range(lambda value: 0 <= value <= 1, "must be a share between 0 and 1")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
SEED = Range(lambda value: 0 <= value < 2**32, "must be at least 0 and below 2**32")
INTEGER = Range(lambda value: -INT_LIMIT <= value < INT_LIMIT, "must be below 2**31")
SHARE_OR_COUNT = Range(
    lambda value: 0 <= value < 1 or (value >= 1 and value == int(value)),
    "must be a share below 1 or a whole number of conversations",
)
STEP_COUNT = Range(
    lambda value: 0 < value <= 1 or (1 < value < INT_LIMIT and value == int(value)),
    "must be a whole number of steps, or a share of the run below 1",
)
TEMPERATURE = Range(  # beyond these, probabilities are not numbers, or all the same
    lambda value: value == 0 or 0.001 <= value <= 1000, "must be 0, which is greedy decoding, or from 0.001 to 1000"
)
TOKENS_PER_SECOND = Range(lambda value: value == 0 or value >= 1e-3, "must be at least 0.001, or 0 if it is not known")
LOADERS = Range(lambda value: 0 <= value <= MAX_PROCESSES, f"must be at least 0 and at most {MAX_PROCESSES}")
TOKENIZERS = Range(lambda value: 1 <= value <= MAX_PROCESSES, f"must be at least 1 and at most {MAX_PROCESSES}")

RANGES: dict[str, Range] = {
    **dict.fromkeys(("lora_r", "lora_alpha", "model_max_length", "gradient_accumulation_steps", "devices"), COUNT),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "eval_accumulation_steps"), COUNT),
    **dict.fromkeys(("torch_empty_cache_steps", "dataloader_prefetch_factor"), COUNT),
    **dict.fromkeys(("ddp_bucket_cap_mb", "ddp_timeout", "max_new_tokens"), COUNT),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2"), BELOW_ONE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "neftune_noise_alpha"), NOT_NEGATIVE),
    "device_memory_gib": NOT_NEGATIVE,
    "learning_rate": POSITIVE,
    "adam_epsilon": EPSILON,
    **dict.fromkeys(("max_rejected", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "eval_split": SHARE_OR_COUNT,
    "temperature": TEMPERATURE,
    "top_p": Range(lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
    "tokens_per_second": TOKENS_PER_SECOND,
    "dataloader_num_workers": LOADERS,
    "preprocessing_num_workers": TOKENIZERS,
}
"""Flag -> its range; whole numbers of other flags must be an INTEGER."""


def check_numbers(values: argparse.Namespace) -> list[str]:
    """Return errors about numbers."""
    return [*check_ranges(values)] or [*_check_steps(values)]


def check_ranges(values: argparse.Namespace) -> Iterator[str]:
    """Yield an error for each number outside the range of its flag."""
    for name, value in vars(values).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        allowed = RANGES.get(name) or (INTEGER if isinstance(value, int) else None)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"--{name} {value}: must be a finite number"
        elif allowed and not allowed.holds(value):
            yield f"--{name} {value}: {allowed.text}"


def _check_steps(values: argparse.Namespace) -> Iterator[str]:
    if values.num_train_epochs <= 0 and values.max_steps <= 0:
        yield f"--num_train_epochs {values.num_train_epochs}: must be above 0, or give --max_steps"
    elif values.max_steps == 0:
        yield "--max_steps 0: must be at least 1, or -1 for --num_train_epochs"
    for event in ("logging", "save", "eval"):
        steps = getattr(values, f"{event}_steps")
        is_default = event == "eval" and not steps  # it is that of logging_steps
        if getattr(values, f"{event}_strategy") == "steps" and not is_default and not STEP_COUNT.holds(steps):
            yield f"--{event}_steps {steps}: {STEP_COUNT.text}"
