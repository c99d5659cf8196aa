"""Checks of numbers: the range of each flag, and numbers that depend on each other."""

import argparse
import math
import os
from collections.abc import Iterator

from fastchat_qlora.config.validation.json_schema import Kind

INT_LIMIT = 2**31  # no count of anything here is as large, and the libraries keep some of them in 32 bits
MAX_WORKERS = max(64, 4 * (os.cpu_count() or 1))  # more would stop the machine, and are probably mistyped

COUNT = Kind("at least 1 and below 2**31", lambda value: 1 <= value < INT_LIMIT)
NOT_NEGATIVE = Kind("at least 0", lambda value: value >= 0)
BELOW_ONE = Kind("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Kind("a share between 0 and 1", lambda value: 0 <= value <= 1)
SEED = Kind("at least 0 and below 2**32", lambda value: 0 <= value < 2**32)
INTEGER = Kind("below 2**31", lambda value: -INT_LIMIT <= value < INT_LIMIT)
SHARE_OR_COUNT = Kind(
    "a share below 1 or a whole number of conversations",
    lambda value: 0 <= value < 1 or (value >= 1 and value == int(value)),
)
STEP_COUNT = Kind(
    "a whole number of steps, or a share of the run below 1",
    lambda value: 0 < value <= 1 or (1 < value < INT_LIMIT and value == int(value)),
)
TEMPERATURE = Kind(  # beyond these, probabilities are not numbers, or all the same
    "0, which is greedy decoding, or from 0.001 to 1000", lambda value: value == 0 or 0.001 <= value <= 1000
)
TOKENS_PER_SECOND = Kind("at least 0.001, or 0 if it is not known", lambda value: value == 0 or value >= 1e-3)

RANGES = {
    **dict.fromkeys(("lora_r", "lora_alpha", "model_max_length", "gradient_accumulation_steps", "devices"), COUNT),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "eval_accumulation_steps"), COUNT),
    **dict.fromkeys(("torch_empty_cache_steps", "dataloader_prefetch_factor"), COUNT),
    **dict.fromkeys(("ddp_bucket_cap_mb", "ddp_timeout", "max_new_tokens"), COUNT),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2"), BELOW_ONE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "neftune_noise_alpha"), NOT_NEGATIVE),
    "router_aux_loss_coef": NOT_NEGATIVE,
    "device_memory_gib": NOT_NEGATIVE,
    "num_examples": Kind("at least 0; 0 shows all sequences", NOT_NEGATIVE.accepts),
    "learning_rate": Kind("above 0", lambda value: value > 0),
    "adam_epsilon": Kind("at least 1e-37, which keeps 0 / 0 out of the first step", lambda value: value >= 1e-37),
    **dict.fromkeys(("max_rejected", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "eval_split": SHARE_OR_COUNT,
    "temperature": TEMPERATURE,
    "top_p": Kind("above 0 and at most 1", lambda value: 0 < value <= 1),
    "tokens_per_second": TOKENS_PER_SECOND,
    "dataloader_num_workers": Kind(f"at least 0, at most {MAX_WORKERS}", lambda value: 0 <= value <= MAX_WORKERS),
    "preprocessing_num_workers": Kind(f"at least 1, at most {MAX_WORKERS}", lambda value: 1 <= value <= MAX_WORKERS),
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
        elif allowed and not allowed.accepts(value):
            yield f"--{name} {value}: must be {allowed.text}"


def _check_steps(values: argparse.Namespace) -> Iterator[str]:
    if values.num_train_epochs <= 0 and values.max_steps <= 0:
        yield f"--num_train_epochs {values.num_train_epochs}: must be above 0, or give --max_steps"
    elif values.max_steps == 0:
        yield "--max_steps 0: must be at least 1, or -1 for --num_train_epochs"
    for event in ("logging", "save", "eval"):
        steps = getattr(values, f"{event}_steps")
        is_default = event == "eval" and not steps  # it is that of logging_steps
        if getattr(values, f"{event}_strategy") == "steps" and not is_default and not STEP_COUNT.accepts(steps):
            yield f"--{event}_steps {steps}: must be {STEP_COUNT.text}"
