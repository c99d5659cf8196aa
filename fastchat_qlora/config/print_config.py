"""`--print_config`: a command line as a configuration file that is equivalent to it.

The values are those given or the defaults, before anything is resolved for this machine: on another machine the file
means what the command line would have meant there.
"""

import argparse
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastchat_qlora.config.flag_parsing import YAML_SUFFIXES, FlagParser
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.atomic import write_atomically
from fastchat_qlora.utils.stdout import OutputClosed, open_stdout
from fastchat_qlora.utils.text import mask_secrets, one_line

LINE_WIDTH = 120
NOT_SETTINGS = ("help", "local_rank", "print_config")  # given by the launcher, or only asking for something
SET_BY_DEEPSPEED = ("optim", "lr_scheduler_type")  # null unless given: the configuration of --deepspeed may decide
LOGGING_DIR = "TENSORBOARD_LOGGING_DIR"  # the old flag `--logging_dir` sets it; the file uses that name
PLAIN_WORD = re.compile(r"[A-Za-z_/.][\w./+@-]*", re.ASCII)  # no quotes, unless YAML reads it as something else


def print_config(parser: FlagParser, values: argparse.Namespace, given: Collection[str]) -> list[str]:
    """Write the settings in the first process, and return messages about where they are and what is left out.

    Raises:
        UserError: the file of `--print_config` cannot be written, or has another suffix.
    """
    target = os.path.expanduser(values.print_config)
    if target != "-" and not target.lower().endswith(YAML_SUFFIXES):
        raise UserError(f"--print_config {values.print_config}: must end in .yaml, or be - for the terminal")
    if os.environ.get("RANK", "0") != "0":
        return []
    text, secrets = format_config(parser, values, given)
    messages = [f"--{name} is left out because it holds a secret; give it on the command line." for name in secrets]
    if target == "-":
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        with suppress(OutputClosed), open_stdout() as out:  # `| head` may have seen enough
            out.write(text)
    else:
        _write_file(Path(target), text)
        messages.insert(0, f"the settings are in {target}.")
    settings = {*NOT_SETTINGS, *(name for names in parser.groups.values() for name in names)}
    own = {action.dest: action.default for action in parser._actions if action.dest not in settings}
    if changed := [f"--{name}" for name, default in own.items() if getattr(values, name) != default]:
        messages.append(f"leaves out {', '.join(changed)}: flags of {parser.prog} only; give them on the command line.")
    return [f"--print_config: {message}" for message in messages]


def format_config(parser: FlagParser, values: argparse.Namespace, given: Collection[str]) -> tuple[str, list[str]]:
    """Return train's settings by groups, each below its help, and the names left out because they hold secrets."""
    blocks, secrets = [], []
    left_open = {"output_dir", *(SET_BY_DEEPSPEED if values.deepspeed else ())}.difference(given)
    for title, names in parser.groups.items():
        wanted = set(names).difference(NOT_SETTINGS)
        lines = [f"# {title}"]
        for action in (action for action in parser._actions if action.dest in wanted and action.nargs != 0):
            value = None if action.dest in left_open else getattr(values, action.dest)
            value = "True" if value is True and action.type is str else value  # as a bare --fsdp is read back
            if value is not None and mask_secrets(value, action.dest) != value:
                secrets.append(action.dest)
                value = None
            sentence = re.split(r"(?<=[.!?])\s", one_line(action.help), maxsplit=1)[0]
            comment = textwrap.wrap(sentence, LINE_WIDTH - 2, break_on_hyphens=False)
            lines += ["", *(f"# {line}" for line in comment), f"{action.dest}: {to_yaml(value)}"]
        blocks.append("\n".join(lines))
    if directory := os.environ.get(LOGGING_DIR):
        blocks.append(f"# For TensorBoard, also set by {LOGGING_DIR}.\nlogging_dir: {to_yaml(directory)}")
    return "\n\n\n".join(blocks) + "\n", secrets


def to_yaml(value: Any) -> str:
    """Return a flag's value in one line, as config_file reads it back."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_yaml, value))}]"
    if value is None or isinstance(value, bool | dict):
        return json.dumps(value)
    if isinstance(value, int | float):
        return repr(value).removesuffix(".0")  # 0 and 0.0 read back as the same number
    return _quote_yaml(str(getattr(value, "value", value)))  # some choices are enumerations


def _quote_yaml(text: str) -> str:
    """Return a text in quotes unless every reader of YAML takes it for a text without."""
    import yaml  # which slows every other command line down

    is_word = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False)) == "tag:yaml.org,2002:str"
    if is_word and PLAIN_WORD.fullmatch(text):
        return text
    style = "'" if '"' in text and text.isprintable() else '"'
    written: str = yaml.safe_dump(text, default_style=style, width=float("inf"), allow_unicode=True)
    return written.rstrip("\n")


def _write_file(path: Path, text: str) -> None:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"--print_config {path}: exists and is not a regular file; give another name")
        with write_atomically(path) as out:
            out.write(text)
    except OSError as error:
        raise UserError(f"--print_config {path}: cannot be written ({error.strerror}); give another name") from error
