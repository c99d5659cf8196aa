"""`--print_config`: a command line as a file of settings that stands for all of it.

Written are the values as they were given or are by default, before anything follows from the machine: on another one
the same file means what the same command line would have meant there.
"""

import argparse
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fastchat_qlora.config.flag_parsing import FlagParser
from fastchat_qlora.config.legacy_flags import normalize_flag
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import mask_secrets, one_line

SUFFIXES = (".yaml", ".yml")
TERMINAL = "-"
WIDTH = 120

NOT_OF_THE_RUN = ("help", "local_rank", "print_config")
"""Flags that the launcher gives, or that only ask for something."""

OF_DEEPSPEED = ("optim", "lr_scheduler_type")
"""Flags that are compared with the DeepSpeed configuration if they are given, and else follow it."""

FOLDER = "output_dir"
"""What `inspect` and `plan` need not be given, and `train` must be."""

LOGGING_DIR = "TENSORBOARD_LOGGING_DIR"
"""What the old flag `--logging_dir` sets: the file says it by that name."""

WORD = re.compile(r"[A-Za-z_/.][\w./+@-]*", re.ASCII)
"""Texts that need no quotes, unless YAML takes them for something else."""


class Printed(NamedTuple):
    """A file of settings, and the flags that it leaves out since they are secrets."""

    text: str
    secrets: list[str]


def print_config(parser: FlagParser, values: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    """Write the settings to standard output, or to the file that `--print_config` names; one process does so.

    Args:
        parser: knows the groups and their flags.
        values: as parsed, before anything follows from the machine.
        arguments: the command line that they were parsed from.

    Returns:
        Sentences on where they are, and on what was left out.

    Raises:
        UserError: the file cannot be written, or is not named as one of settings.
    """
    target = os.path.expanduser(values.print_config)
    if target != TERMINAL and not target.lower().endswith(SUFFIXES):
        raise UserError(f"--print_config {values.print_config}: give a name that ends in .yaml, or - for the terminal")
    if os.environ.get("RANK", "0") != "0":
        return []
    printed = describe(parser, values, arguments)
    if target == TERMINAL:
        _write_to_terminal(printed.text)
    else:
        _write_whole(Path(target), printed.text)
    notices = [f"the settings are in {target}."] * (target != TERMINAL)
    notices += [f"{name} is left out, for it holds a secret; give it on the line." for name in printed.secrets]
    if own := _given_to_the_command(parser, values):
        notices.append(f"leaves out {', '.join(own)}: only {parser.prog} takes such; give it on the line.")
    return [f"--print_config: {notice}" for notice in notices]


def _given_to_the_command(parser: FlagParser, values: argparse.Namespace) -> list[str]:
    """Flags other than their defaults that are no setting of a run, such as the devices that `plan` is asked about."""
    of_runs = {*NOT_OF_THE_RUN, *(name for names in parser.groups.values() for name in names)}
    own = [action for action in parser._actions if action.dest not in of_runs]
    return [f"--{action.dest}" for action in own if getattr(values, action.dest) != action.default]


def describe(parser: FlagParser, values: argparse.Namespace, arguments: Sequence[str]) -> Printed:
    """All of train's settings by groups, each under the first sentence of its help; arguments as for print_config."""
    blocks, secrets = [], []
    given = {normalize_flag(text.partition("=")[0])[2:] for text in arguments if text.startswith("--")}
    left_open = {FOLDER, *(OF_DEEPSPEED if values.deepspeed else ())} - given
    for title, names in parser.groups.items():
        wanted = set(names).difference(NOT_OF_THE_RUN)
        lines = [f"# {title}"]
        for action in (action for action in parser._actions if action.dest in wanted and action.nargs != 0):
            value = getattr(values, action.dest)
            if value is not None and mask_secrets(value, action.dest) != value:
                secrets.append(f"--{action.dest}")
                value = None
            if action.dest in left_open:
                value = None
            lines += ["", *_comment(action.help or ""), f"{action.dest}: {to_yaml(value)}"]
        blocks.append("\n".join(lines))
    if directory := os.environ.get(LOGGING_DIR):
        blocks.append(f"# For TensorBoard, also set by {LOGGING_DIR}.\nlogging_dir: {to_yaml(directory)}")
    return Printed("\n\n\n".join(blocks) + "\n", secrets)


def _comment(text: str) -> Iterator[str]:
    """The first sentence as comment lines."""
    sentence = re.split(r"(?<=[.!?])\s", one_line(text), maxsplit=1)[0]
    yield from (f"# {line}" for line in textwrap.wrap(sentence, WIDTH - 2, break_on_hyphens=False))


def to_yaml(value: Any) -> str:
    """A flag's value on one line, as config_file reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_yaml, value))}]"
    if isinstance(value, dict):
        return json.dumps(value)
    return _quoted(str(getattr(value, "value", value)))  # some choices are enumerations


def _quoted(text: str) -> str:
    import yaml  # of which no run without such a file has any use

    resolver = yaml.SafeLoader("")
    if WORD.fullmatch(text) and resolver.resolve(yaml.ScalarNode, text, (True, False)) == "tag:yaml.org,2002:str":
        return text
    style = "'" if '"' in text and text.isprintable() else '"'
    written: str = yaml.safe_dump(text, default_style=style, width=float("inf"), allow_unicode=True)
    return written.rstrip("\n")


def _write_to_terminal(text: str) -> None:
    """Write to standard output, wherever it goes.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Python would try to write the rest once more when it ends, and then exit with 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `| head` has seen enough
            raise UserError(f"--print_config -: cannot be written ({error.strerror}); see where it goes to") from error


def _write_whole(path: Path, text: str) -> None:
    """Write a file that appears under its name when all is written, or not at all.

    Raises:
        UserError: it cannot be written, or something else than a file has its name.
    """
    part = path.with_name(f".print_config.{os.getpid()}.part")  # as short as the longest of names asks for
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"--print_config {path}: is there and is no regular file; give another name")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"--print_config {path}: cannot be written ({error.strerror}); give another name") from error
    finally:
        with suppress(OSError):  # what cannot be made cannot always be removed
            part.unlink()
