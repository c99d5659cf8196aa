"""Flags of FastChat's published commands that transformers has dropped since -> today's flags.

An entry can go when nobody runs a FastChat command any more.
"""

import json
import os
import shlex
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastchat_qlora.config.flag_parsing import normalize_flag, string_to_bool
from fastchat_qlora.errors import UserError


class LegacyFlag(NamedTuple):
    """An old flag."""

    new: str = ""  # the flag of the same meaning today, if there is one
    is_boolean: bool = False  # the bare flag means True
    translate: Callable[[str], str | None] = str  # value, True or False of a boolean -> that of the new flag
    note: str = ""  # what the old flag means today, if there is no new one, or else a remark on the new one


def _check_warmup_ratio(value: str) -> str:
    try:
        ratio = float(value)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise UserError(f"--warmup_ratio {value}: must be at least 0 and below 1; use --warmup_steps for a count")
    return value


def _check_save_safetensors(value: str) -> None:
    if value == "False":
        raise UserError(f"--save_safetensors {value}: adapters are saved as safetensors only; drop the flag")


LEGACY_FLAGS = {
    "--evaluation_strategy": LegacyFlag("--eval_strategy"),
    "--warmup_ratio": LegacyFlag("--warmup_steps", translate=_check_warmup_ratio, note="; below 1 it is a share"),
    "--group_by_length": LegacyFlag(
        "--train_sampling_strategy", True, lambda value: "group_by_length" if value == "True" else "random"
    ),
    "--fsdp_transformer_layer_cls_to_wrap": LegacyFlag(
        "--fsdp_config", translate=lambda value: json.dumps({"transformer_layer_cls_to_wrap": value.split(",")})
    ),
    "--no_cuda": LegacyFlag("--use_cpu", is_boolean=True),
    "--logging_dir": LegacyFlag(
        translate=lambda value: os.environ.update(TENSORBOARD_LOGGING_DIR=value),
        note="is the environment variable TENSORBOARD_LOGGING_DIR today",
    ),
    "--save_safetensors": LegacyFlag(
        "", True, _check_save_safetensors, "has no effect: adapters are always saved as safetensors"
    ),
    "--overwrite_output_dir": LegacyFlag(
        is_boolean=True,
        note="has no effect: a run resumes from the last checkpoint in output_dir, or starts over without one",
    ),
    "--include_tokens_per_second": LegacyFlag(
        is_boolean=True, note="has no effect: train_results.json always has the tokens/s"
    ),
}

OMITTED = {
    "--activation_checkpointing": "auto",
    "--gradient_checkpointing": "auto",
    "--init_lora_weights": "true",  # PEFT's name of its default
}
"""Flag -> the value, in small letters, that means the same as leaving it out."""


def get_current_name(name: str) -> str:
    """Return today's name of a flag."""
    return name if name not in LEGACY_FLAGS else LEGACY_FLAGS[name].new or name


def translate_legacy_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line with today's flags, and a warning for each old one.

    Old flags are accepted as `--flag value`, `--flag=value` or, if boolean, `--flag`; one whose value has no
    counterpart today, or whose new name is given as well, is a UserError.
    """
    arguments, warnings, waiting = [], [], list(argv)
    while waiting:
        text = waiting.pop(0)
        name, has_value, value = text.partition("=")
        flag = normalize_flag(name) if name.startswith("--") else ""
        following = [] if has_value else [word for word in waiting[:1] if not word.startswith("--")]
        values = [value] if has_value else following
        is_omitted = flag in OMITTED and [value.lower() for value in values] == [OMITTED[flag]]
        if not is_omitted and flag not in LEGACY_FLAGS:
            arguments.append(text)
            continue
        del waiting[: len(following)]
        if not is_omitted:
            new, warning = _translate(flag, values, argv)
            arguments += new
            warnings.append(warning)
    return arguments, warnings


def _translate(flag: str, values: Sequence[str], argv: Sequence[str]) -> tuple[list[str], str]:
    """Return today's arguments for an old flag with its value, if it has one, and a warning."""
    old = LEGACY_FLAGS[flag]
    if not values and not old.is_boolean:
        raise UserError(f"{flag}: needs a value; give one or drop the flag")
    value = values[0] if values else "True"
    try:
        translated = old.translate(str(string_to_bool(value)) if old.is_boolean else value)
    except ArgumentTypeError as error:
        raise UserError(f"{flag} {value}: must be True or False") from error
    if any(normalize_flag(given.partition("=")[0]) == old.new for given in argv):
        raise UserError(f"{flag} {value}: {old.new}, its name today, is given too; drop {flag}")
    new = [old.new, str(translated)] if old.new else []
    today = f"is called {shlex.join(new)} today" if new else ""
    return new, f"{flag} {value}: {today}{old.note}."
