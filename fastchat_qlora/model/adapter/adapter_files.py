"""A folder with an adapter, from whoever made it -> its LoRA configuration, and whether its tensors fit."""

import logging
import re
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

ADAPTER_FILE = SAFETENSORS_WEIGHTS_NAME  # what PEFT calls it

START_FLAG = "--lora_weight_path"
"""The flag of train that names such a folder."""

PATTERN_SECONDS = 5.0
"""For all of an adapter's regular expressions on the names of all modules."""

HIGHEST_RANK = 65_536


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= HIGHEST_RANK


def _all_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: is_one(value) or (isinstance(value, list | set | tuple) and all(map(is_one, value)))


def _by_name(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_is_name(k) and is_one(v) for k, v in value.items())


def _are_indices(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(one, list) and all(isinstance(i, int) and 0 <= i < 2**31 for i in one) for one in lists)


UNDERSTOOD: Mapping[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "init_lora_weights": lambda value: _is_flag(value) or (_is_name(value) and re.fullmatch(r"\w+", value) is not None),
    "target_modules": _all_of(_is_name),
    "exclude_modules": _all_of(_is_name),
    "modules_to_save": _all_of(_is_name),
    "target_parameters": _all_of(_is_name),
    "layers_to_transform": _all_of(_is_number),
    "layers_pattern": _all_of(_is_name),
    "trainable_token_indices": _are_indices,
    "rank_pattern": _by_name(_is_rank),
    "alpha_pattern": _by_name(_is_number),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"), _is_flag),
}
"""What of a configuration shapes an adapter that this program goes on with, and which values it may have."""

READ_BY_NOBODY = {
    *("task_type", "peft_type", "peft_version", "inference_mode", "megatron_core", "qalora_group_size"),
    *("auto_mapping", "base_model_name_or_path", "revision", "eva_config", "loftq_config"),
}
"""What it says of how it came to be; the rest of PEFT's fields import modules, read files or change the base."""


def read_lora_config(path: str, *, flag: str = START_FLAG) -> LoraConfig:
    """The configuration of an adapter to go on with.

    Args:
        path: of the folder.
        flag: how the folder was given, for the messages.

    Raises:
        UserError: it cannot be read, is not that of a LoRA adapter, or asks for more than a LoRA adapter.
    """
    config = _read(path, flag)
    problems = [
        f"{field.name} {str(value)[:80]!r}"
        for field in fields(config)
        if (value := getattr(config, field.name)) and not _is_fit(field.name, value)
    ]
    if problems:
        raise UserError(
            f"{flag} {path}: its adapter_config.json has {', '.join(problems)}, with which no LoRA adapter "
            "can be gone on from here; save a plain LoRA adapter"
        )
    if not config.r:
        raise UserError(f"{flag} {path}: its adapter_config.json has the rank r 0; save it again")
    if not config.target_modules:
        raise UserError(f"{flag} {path}: its adapter_config.json names no target_modules; save it again")
    for pattern in _patterns(config):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"{flag} {path}: {pattern[:80]!r} in its adapter_config.json is no regular expression: {error}; mend it"
            ) from error
    _read_shapes(path, flag)
    config.inference_mode = False
    # PEFT writes them down as it finds them: here it shall say what the adapter is trained on now.
    config.base_model_name_or_path = config.revision = config.auto_mapping = None
    return config


def _read(path: str, flag: str) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(path)
    except Exception as error:  # PEFT makes an object of whatever stands there, and fails in as many ways
        reason = one_line(error, 300)
        raise UserError(f"{flag} {path}: its adapter_config.json cannot be read: {reason}") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{flag} {path}: holds a {config.peft_type} adapter; give a LoRA adapter")
    return config


def _is_fit(name: str, value: Any) -> bool:
    if name in READ_BY_NOBODY:
        return True
    return UNDERSTOOD[name](value) if name in UNDERSTOOD else value == getattr(LoraConfig(), name)


def _patterns(config: LoraConfig) -> list[str]:
    """The regular expressions that PEFT matches names of modules with."""
    named = [config.target_modules, config.exclude_modules]
    layers = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    patterns = [name for name in named if isinstance(name, str) and name != "all-linear"]
    patterns += [rf".*\.[^.]*{pattern}\.(\d+)\." for pattern in layers]
    return patterns + [rf"(.*\.)?({key})$" for key in (*config.rank_pattern, *config.alpha_pattern)]


def check_module_patterns(config: LoraConfig, names: Collection[str]) -> None:
    """Require that the adapter's regular expressions can be matched with these names of modules in little time.

    Raises:
        UserError: it takes for ever, as some expressions do.
    """
    patterns = [re.compile(pattern) for pattern in _patterns(config)]
    if not patterns or threading.current_thread() is not threading.main_thread():  # only there a signal can stop it
        return
    too_slow = UserError(
        f"the regular expressions of the adapter's configuration take more than {PATTERN_SECONDS:g} seconds to be "
        "matched with the names of the model's modules; write target_modules as a list of names"
    )
    with _at_most(PATTERN_SECONDS, too_slow):
        for pattern in patterns:
            for name in names:
                pattern.match(name)
                pattern.fullmatch(name)


@contextmanager
def _at_most(seconds: float, error: Exception) -> Iterator[None]:
    """Raise an error where the block takes longer; the matching of regular expressions does look for signals."""

    def stop(*_: Any) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_adapter_tensors(path: str, expected: Mapping[str, torch.Size] | None, *, flag: str = START_FLAG) -> None:
    """Require that an adapter's file holds what its configuration says, by its header alone.

    Args:
        path: of the folder; nothing is checked without one.
        expected: name in the file -> shape, from `adapter.expected_shapes`; None where that cannot be known.
        flag: how the folder was given, for the messages.

    Raises:
        UserError: a tensor is not there, has another shape, or is of a layer that the model does not have.
    """
    if not path or expected is None:
        return
    shapes = _read_shapes(path, flag)
    missing = sorted(expected.keys() - shapes.keys())
    if missing:
        raise UserError(f"{flag} {path}: {len(missing)} tensors are not in it, such as {missing[0]}")
    added = sorted(name for name in shapes.keys() - expected.keys() if ".lora_" in name)
    if added:  # PEFT would leave them aside without a word
        raise UserError(
            f"{flag} {path}: {len(added)} of its tensors have no place on this model, such as {added[0]}; give an "
            "adapter of this base model"
        )
    for name, shape in expected.items():
        if shapes[name] != tuple(shape):
            raise UserError(
                f"{flag} {path}: {name} has the shape {shapes[name]}, on this model it has {tuple(shape)}; "
                "give an adapter of this base model"
            )


def check_adapter_finite(path: str, *, flag: str = START_FLAG) -> None:
    """Require that every number of an adapter is one, and not a whole one.

    Raises:
        UserError: naming a tensor that holds infinities, what is no number, or integers.
    """
    with safe_open(Path(path).expanduser() / ADAPTER_FILE, framework="pt") as tensors:
        names = list(tensors.keys())
        bad = [name for name in names if not _is_finite(tensors.get_tensor(name))]
    if bad:
        raise UserError(
            f"{flag} {path}: {len(bad)} of its {len(names)} tensors are not finite floating-point numbers, such as "
            f"{min(bad)}; take an earlier checkpoint, or train it again with a lower --learning_rate"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())


def _read_shapes(path: str, flag: str) -> dict[str, tuple[int, ...]]:
    file = Path(path).expanduser() / ADAPTER_FILE
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag} {path}: its {ADAPTER_FILE} cannot be read: {error}; save it again") from (error)
