"""Checks of the flags whose value is a JSON object, in place or in a file."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fastchat_qlora.config.validation.deepspeed import find_malformed_config
from fastchat_qlora.config.validation.fsdp import find_fsdp_config_errors
from fastchat_qlora.config.validation.json_settings import COUNT, OBJECT, SWITCH, find_invalid, one_of, read_json

CHECKPOINTING = {
    **dict.fromkeys(("use_reentrant", "preserve_rng_state", "early_stop", "debug", "offload"), SWITCH),
    "determinism_check": one_of("default", "none"),
    "every_n_layers": COUNT,
}
NOT_REENTRANT = ("early_stop", "debug", "determinism_check")
"""Settings of checkpointing that torch takes only without use_reentrant."""

ACCELERATOR = {
    **dict.fromkeys(("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler"), SWITCH),
    "non_blocking": SWITCH,
    "gradient_accumulation_kwargs": OBJECT,
}
ACCUMULATION = dict.fromkeys(("adjust_scheduler", "sync_with_dataloader", "sync_each_batch"), SWITCH)
UNSUPPORTED = {
    "num_steps": "give --gradient_accumulation_steps",
    "use_configured_state": "the run has no other state",
}


def _check_accelerator_config(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from find_invalid(settings, ACCELERATOR, UNSUPPORTED)
    accumulation = settings.get("gradient_accumulation_kwargs")
    if isinstance(accumulation, dict):
        yield from find_invalid(accumulation, ACCUMULATION, UNSUPPORTED, "gradient_accumulation_kwargs.")


def _check_checkpointing_kwargs(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from find_invalid(settings, CHECKPOINTING, {})
    others = [name for name in NOT_REENTRANT if name in settings]
    if others and str(settings.get("use_reentrant")).lower() == "true":
        yield f"use_reentrant true is not supported with {', '.join(others)}; drop one"


JSON_FLAGS: dict[str, Callable[[Mapping[str, Any]], Iterable[str]]] = {
    "deepspeed": find_malformed_config,
    "fsdp_config": find_fsdp_config_errors,
    "accelerator_config": _check_accelerator_config,
    "lr_scheduler_kwargs": lambda settings: (),  # checked by building the schedule; see training/preflight.py
    "activation_checkpointing_kwargs": _check_checkpointing_kwargs,
    "gradient_checkpointing_kwargs": _check_checkpointing_kwargs,
}
"""Flag -> check of its settings."""


def check_json_flags(values: argparse.Namespace) -> Iterator[str]:
    """Yield errors about flags with JSON objects."""
    for flag, check in JSON_FLAGS.items():
        given = getattr(values, flag, None)  # older versions of transformers lack some
        if isinstance(given, str) and given:
            yield from (f"--{flag} {given}: {error}" for error in _check(given, check))


def _check(given: str, check: Callable[[Mapping[str, Any]], Iterable[str]]) -> Iterable[str]:
    try:
        settings = read_json(given)
    except FileNotFoundError:
        examples = " (playground/ has some)" if check is find_malformed_config else ""
        return [f"no such file; give a JSON object or a file with one{examples}"]
    except OSError as error:
        return [f"cannot be read ({error.strerror}); give a JSON object or a file with one"]
    except ValueError as error:
        return [f"cannot be read as JSON: {error}; correct it"]
    if not isinstance(settings, dict):
        return [f"must be a JSON object, not {type(settings).__name__}; correct it"]
    return check(settings)
