"""The first look at a command line: `--help` and mistakes are answered before any library is imported.

Most of the flags are transformers', and to import them takes five seconds. So `flags.json` holds what argparse needs to
know of every flag; `scripts/write_flags.py` writes it from the live parser. It is believed only where it would come out
the same: with the version of transformers and the very sources that it was written from. Elsewhere, and for a command
line without mistakes, the live parser reads the command line as if there were no first look.
"""

import argparse
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from fastchat_qlora.config.config_file import expand
from fastchat_qlora.config.flag_parsing import FlagParser, find_unknown_flags, raise_errors, string_to_bool
from fastchat_qlora.config.legacy_flags import translate_legacy_flags
from fastchat_qlora.config.print_config import SUFFIXES, print_config
from fastchat_qlora.config.validation.flags import find_flag_errors
from fastchat_qlora.config.validation.json_flags import json_object
from fastchat_qlora.errors import UserError

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("flags.json")
DECLARATIONS = ("config/arguments.py", "commands/inspect/command.py", "commands/plan/command.py")
"""Where flags are declared, beside transformers."""


class NotInTable(Exception):
    """A value is of a type that only the libraries have."""


def _not_in_table(value: str) -> Any:
    raise NotInTable(value)


KINDS: dict[str, Callable[[Any], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "json_object": json_object,
    "string_to_bool": string_to_bool,
    "library": _not_in_table,
}
"""How the table names what makes a value of a text."""


class Reading(NamedTuple):
    """A command line as a parser reads it.

    Attributes:
        arguments: with the old flags under today's names.
        notices: what was said about old flags.
        values: of all flags, by name.
        problems: everything that is wrong and can be told by looking at the values.
    """

    arguments: list[str]
    notices: list[str]
    values: argparse.Namespace
    problems: list[str]


def read_flags(argv: Sequence[str], parser: FlagParser) -> Reading:
    """Read and check a command line, which may begin with a file of settings.

    Raises:
        UserError: a value of the wrong type, a required flag that is missing, an old flag without a counterpart, a file
            that does not hold flags.
        SystemExit: after printing the help, or the settings where `--print_config` asks for them.
    """
    arguments, notices = translate_legacy_flags(expand(argv, parser))
    values, unknown = _parse(arguments, parser)
    problems = find_unknown_flags(unknown, parser) + find_flag_errors(values)
    if values.print_config is not None and not problems:
        for notice in notices + print_config(parser, values, arguments):
            logger.warning(notice)
        raise SystemExit(0)
    return Reading(arguments, notices, values, problems)


def _parse(arguments: Sequence[str], parser: FlagParser) -> tuple[argparse.Namespace, list[str]]:
    """What argparse makes of a command line, and what it leaves over.

    Raises:
        UserError: in argparse's words; where flags are missing since their file does not come first, it says that too.
    """
    try:
        return parser.parse_known_args(arguments)
    except UserError as error:
        files = [text for text in arguments if text.lower().endswith(SUFFIXES)]
        if not files or "are required" not in str(error):
            raise
        raise UserError(f"{error}; {files[0]} comes first if it is to stand for them") from error


def check_fast(command: str, argv: Sequence[str]) -> None:
    """Answer `--help` or tell the mistakes of a command line, if the table can; else do nothing.

    Raises:
        UserError: what is wrong, in the words of the live parser.
        SystemExit: after printing the help.
    """
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    if table["made_from"] != made_from():
        return
    try:
        problems = read_flags(argv, build_table_parser(table, command)).problems
    except NotInTable:
        return
    raise_errors(problems)


def made_from() -> dict[str, Any]:
    """What decides on the flags: the version of transformers and the sources that declare the others.

    Nothing where that cannot be told, since a library lies there without its metadata or this package without sources.
    """
    try:
        sources = {name: crc32((PACKAGE / name).read_bytes()) for name in DECLARATIONS}
        return {"transformers": importlib.metadata.version("transformers"), **sources}
    except (OSError, importlib.metadata.PackageNotFoundError):
        return {}


def build_table_parser(table: Mapping[str, Any], command: str) -> FlagParser:
    """The parser of a command, made of the table; it can tell everything but values of kind "library"."""
    entry = table["commands"][command]
    parser = FlagParser(
        prog=entry["prog"],
        description=table["description"],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flags = table["flags"] | entry["flags"]
    for name, flag in flags.items():
        settings = dict(flag)
        if "type" in settings:
            settings["type"] = KINDS[settings["type"]]
        parser.add_argument(name, *settings.pop("also", ()), **settings)
    parser.own_flags = table["own_flags"] + entry["own_flags"]
    parser.groups = table["groups"]
    return parser
