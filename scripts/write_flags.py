"""Write fastchat_qlora/config/flags.json, which answers `--help` and mistakes without importing a library.

python scripts/write_flags.py
"""

import argparse
import json
from typing import Any

from fastchat_qlora.commands.inspect import command as inspect
from fastchat_qlora.commands.plan import command as plan
from fastchat_qlora.config.fast_help import KINDS, TABLE, get_transformers_version, hash_declarations
from fastchat_qlora.config.flag_parsing import FlagParser
from fastchat_qlora.config.parser import build_parser

IMPLIED: dict[str, Any] = {"nargs": None, "const": None, "default": None, "choices": None, "required": False}
"""Defaults of argparse's `add_argument`."""


def flags_json() -> str:
    """Return the table as text with one flag a line, so that a change of one flag is a change of one line."""
    train = build_parser()
    parsers: dict[str, FlagParser] = {
        "train": train,
        "inspect": build_parser(inspect.INSPECT_PROG, inspect.InspectArguments),
        "plan": build_parser(plan.PLAN_PROG, plan.PlanArguments),
    }
    flags = _flags(train)
    table = {
        "transformers": get_transformers_version(),
        "sources": hash_declarations(),
        "description": train.description,
        "own_flags": [*train.own_flags],
        "groups": train.groups,
        "commands": {
            name: {
                "prog": parser.prog,
                "own_flags": parser.own_flags[len(train.own_flags) :],
                "flags": {key: flag for key, flag in _flags(parser).items() if flags.get(key) != flag},
            }
            for name, parser in parsers.items()
        },
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in table.items()]
    rows = [f"  {json.dumps(name)}: {json.dumps(flag, ensure_ascii=False)}" for name, flag in flags.items()]
    return "{\n" + ",\n".join([*lines, '"flags": {\n' + ",\n".join(rows) + "\n}"]) + "\n}\n"


def _flags(parser: FlagParser) -> dict[str, dict[str, Any]]:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    return {action.option_strings[0]: _flag(action) for action in actions}


def _flag(action: argparse.Action) -> dict[str, Any]:
    """Return the arguments of `add_argument`.

    Raises:
        TypeError: the table has no word for the action.
    """
    flag: dict[str, Any] = {"also": action.option_strings[1:], "dest": action.dest}
    if isinstance(action, argparse._StoreFalseAction):
        flag |= {"action": "store_false", "default": action.default}
    elif isinstance(action, argparse._StoreAction):
        choices = None if action.choices is None else list(action.choices)
        settings = {"nargs": action.nargs, "const": action.const, "default": action.default, "choices": choices}
        settings["required"] = action.required
        flag |= {name: value for name, value in settings.items() if value != IMPLIED[name]}
        flag["type"] = _kind(action)
    else:
        raise TypeError(f"{action}: is neither store nor store_false; add it to scripts/write_flags.py")
    return flag | {"help": action.help}


def _kind(action: argparse.Action) -> str:
    """Return the name in KINDS of the function that converts a text; choices that are texts stay texts."""
    if action.choices is not None and all(isinstance(choice, str) for choice in action.choices):
        return "str"
    name = getattr(action.type, "__name__", "")
    return name if name in KINDS else "library"


if __name__ == "__main__":
    TABLE.write_text(flags_json(), encoding="utf-8")
    print(f"{TABLE} is written.")
