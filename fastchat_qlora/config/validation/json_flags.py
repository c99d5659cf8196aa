"""Flags that take a JSON object, in place or as a file: how it is read, and what is wrong with it."""

import argparse
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastchat_qlora.config.validation import deepspeed as deepspeed_checks
from fastchat_qlora.distributed import fsdp_config
from fastchat_qlora.utils.text import did_you_mean

DEEPEST = 50  # objects within objects; no setting of any library is as deep
TOO_DEEP = f"objects in more than {DEEPEST} others"
LARGEST = 1 << 20  # bytes of a file of settings

SWITCH = "true or false"
COUNT = "a whole number of at least 1"
OBJECT = "an object"
CHECKPOINTING = {
    "use_reentrant": SWITCH,
    "preserve_rng_state": SWITCH,
    "early_stop": SWITCH,
    "debug": SWITCH,
    "offload": SWITCH,
    "determinism_check": ("default", "none"),
    "every_n_layers": COUNT,
}
ACCELERATOR = {
    **dict.fromkeys(("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler"), SWITCH),
    "non_blocking": SWITCH,
    "gradient_accumulation_kwargs": OBJECT,
}
ACCUMULATION = dict.fromkeys(("adjust_scheduler", "sync_with_dataloader", "sync_each_batch"), SWITCH)

ELSEWHERE = {
    "num_steps": "give --gradient_accumulation_steps",
    "use_configured_state": "there is no state but that of this run",
}
"""Settings that accelerate knows and that have no meaning here; and what to do about it."""


def read_json(given: str) -> Any:
    """Settings given as JSON in place, or as the name of a file that holds it.

    Raises:
        OSError: there is no such file.
        ValueError: it is no JSON, is nested beyond all measure, or names something twice.
    """
    try:
        settings = json.loads(json_text(given), object_pairs_hook=without_repetition)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    level = [settings]
    for _ in range(DEEPEST):
        level = [value for values in level if isinstance(values, dict) for value in values.values()]
    if level:
        raise ValueError(TOO_DEEP)
    return settings


def json_object(given: str) -> dict[str, Any]:
    """The same for argparse, of a flag whose value is an object.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        settings = read_json(given)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{given}: cannot be read as JSON: {error}; mend it") from error
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f"{given}: must hold a JSON object, holds {type(settings).__name__}; mend it")
    return settings


def json_text(given: str) -> str:
    """The text itself, or that of the file it names; the libraries read a file for some of the flags only.

    Raises:
        OSError: there is no such file.
        ValueError: it is not UTF-8, no file of settings, or no name for a file.
    """
    return given if given.startswith("{") else read_small_file(Path(os.path.expanduser(given))).decode().strip()


def read_small_file(path: Path) -> bytes:
    """What a file of settings holds; a pipe could be read only once, and a device may never end.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file of settings, as the end of a sentence.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError("is no regular file")
    if found.st_size > LARGEST:
        raise ValueError("is too large for settings")
    return path.read_bytes()


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python would keep the last of several values.

    Raises:
        ValueError: a name is there twice.
    """
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is there twice")
    return dict(pairs)


def settings_of(given: Any) -> dict[str, Any]:
    """What a JSON flag holds, or nothing where it is malformed, which is said elsewhere."""
    try:
        settings = read_json(given) if given else {}
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def check_json_flags(values: argparse.Namespace) -> list[str]:
    """What is wrong with the flags that take JSON objects."""
    problems = []
    for flag, find in FLAGS.items():
        given = getattr(values, flag, None)  # some came with later versions of transformers
        if not isinstance(given, str) or not given:
            continue
        try:
            settings = read_json(given)
        except OSError as error:
            hint = "; playground/ has configurations to start from" * (flag == "deepspeed")
            what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            problems.append(f"--{flag} {given}: {what}{hint or '; give a JSON object or a file that holds one'}")
        except ValueError as error:
            problems.append(f"--{flag} {given}: cannot be read as JSON: {error}; mend it")
        else:
            if not isinstance(settings, dict):
                problems.append(f"--{flag} {given}: must hold a JSON object, holds {type(settings).__name__}; mend it")
                continue
            problems += [f"--{flag} {given}: {problem}" for problem in find(settings)]
    return problems


def _find_wrong(settings: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """What is no setting, or no value for one."""
    for name, value in settings.items():
        kind = known.get(name)
        if name in ELSEWHERE:
            yield f"{name} has no place here ({ELSEWHERE[name]}); drop it"
        elif kind is None:
            yield f"{name} is unknown; {did_you_mean(name, known)}"
        elif not _is(value, kind):
            allowed = kind if isinstance(kind, str) else " or ".join(kind)
            yield f"{name} must be {allowed}, not {value!r}; mend it or leave it out"


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; transformers takes "true", "false" and digits in quotes for what they say."""
    if kind == SWITCH:
        return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))
    if kind == COUNT:
        digits = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
        return digits.isdecimal() and int(digits) >= 1
    if kind == OBJECT:
        return isinstance(value, dict)
    return value in kind


def _find_in_accelerator(settings: Mapping[str, Any]) -> list[str]:
    accumulation = settings.get("gradient_accumulation_kwargs")
    inner = _find_wrong(accumulation, ACCUMULATION) if isinstance(accumulation, dict) else ()
    return [*_find_wrong(settings, ACCELERATOR), *(f"gradient_accumulation_kwargs.{problem}" for problem in inner)]


def _find_in_checkpointing(settings: Mapping[str, Any]) -> list[str]:
    problems = [*_find_wrong(settings, CHECKPOINTING)]
    reentrant = str(settings.get("use_reentrant")).lower() == "true"
    others = [name for name in ("early_stop", "debug", "determinism_check") if name in settings]
    if reentrant and others and not problems:
        problems.append(f"use_reentrant true does not go with {', '.join(others)}; drop one")
    return problems


FLAGS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "deepspeed": deepspeed_checks.find_malformed,
    "fsdp_config": fsdp_config.find_fsdp_config_errors,
    "accelerator_config": _find_in_accelerator,
    "lr_scheduler_kwargs": lambda settings: [],  # the schedule knows; see training/rehearsal.py
    "activation_checkpointing_kwargs": _find_in_checkpointing,
    "gradient_checkpointing_kwargs": _find_in_checkpointing,
}
"""Flag -> what is wrong with its settings."""
