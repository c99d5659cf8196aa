"""Parsed values -> argument groups, with the flags named that the libraries' own checks refuse."""

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any

from fastchat_qlora.config.legacy_flags import normalize_flag
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import one_line


def build_groups(kinds: Iterable[type], namespace: argparse.Namespace, arguments: Sequence[str]) -> list[Any]:
    """An instance of each group.

    Args:
        kinds: the groups, dataclasses.
        namespace: the values of all of their fields.
        arguments: the command line, which decides on the flags that an error may be about.

    Raises:
        UserError: transformers or accelerate refuse a value.
    """
    values = vars(namespace)
    given = {_field_of(text.partition("=")[0]): None for text in arguments if text.startswith("--")}
    groups = []
    for kind in kinds:
        own = {field.name: values[field.name] for field in fields(kind) if field.init}
        try:
            groups.append(kind(**own))
        except Exception as error:  # transformers and accelerate check their arguments in many ways while building them
            reason = one_line(error) or type(error).__name__
            culprits = _find_culprits(kind, own, [name for name in given if name in own], reason)
            named = [f"--{name} {one_line(own[name], 200)}" for name in culprits]
            raise UserError(f"{', '.join(named) or 'the flags'}: {reason}; mend or drop") from error
    return groups


def _field_of(flag: str) -> str:
    """The field that a flag sets: `--no_x` sets x."""
    return normalize_flag(flag).removeprefix("--").removeprefix("no_")


def _find_culprits(kind: type, values: dict[str, Any], given: Sequence[str], reason: str) -> list[str]:
    """The fields that an error is about: those it names, else those without which it does not come up.

    The second is found by trying, in one process only: several would have to talk to each other at each try.
    """
    named = [name for name in given if re.search(rf"\b{name}\b", reason)]
    if named or "RANK" in os.environ:
        return named
    defaults = {}
    for field in fields(kind):
        made = field.default_factory() if field.default_factory is not MISSING else field.default
        if made is not MISSING:
            defaults[field.name] = made
    culprits = []
    for name in given:
        if name not in defaults:
            continue
        try:
            kind(**values | {name: defaults[name]})
        except Exception as error:  # as above
            if (one_line(error) or type(error).__name__) == reason:
                continue
        culprits.append(name)
    return culprits
