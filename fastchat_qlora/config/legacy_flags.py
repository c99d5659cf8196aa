"""Flags that FastChat's published commands use and transformers has dropped since.

Each entry states what the flag means today. An entry can go when nobody runs a FastChat command any more.
"""

import json
import os
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastchat_qlora.config.flag_parsing import string_to_bool
from fastchat_qlora.errors import UserError


class Translation(NamedTuple):
    """What an old flag with its value becomes."""

    arguments: list[str]
    notice: str


class LegacyFlag(NamedTuple):
    """How an old flag is read.

    Attributes:
        translate: what it becomes with a value.
        boolean: whether a bare one is True.
        new: the flag that says the same today, if one does.
    """

    translate: Callable[[str], Translation]
    boolean: bool = False
    new: str = ""


def _renamed(new: str) -> Callable[[str], Translation]:
    return lambda value: Translation([new, value], f"is called {new} today")


def _dropped(why: str) -> Callable[[str], Translation]:
    return lambda value: Translation([], f"has no effect: {why}")


def _warmup_ratio(value: str) -> Translation:
    try:
        ratio = float(value)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise UserError(f"--warmup_ratio {value}: must be at least 0 and below 1; a count goes into --warmup_steps")
    return Translation(["--warmup_steps", value], f"is called --warmup_steps {value} today (below 1 it is a share)")


def _group_by_length(value: str) -> Translation:
    if not string_to_bool(value):
        return Translation([], "is the default today")
    new = ["--train_sampling_strategy", "group_by_length"]
    return Translation(new, f"is called {' '.join(new)} today")


def _fsdp_layer(value: str) -> Translation:
    config = json.dumps({"transformer_layer_cls_to_wrap": value.split(",")})
    return Translation(["--fsdp_config", config], f"is called --fsdp_config '{config}' today")


def _logging_dir(value: str) -> Translation:
    os.environ["TENSORBOARD_LOGGING_DIR"] = value
    return Translation([], f"is set by the environment variable TENSORBOARD_LOGGING_DIR={value} today")


def _no_cuda(value: str) -> Translation:
    return Translation(["--use_cpu", str(string_to_bool(value))], "is called --use_cpu today")


def _save_safetensors(value: str) -> Translation:
    if not string_to_bool(value):
        raise UserError(f"--save_safetensors {value}: adapters are saved as safetensors only; drop the flag")
    return Translation([], "has no effect: adapters are always saved as safetensors")


LEGACY_FLAGS = {
    "--evaluation_strategy": LegacyFlag(_renamed("--eval_strategy"), new="--eval_strategy"),
    "--warmup_ratio": LegacyFlag(_warmup_ratio, new="--warmup_steps"),
    "--group_by_length": LegacyFlag(_group_by_length, boolean=True, new="--train_sampling_strategy"),
    "--fsdp_transformer_layer_cls_to_wrap": LegacyFlag(_fsdp_layer, new="--fsdp_config"),
    "--save_safetensors": LegacyFlag(_save_safetensors, boolean=True),
    "--logging_dir": LegacyFlag(_logging_dir),
    "--overwrite_output_dir": LegacyFlag(
        _dropped("a run goes on from the last checkpoint in output_dir, or starts anew if there is none"), boolean=True
    ),
    "--no_cuda": LegacyFlag(_no_cuda, boolean=True, new="--use_cpu"),
    "--include_tokens_per_second": LegacyFlag(
        _dropped("train_results.json always has tokens per second"), boolean=True
    ),
}


AUTOMATIC = ("--activation_checkpointing", "--gradient_checkpointing")
"""Flags that transformers declares as booleans and that are decided by the run when left out, which "auto" says too."""


def normalize_flag(name: str) -> str:
    """A flag's name with underscores; both spellings are accepted."""
    return "--" + name[2:].replace("-", "_")


def get_current_name(name: str) -> str:
    """What a flag is called today."""
    old = LEGACY_FLAGS.get(name)
    return (old and old.new) or name


def _check_value(name: str, value: str | None, flag: LegacyFlag) -> str:
    """The value, or True for a bare boolean.

    Raises:
        UserError: there is no value where one is needed, or it is no boolean where one is.
    """
    if value is None and not flag.boolean:
        raise UserError(f"{name}: needs a value; give one or drop the flag")
    if flag.boolean:
        try:
            string_to_bool("True" if value is None else value)
        except ArgumentTypeError as error:
            raise UserError(f"{name} {value}: must be True or False") from error
    return value if value is not None else "True"


def translate_legacy_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Rewrite dropped flags to what they are called today.

    Args:
        argv: a command line, in which old flags stand as `--flag value`, `--flag=value` or, for booleans, `--flag`.

    Returns:
        The command line for today's parser, and one notice for each flag rewritten.

    Raises:
        UserError: an old flag's value has no counterpart today, or its new name is given as well.
    """
    arguments: list[str] = []
    notices: list[str] = []
    waiting = list(argv)
    while waiting:
        text = waiting.pop(0)
        name, has_value, value = text.partition("=")
        old = normalize_flag(name)
        if old in AUTOMATIC and (value if has_value else waiting[0] if waiting else "").lower() == "auto":
            waiting = waiting if has_value else waiting[1:]
            continue
        if not name.startswith("--") or old not in LEGACY_FLAGS:
            arguments.append(text)
            continue
        following = waiting.pop(0) if not has_value and waiting and not waiting[0].startswith("--") else None
        value = _check_value(old, value if has_value else following, LEGACY_FLAGS[old])
        translation = LEGACY_FLAGS[old].translate(value)
        new = translation.arguments[0] if translation.arguments else None
        if new and any(normalize_flag(given.partition("=")[0]) == new for given in argv):
            raise UserError(f"{old} {value}: {new} is given too, and is what this flag is called today; drop {old}")
        arguments += translation.arguments
        notices.append(f"{old} {value}: {translation.notice}.")
    return arguments, notices
