"""Flags whose value is a JSON object, in place or in a file: reading and checking it."""

import argparse
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastchat_qlora.config.validation.columns import find_column_errors
from fastchat_qlora.config.validation.deepspeed import find_malformed_config
from fastchat_qlora.config.validation.fsdp import find_fsdp_config_errors
from fastchat_qlora.config.validation.json_schema import OBJECT, SWITCH, WHOLE_NUMBER, Kind, find_invalid, one_of

MAX_DEPTH = 50  # nested objects; no setting of any library is as deep
MAX_FILE_BYTES = 1 << 20

CHECKPOINTING = {
    **dict.fromkeys(("use_reentrant", "preserve_rng_state", "early_stop", "debug", "offload"), SWITCH),
    "determinism_check": one_of("default", "none"),
    "every_n_layers": WHOLE_NUMBER,
}
NOT_REENTRANT = ("early_stop", "debug", "determinism_check")  # torch takes them only without use_reentrant

WHOLE_BATCHES = Kind("false, since batches cannot be split", lambda value: str(value).lower() == "false")
ACCELERATOR = {
    **dict.fromkeys(("split_batches", "dispatch_batches"), WHOLE_BATCHES),
    "even_batches": Kind("true, since all processes do the same steps", lambda value: str(value).lower() == "true"),
    "use_seedable_sampler": Kind("true, since the seed decides the order", lambda value: str(value).lower() == "true"),
    "non_blocking": SWITCH,
    "gradient_accumulation_kwargs": OBJECT,
}
ACCUMULATION = {"sync_each_batch": SWITCH}
UNSUPPORTED_ACCELERATOR = {
    "num_steps": "give --gradient_accumulation_steps",
    "use_configured_state": "the run has no other state",
    **dict.fromkeys(("adjust_scheduler", "sync_with_dataloader"), "Trainer does not read it"),
}

RENDERED_NAMES = {
    "messages": "the records have them",
    "conversation": "the records have it",
    "tools": "put 'tools' into the records",
    "documents": "put their text into the messages",
    "chat_template": "change the model's chat_template.jinja, or give --conv_template",
    **dict.fromkeys(("add_generation_prompt", "continue_final_message"), "rendering sets it"),
    **dict.fromkeys(("tokenize", "padding", "truncation", "max_length", "return_tensors"), "rendering sets it"),
    **dict.fromkeys(("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"), "rendering sets it"),
    **dict.fromkeys(("sanitize_control_tokens", "raise_exception", "strftime_now"), "rendering sets it"),
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token", "sep_token"), "the tokenizer has it"),
    **dict.fromkeys(("cls_token", "mask_token", "additional_special_tokens"), "the tokenizer has it"),
}
"""Names that no argument of a chat template may have, and why."""


def parse_json(given: str) -> Any:
    """Parse JSON given in place, or in the file of that name. Without any, raise an OSError or a ValueError."""
    try:
        settings = json.loads(json_text(given), object_pairs_hook=reject_duplicates)
        json.dumps(settings, ensure_ascii=False, allow_nan=False).encode()  # Python reads NaN and half characters
    except RecursionError as error:
        raise ValueError(f"objects in more than {MAX_DEPTH} others") from error
    level = [settings]
    for _ in range(MAX_DEPTH):
        level = [value for values in level if isinstance(values, dict) for value in values.values()]
    if level:
        raise ValueError(f"objects in more than {MAX_DEPTH} others")
    return settings


def _read_object(given: str, examples: str = "") -> dict[str, Any]:
    """Parse a JSON object; a ValueError says what is wrong and what to do."""
    try:
        settings = parse_json(given)
    except FileNotFoundError as error:
        raise ValueError(f"no such file; give a JSON object or a file with one{examples}") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); give a JSON object or a file with one") from error
    except ValueError as error:
        raise ValueError(f"cannot be read as JSON: {error}; correct it") from error
    if not isinstance(settings, dict):
        raise ValueError(f"must be a JSON object, not {type(settings).__name__}; correct it")
    return settings


def parse_object(given: Any) -> dict[str, Any]:
    """Return the JSON object of a flag, or an empty one if it is malformed, which is reported elsewhere."""
    if isinstance(given, dict):
        return given
    with suppress(ValueError):
        return _read_object(given) if given else {}
    return {}


def json_object(given: str) -> dict[str, Any]:
    """Parse a JSON object for argparse."""
    try:
        return _read_object(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{given}: {error}") from error


def json_text(given: str) -> str:
    """Return the text, or the content of the file it names; the libraries read a file for some flags only."""
    return given if given.startswith("{") else read_small_file(Path(os.path.expanduser(given))).decode().strip()


def read_small_file(path: Path) -> bytes:
    """Read a file of settings, no pipe or device; a ValueError is the end of a sentence."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError("is not a regular file")
    if found.st_size > MAX_FILE_BYTES:
        raise ValueError("is too large for settings")
    return path.read_bytes()


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, or raise a ValueError if a name is there twice: Python would keep the last value."""
    names = [name for name, _ in pairs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(repeated)} is there twice")
    return dict(pairs)


def _check_accelerator_config(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from find_invalid(settings, ACCELERATOR, UNSUPPORTED_ACCELERATOR)
    accumulation = settings.get("gradient_accumulation_kwargs")
    if isinstance(accumulation, dict):
        yield from find_invalid(accumulation, ACCUMULATION, UNSUPPORTED_ACCELERATOR, "gradient_accumulation_kwargs.")


def _check_checkpointing_kwargs(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from find_invalid(settings, CHECKPOINTING, {})
    others = [name for name in NOT_REENTRANT if name in settings]
    if others and str(settings.get("use_reentrant")).lower() == "true":
        yield f"use_reentrant true is not supported with {', '.join(others)}; drop one"


def find_template_kwargs_errors(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield an error for each argument of a chat template whose name is not free."""
    for name in settings:
        if name in RENDERED_NAMES:
            yield f"{name} cannot be an argument of the chat template ({RENDERED_NAMES[name]}); leave it out"


JSON_FLAGS: dict[str, Callable[[Mapping[str, Any]], Iterable[str]]] = {
    "columns": find_column_errors,
    "deepspeed": find_malformed_config,
    "fsdp_config": find_fsdp_config_errors,
    "accelerator_config": _check_accelerator_config,
    "lr_scheduler_kwargs": lambda settings: (),  # checked by building the schedule; see training/preflight.py
    "activation_checkpointing_kwargs": _check_checkpointing_kwargs,
    "gradient_checkpointing_kwargs": _check_checkpointing_kwargs,
    "chat_template_kwargs": find_template_kwargs_errors,
}
"""Flag -> check of its settings."""


def check_json_flags(values: argparse.Namespace) -> Iterator[str]:
    """Yield errors about flags with JSON objects."""
    for flag, check in JSON_FLAGS.items():
        given = getattr(values, flag, None)  # older versions of transformers lack some
        if not isinstance(given, str) or not given:
            continue
        try:
            settings = _read_object(given, " (playground/ has some)" if flag == "deepspeed" else "")
        except ValueError as error:
            yield f"--{flag} {given}: {error}"
        else:
            yield from (f"--{flag} {given}: {error}" for error in check(settings))
