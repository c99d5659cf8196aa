"""Flags of FastChat's published commands that transformers has dropped since -> what they are called today.

An entry can go when nobody runs a FastChat command any more.
"""

import json
import os
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastchat_qlora.config.flag_parsing import normalize_flag, string_to_bool
from fastchat_qlora.errors import UserError

Translation = tuple[list[str], str]
"""Today's arguments, and what the flag with its value means today."""


class LegacyFlag(NamedTuple):
    """An old flag.

    Attributes:
        translate: value -> today's arguments and message.
        is_boolean: the bare flag means True.
        new: today's flag of the same meaning, if there is one.
    """

    translate: Callable[[str], Translation]
    is_boolean: bool = False
    new: str = ""


def _has_no_effect(why: str) -> Callable[[str], Translation]:
    return lambda value: ([], f"has no effect: {why}")


def _translate_evaluation_strategy(value: str) -> Translation:
    return ["--eval_strategy", value], "is called --eval_strategy today"


def _translate_warmup_ratio(value: str) -> Translation:
    try:
        ratio = float(value)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise UserError(f"--warmup_ratio {value}: must be at least 0 and below 1; use --warmup_steps for a count")
    return ["--warmup_steps", value], f"is called --warmup_steps {value} today (a share if below 1)"


def _translate_group_by_length(value: str) -> Translation:
    if not string_to_bool(value):
        return [], "is the default today"
    new = ["--train_sampling_strategy", "group_by_length"]
    return new, f"is called {' '.join(new)} today"


def _translate_layer_to_wrap(value: str) -> Translation:
    config = json.dumps({"transformer_layer_cls_to_wrap": value.split(",")})
    return ["--fsdp_config", config], f"is called --fsdp_config '{config}' today"


def _translate_logging_dir(value: str) -> Translation:
    os.environ["TENSORBOARD_LOGGING_DIR"] = value
    return [], f"is set by the environment variable TENSORBOARD_LOGGING_DIR={value} today"


def _translate_no_cuda(value: str) -> Translation:
    return ["--use_cpu", str(string_to_bool(value))], "is called --use_cpu today"


def _translate_save_safetensors(value: str) -> Translation:
    if not string_to_bool(value):
        raise UserError(f"--save_safetensors {value}: adapters are saved as safetensors only; drop the flag")
    return [], "has no effect: adapters are always saved as safetensors"


LEGACY_FLAGS = {
    "--evaluation_strategy": LegacyFlag(_translate_evaluation_strategy, new="--eval_strategy"),
    "--warmup_ratio": LegacyFlag(_translate_warmup_ratio, new="--warmup_steps"),
    "--group_by_length": LegacyFlag(_translate_group_by_length, is_boolean=True, new="--train_sampling_strategy"),
    "--fsdp_transformer_layer_cls_to_wrap": LegacyFlag(_translate_layer_to_wrap, new="--fsdp_config"),
    "--save_safetensors": LegacyFlag(_translate_save_safetensors, is_boolean=True),
    "--logging_dir": LegacyFlag(_translate_logging_dir),
    "--overwrite_output_dir": LegacyFlag(
        _has_no_effect("a run resumes from the last checkpoint in output_dir, or starts over without one"),
        is_boolean=True,
    ),
    "--no_cuda": LegacyFlag(_translate_no_cuda, is_boolean=True, new="--use_cpu"),
    "--include_tokens_per_second": LegacyFlag(
        _has_no_effect("train_results.json always has the tokens/s"), is_boolean=True
    ),
}

AUTOMATIC = ("--activation_checkpointing", "--gradient_checkpointing")
"""Boolean flags whose value "auto" means the same as leaving them out: the run decides."""


def get_current_name(name: str) -> str:
    """Return what a flag is called today."""
    old = LEGACY_FLAGS.get(name)
    return (old and old.new) or name


def translate_legacy_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace dropped flags by what they are called today, and drop those with the value "auto".

    Args:
        argv: a command line; old flags are accepted as `--flag value`, `--flag=value` or, if boolean, `--flag`.

    Returns:
        Today's command line, and one warning for each old flag.

    Raises:
        UserError: an old flag's value has no counterpart today, or its new name is given as well.
    """
    arguments: list[str] = []
    warnings: list[str] = []
    waiting = list(argv)
    while waiting:
        text = waiting.pop(0)
        name, has_value, value = text.partition("=")
        flag = normalize_flag(name) if name.startswith("--") else ""
        following = [] if has_value else [word for word in waiting[:1] if not word.startswith("--")]
        values = [value] if has_value else following
        is_auto = flag in AUTOMATIC and [value.lower() for value in values] == ["auto"]
        if not is_auto and flag not in LEGACY_FLAGS:
            arguments.append(text)
            continue
        del waiting[: len(following)]
        if not is_auto:
            new, warning = _translate(flag, values, argv)
            arguments += new
            warnings.append(warning)
    return arguments, warnings


def _translate(flag: str, values: Sequence[str], argv: Sequence[str]) -> tuple[list[str], str]:
    """Return today's arguments and the warning for an old flag with its value, if it has one."""
    old = LEGACY_FLAGS[flag]
    if not values and not old.is_boolean:
        raise UserError(f"{flag}: needs a value; give one or drop the flag")
    value = values[0] if values else "True"
    if old.is_boolean:
        try:
            string_to_bool(value)
        except ArgumentTypeError as error:
            raise UserError(f"{flag} {value}: must be True or False") from error
    new, meaning = old.translate(value)
    if new and any(normalize_flag(given.partition("=")[0]) == new[0] for given in argv):
        raise UserError(f"{flag} {value}: {new[0]}, its name today, is given too; drop {flag}")
    return new, f"{flag} {value}: {meaning}."
