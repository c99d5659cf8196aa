"""Command line -> RunArguments, checked before anything is loaded."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from transformers import HfArgumentParser

from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.config.fast_help import ParsedFlags, read_flags
from fastchat_qlora.config.flag_parsing import FlagParser, string_to_bool
from fastchat_qlora.config.resolve import resolve_flags
from fastchat_qlora.config.validation.deepspeed import find_deepspeed_errors
from fastchat_qlora.config.validation.json_flags import json_object
from fastchat_qlora.config.validation.paths import check_writable
from fastchat_qlora.distributed.extension_lock import remove_stale_locks
from fastchat_qlora.distributed.process_group import is_lost_peer
from fastchat_qlora.errors import UserError, raise_errors
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

Group = TypeVar("Group")

GROUPS: tuple[Any, ...] = tuple(RunArguments.__annotations__.values())

DESCRIPTION = (
    "Flags may also be given in a YAML or JSON file that comes first, as in `run.yaml --learning_rate 1e-4`; flags "
    "after it override it."
)


def build_parser(prog: str = "train_lora.py", own: type | None = None) -> FlagParser:
    """Build the parser of `train`, or of a command with flags of its `own`, for which --output_dir is optional."""
    groups = (*GROUPS, own) if own else GROUPS
    flags = HfArgumentParser(groups, add_help=False, allow_abbrev=False)
    parser = FlagParser(prog=prog, description=DESCRIPTION, parents=[flags])
    types = {"string_to_bool": string_to_bool, "dict": json_object}
    for action in parser._actions:
        action.type = types.get(getattr(action.type, "__name__", ""), action.type)
        action.required = action.required and not (own and action.dest == "output_dir")
    if own:
        parser.set_defaults(output_dir=".")
    parser.own_flags = [f"--{name}" for group in groups for name in group.__annotations__]
    parser.groups = {
        (group.__doc__ or "").partition("\n")[0]: [field.name for field in fields(group) if field.init]
        for group in GROUPS
    }
    return parser


def parse_args(argv: Sequence[str]) -> RunArguments:
    """Parse and check the command line of `train`, and create its output folder.

    Raises:
        UserError: all mistakes that can be found without loading the model or the data.
    """
    flags = read_flags(argv, build_parser())
    raise_errors(check_writable(flags.values.output_dir))
    args, warnings = _build_run(flags)
    for warning in [*flags.warnings, *warnings]:
        logger.warning(warning)
    return args


def parse_command(argv: Sequence[str], prog: str, own: type[Group]) -> tuple[RunArguments, Group]:
    """Parse and check the command line of a command that takes train's flags and starts no run.

    `output_dir` is optional and is not written to; nothing is logged about this machine. The errors are those of
    parse_args.
    """
    flags = read_flags(argv, build_parser(prog, own))
    args, _ = _build_run(flags)
    for warning in flags.warnings:
        logger.warning(warning)
    return args, _build_group(own, flags)


def _build_run(flags: ParsedFlags) -> tuple[RunArguments, list[str]]:
    """Return the argument groups of a run, and warnings about flags that this machine changes."""
    configuration = flags.values.deepspeed
    has_processes = flags.values.devices is None
    warnings = resolve_flags(flags.values)
    if configuration and has_processes:
        remove_stale_locks()  # before the first operation of DeepSpeed is compiled
    args = RunArguments(*(_build_group(group, flags) for group in GROUPS))
    if configuration:
        errors = find_deepspeed_errors(args.training, flags.given, has_processes=has_processes)
        raise_errors([f"--deepspeed {configuration}: {error}" for error in errors])
    return args, warnings


def _build_group(group: type[Group], flags: ParsedFlags) -> Group:
    """Build an argument group; an error names the flags that it is about."""
    values = {field.name: getattr(flags.values, field.name) for field in fields(group) if field.init}  # type: ignore[arg-type]
    try:
        return group(**values)
    except Exception as error:  # transformers and accelerate check their arguments in many ways while building them
        if is_lost_peer(error):
            raise  # they open the process group too
        reason = one_line(error) or type(error).__name__
        given = {name: values[name] for name in flags.given if name in values}
        shown = ", ".join(f"--{name} {one_line(given[name], 200)}" for name in _find_blamed(given, reason))
        raise UserError(f"{shown or 'the flags'}: {reason}; change or drop them") from error


def _find_blamed(given: Mapping[str, Any], reason: str) -> list[str]:
    """Return the flags whose name, or else whose value, is a word of an error; else all."""
    values = {name: str(getattr(value, "value", value)) for name, value in given.items() if not isinstance(value, bool)}
    named = [name for name in given if re.search(rf"\b{name}\b", reason)]
    quoted = [name for name, text in values.items() if re.search(rf"(?<![\w.-]){re.escape(text)}(?!\.?\w)", reason)]
    return named or [name for name in quoted if values[name]] or [*given]
