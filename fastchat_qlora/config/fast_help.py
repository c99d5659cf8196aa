"""First look at a command line: `--help` and mistakes are answered before any library is imported.

Importing transformers, whose flags most are, takes seconds. So `flags.json` holds what argparse has to know of each
flag; `scripts/write_flags.py` writes it from the live parser. It is used unless the sources that declare this program's
flags have changed since. It describes one version of transformers: with another one installed, flags and choices that
it lacks are left to the live parser. A command line without mistakes is parsed by the live parser in any case.
"""

import argparse
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from fastchat_qlora.config.config_file import expand_config_file
from fastchat_qlora.config.flag_parsing import (
    ALL_LINEAR_NAMES,
    NAME_FLAGS,
    YAML_SUFFIXES,
    FlagParser,
    find_given,
    find_unknown_flags,
    list_known_flags,
    split_module_names,
    split_peer_values,
    string_to_bool,
)
from fastchat_qlora.config.legacy_flags import translate_legacy_flags
from fastchat_qlora.config.print_config import print_config
from fastchat_qlora.config.validation.flags import find_flag_errors
from fastchat_qlora.config.validation.json_flags import json_object
from fastchat_qlora.errors import UserError, raise_errors

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("flags.json")
DECLARATIONS = ("config/arguments.py", "commands/inspect/command.py", "commands/plan/command.py")
"""Sources that declare this program's flags."""


class NotInTable(Exception):
    """A flag or a value unknown to the table, for the installed libraries to judge."""


def leave_to_library(value: str) -> Any:
    """Raise NotInTable: the table does not describe the value."""
    raise NotInTable(value)


KINDS: dict[str, Callable[[Any], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "json_object": json_object,
    "string_to_bool": string_to_bool,
    "library": leave_to_library,
}
"""Name in the table -> function that converts a flag's text."""


class ParsedFlags(NamedTuple):
    """A command line without mistakes."""

    values: argparse.Namespace
    given: list[str]  # names of the flags that it or its configuration file sets, in order
    warnings: list[str]  # about old flags


def read_flags(argv: Sequence[str], parser: FlagParser) -> ParsedFlags:
    """Parse and check a command line, which may begin with a configuration file.

    Raises:
        UserError: all mistakes that can be found by looking at the values; those of argparse are reported with unknown
            flags alone.
        SystemExit: after printing the help or the settings.
    """
    arguments, warnings = translate_legacy_flags(expand_config_file(argv, parser))
    given = find_given(arguments)
    values, unknown = _parse(arguments, given, parser)
    for name in NAME_FLAGS:
        if words := getattr(values, name):
            setattr(values, name, split_module_names(words))
    values.lora_target_modules = [
        "all-linear" if name.lower() in ALL_LINEAR_NAMES else name for name in values.lora_target_modules
    ]
    raise_errors(find_unknown_flags(unknown, parser) + find_flag_errors(values))
    if values.print_config is not None:
        for warning in warnings + print_config(parser, values, given):
            logger.warning(warning)
        raise SystemExit(0)
    return ParsedFlags(values, given, warnings)


def _parse(
    arguments: Sequence[str], given: Collection[str], parser: FlagParser
) -> tuple[argparse.Namespace, list[str]]:
    """Return the values and what argparse leaves over."""
    try:
        return parser.parse_known_args(arguments)
    except UserError:
        raise_errors(_find_parse_errors(arguments, given, parser))
        raise


def _find_parse_errors(arguments: Sequence[str], given: Collection[str], parser: FlagParser) -> list[str]:
    """Return why argparse refuses a command line, with all names and values that it has from other programs.

    Who types --dataset for --data_path is not helped by reading that the latter is missing. A file that comes too late
    is named.
    """
    errors, rest = split_peer_values(arguments)
    try:
        return errors + find_unknown_flags(parser.parse_known_args(rest)[1], parser)
    except UserError as error:
        known = list_known_flags(parser)
        unknown = [text for text in rest if text[:2] == "--" != text and text.partition("=")[0] not in known]
        files = [text for text in rest if text.lower().endswith(YAML_SUFFIXES)]
        is_missing = any(action.required and action.dest not in given for action in parser._actions)
        hint = f"; {files[0]} must come first to set them" if files and is_missing else ""
        return [*errors, *find_unknown_flags(unknown, parser), f"{error}{hint}"]


def check_fast(command: str, argv: Sequence[str]) -> None:
    """Answer `--help` or report mistakes in the words of the live parser, as read_flags does, if the table can."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if table["sources"] == hash_declarations():
        with suppress(NotInTable):
            read_flags(argv, build_table_parser(table, command))


def hash_declarations() -> dict[str, int]:
    """Return the checksums of the sources that declare flags; none if this package has no sources."""
    with suppress(OSError):
        return {name: crc32((PACKAGE / name).read_bytes()) for name in DECLARATIONS}
    return {}


def get_transformers_version() -> str:
    """Return the installed version of transformers, without importing it."""
    source = _find_in_transformers("__init__.py")  # importlib.metadata takes a tenth of the time of --help to import
    found = re.search(r'^__version__ = "(.+)"', source.read_text("utf-8"), re.MULTILINE) if source.is_file() else None
    return found[1] if found else "an unknown version"


def _find_in_transformers(name: str) -> Path:
    package = importlib.util.find_spec("transformers")
    folders = package.submodule_search_locations if package else None
    return Path(*(folders or [])[:1], name)


def build_table_parser(table: Mapping[str, Any], command: str) -> FlagParser:
    """Build the parser of a command from the table; it raises NotInTable for what the table does not describe."""
    entry = table["commands"][command]
    parser = FlagParser(prog=entry["prog"], description=table["description"])
    parser.own_flags = table["own_flags"] + entry["own_flags"]
    parser.groups = table["groups"]
    installed = get_transformers_version()
    for name, flag in (table["flags"] | entry["flags"]).items():
        settings = dict(flag)
        if "type" in settings:
            settings["type"] = KINDS[settings["type"]]
        if installed != table["transformers"] and name not in parser.own_flags and "choices" in settings:
            settings["type"] = _make_choice_type(settings["choices"])
        parser.add_argument(name, *settings.pop("also", ()), **settings)
    if installed != table["transformers"]:
        _allow_other_flags(parser)
        parser.epilog = f"transformers' flags are listed as of {table['transformers']}; {installed} is installed."
    return parser


def _make_choice_type(choices: Collection[str]) -> Callable[[str], str]:
    return lambda value: value if value in choices else str(leave_to_library(value))


def _allow_other_flags(parser: FlagParser) -> None:
    """Leave other flags, found in the source of the installed transformers, and the list of all to the live parser."""
    source = _find_in_transformers("training_args.py")
    declared = re.findall(r"^    (\w+): ", source.read_text("utf-8"), re.MULTILINE) if source.is_file() else []
    if not declared:
        raise NotInTable(str(source))
    known = {action.dest: action for action in parser._actions}
    known["print_config"].type = leave_to_library
    for name in sorted({*declared} - {*known}):
        flags = {text for no in ("", "no_") for text in (f"--{no}{name}", f"--{no}{name}".replace("_", "-"))}
        parser.add_argument(*sorted(flags), nargs="*", type=leave_to_library, help=argparse.SUPPRESS)
