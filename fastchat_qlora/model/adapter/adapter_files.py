"""An untrusted adapter's folder -> its LoRA configuration, checked with its tensors."""

import re
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import one_line

ADAPTER_FILE = SAFETENSORS_WEIGHTS_NAME
START_FLAG = "--lora_weight_path"
MAX_RANK = 65_536
PATTERN_SECONDS = 5.0  # for all regular expressions of an adapter

SUPPORTED_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("r", "rank_pattern", "layers_to_transform", "trainable_token_indices"), (int,)),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "alpha_pattern"), (int, float)),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"), (bool,)),
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save", "target_parameters"), (str,)),
    **dict.fromkeys(("layers_pattern", "bias"), (str,)),
    "init_lora_weights": (bool, str),
}
"""Types of the values, or of the items in them, by field. PEFT's other fields import modules, read files or change the
base model."""

UNLOADABLE_INITS = ("corda", "loftq", "lora_ga", "mica")
"""Initializations that changed the base model in a way which an adapter's file does not tell, or that freeze lora_B."""

SUPPORTED_VALUES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("r", "rank_pattern"), lambda value: 0 < value <= MAX_RANK),
    "trainable_token_indices": lambda value: 0 <= value < 2**31,
    "lora_dropout": lambda value: 0 <= value < 1,
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "init_lora_weights": lambda value: str(value).isidentifier() and value not in UNLOADABLE_INITS,
}

IGNORED_FIELDS = {
    *("task_type", "peft_type", "peft_version", "inference_mode", "megatron_core", "qalora_group_size"),
    *("auto_mapping", "base_model_name_or_path", "revision", "eva_config", "loftq_config"),
}
"""Fields about how the adapter was made, which nothing here reads."""


def read_lora_config(path: str, *, flag: str = START_FLAG) -> LoraConfig:
    """Read the configuration of an adapter in a folder that `flag` named.

    Raises:
        UserError: it is not the configuration of a plain LoRA adapter, or the file of tensors cannot be read.
    """
    where = f"{flag} {path}: its adapter_config.json"
    try:
        config = PeftConfig.from_pretrained(path)
    except Exception as error:  # PEFT builds an object from any JSON, and may raise anything
        raise UserError(f"{where} cannot be read: {one_line(error, 300)}; save the adapter again") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{flag} {path}: holds a {config.peft_type} adapter; give a LoRA adapter")
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    unsupported = [f"{name} {str(value)[:80]!r}" for name, value in values.items() if not _is_supported(name, value)]
    if unsupported:
        raise UserError(f"{where} has {', '.join(unsupported)}, which is not supported; save a plain LoRA adapter")
    for pattern in _get_module_patterns(config):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"{where} has {pattern[:80]!r}, which is not a regular expression: {error}; fix it"
            ) from error
    read_tensor_shapes(path, flag)
    config.inference_mode = False
    if config.init_lora_weights == "orthogonal":  # which PEFT has for no quantized layer, and a file replaces
        config.init_lora_weights = True
    # PEFT saves these as it finds them; a new adapter must name the model that it is trained on now.
    config.base_model_name_or_path = config.revision = config.auto_mapping = None
    return config


def _is_supported(name: str, value: Any) -> bool:
    if name in ("r", "target_modules") and not value:
        return False
    if name in IGNORED_FIELDS or not value:
        return True
    if name not in SUPPORTED_TYPES:
        return bool(value == getattr(LoraConfig(), name))
    in_range = SUPPORTED_VALUES.get(name, lambda _: True)
    return all(type(item) in SUPPORTED_TYPES[name] and in_range(item) for item in _get_items(value))


def _get_items(value: Any) -> list[Any]:
    """Return a value, or those in a list, set or dictionary: 2 and 5 of {"embed_tokens": [2, 5]}."""
    parts = value.values() if isinstance(value, dict) else [value]
    return [item for part in parts for item in (part if isinstance(part, list | set) else [part])]


def _get_module_patterns(config: LoraConfig) -> list[str]:
    """Return the regular expressions that PEFT matches names of modules with."""
    patterns = [name for name in (config.target_modules, config.exclude_modules) if isinstance(name, str)]
    layers = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    patterns += [rf".*\.[^.]*{pattern}\.(\d+)\." for pattern in layers]
    return patterns + [rf"(.*\.)?({key})$" for key in (*config.rank_pattern, *config.alpha_pattern)]


def check_pattern_time(config: LoraConfig, meta_model: PreTrainedModel | None) -> None:
    """Require that an adapter's regular expressions are fast on the model's module names; without a model, on one."""
    if threading.current_thread() is not threading.main_thread():  # only there a signal can stop the matching
        return
    names = dict(meta_model.named_modules()) if meta_model is not None else ["model.layers.0.self_attn.q_proj"]

    def stop(*_: Any) -> None:
        reason = f"the adapter's regular expressions take more than {PATTERN_SECONDS:g} seconds on the names of modules"
        raise UserError(f"{reason}; give a list of names in their place, as flags or in its adapter_config.json")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, PATTERN_SECONDS)
    try:
        for pattern, name in product(_get_module_patterns(config), names):
            re.fullmatch(pattern, name)  # takes no less time than re.match
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def check_adapter_tensors(path: str, expected: Mapping[str, torch.Size] | None, *, flag: str = START_FLAG) -> None:
    """Require that an adapter's file holds the expected tensors and no other LoRA matrices, by its header alone.

    Args:
        path: of the folder; nothing is checked without one.
        expected: name in the file -> shape, from `lora.compute_adapter_shapes`; None where that cannot be known.
    """
    if not path or expected is None:
        return
    shapes, remedy = read_tensor_shapes(path, flag), "give an adapter of this base model"
    if missing := sorted(expected.keys() - shapes.keys()):
        raise UserError(f"{flag} {path}: {len(missing)} tensors are not in it, such as {missing[0]}; {remedy}")
    # PEFT would ignore these without a warning.
    if extra := sorted(name for name in shapes.keys() - expected.keys() if ".lora_" in name):
        raise UserError(
            f"{flag} {path}: {len(extra)} of its tensors do not fit this model, such as {extra[0]}; {remedy}"
        )
    for name, shape in expected.items():
        if shapes[name] != tuple(shape):
            raise UserError(
                f"{flag} {path}: {name} has the shape {shapes[name]}, on this model it has {tuple(shape)}; {remedy}"
            )


def check_adapter_finite(path: str, *, flag: str = START_FLAG) -> None:
    """Require that all values of an adapter are finite floating-point numbers."""
    with safe_open(Path(path).expanduser() / ADAPTER_FILE, framework="pt") as tensors:
        names = list(tensors.keys())
        values = ((name, tensors.get_tensor(name)) for name in names)
        bad = [name for name, tensor in values if not (tensor.is_floating_point() and tensor.float().isfinite().all())]
    if bad:
        raise UserError(
            f"{flag} {path}: {len(bad)} of its {len(names)} tensors are not finite floating-point numbers, such as "
            f"{min(bad)}; take an earlier checkpoint, or train it again with a lower --learning_rate"
        )


def read_tensor_shapes(path: str, flag: str = START_FLAG) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors in an adapter's file, by its header alone."""
    try:
        with safe_open(Path(path).expanduser() / ADAPTER_FILE, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in list(tensors.keys())}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag} {path}: its {ADAPTER_FILE} cannot be read: {error}; save it again") from error
